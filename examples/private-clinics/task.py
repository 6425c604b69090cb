"""Five hospitals of unequal size predict whether a tumour is malignant, record by record private.

That a hospital takes part is no secret; what must not show is any single patient. So each
hospital trains with DP-SGD and keeps a ledger of its own: nobody who sees what it sends, the
coordinator included, can tell whether a given record was among its own. The end of a run compares
the model with what each hospital reaches alone under the same promise.
"""

import numpy as np
from flwr.app import RecordDict
from torch import nn

from umbel import BySize, Federation, Job, Node, Partitioned, PrivateSgd, TorchTrainer

HOSPITALS = 5

data = Partitioned("breast-cancer", BySize(exponent=1.0))
trainer = PrivateSgd(trainer=TorchTrainer(lambda: nn.Linear(30, 2)))


def hospital(number, options):
    return data(Node(number, HOSPITALS, {"partition-id": number}), options).train


def compare(outcome, options):
    """The promise to each hospital's patients, and accuracy together and alone."""
    promises, alone = {}, []
    for i in range(HOSPITALS):
        records = hospital(i, options)
        plan = trainer.schedule(len(records), options)
        promises[f"hospital {i}, {len(records)} records"] = {
            "example epsilon": plan.epsilon,
            "noise multiplier": plan.noise_multiplier,
        }
        alone.append(train_alone(records, options))
    return {
        **promises,
        "federated": {"accuracy": outcome.metrics["accuracy"]},
        "each hospital alone, mean": {"accuracy": float(np.mean(alone))},
        "each hospital alone, worst": {"accuracy": float(np.min(alone))},
    }


def train_alone(records, options):
    """The same steps under the same promise, without the others."""
    weights, memory = trainer.initial(options, 0), RecordDict()
    for number in range(1, options["rounds"] + 1):
        job = Job(number, number, options, memory=memory)
        weights = trainer.train(weights, records, job).weights
    return trainer.evaluate(weights, data.central_test(options), options).metrics["accuracy"]


federation = Federation(name="private-clinics", trainer=trainer, data=data, summary=compare)
