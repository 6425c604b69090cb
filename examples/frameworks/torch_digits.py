"""Digits in PyTorch: run it with `python -m umbel.examples.frameworks.torch_digits`."""

from torch import nn

import umbel
from umbel import Dirichlet, Federation, Partitioned, TorchTrainer


def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


federation = Federation(
    trainer=TorchTrainer(net),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 0.3, "batch-size": 16, "local-epochs": 2},
    name="digits-torch",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
