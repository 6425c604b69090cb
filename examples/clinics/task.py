"""Five hospitals of unequal size predict whether a tumour is malignant.

Each hospital holds its own patients' records (scikit-learn's breast-cancer data). They train one
logistic regression together; the end of a run compares it with what each hospital reaches alone
and with what all records in one place would give.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression

from umbel import BySize, Examples, Federation, Node, Partitioned, SklearnTrainer

HOSPITALS = 5

data = Partitioned("breast-cancer", BySize(exponent=1.0))


def compare(outcome, options):
    """Accuracy on the same held-out patients: together, alone, pooled."""
    test = data.central_test(options)
    parts = [data(Node(i, HOSPITALS, {"partition-id": i}), options).train for i in range(HOSPITALS)]
    alone = [_accuracy(part, test) for part in parts]
    pooled = Examples(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
    return {
        "federated": {"accuracy": outcome.metrics["accuracy"]},
        "each hospital alone, mean": {"accuracy": float(np.mean(alone))},
        "each hospital alone, worst": {"accuracy": float(np.min(alone))},
        "all records in one place": {"accuracy": _accuracy(pooled, test)},
    }


def _accuracy(train, test):
    if len(np.unique(train.y)) < 2:  # a hospital with one kind of patient can only guess that
        return float(np.mean(test.y == train.y[0]))
    model = LogisticRegression(max_iter=1000).fit(train.x, train.y)
    return float(model.score(test.x, test.y))


federation = Federation(
    trainer=SklearnTrainer(LogisticRegression(), features=30, classes=2),
    data=data,
    summary=compare,
)
