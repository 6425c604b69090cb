"""Digits with all that a node may keep to itself: running statistics, dropout, momentum."""

from torch import nn

from umbel import Dirichlet, Federation, Partitioned, TorchTrainer


def net():
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 10)
    )


federation = Federation(
    name="digits",
    trainer=TorchTrainer(net, loss="cross-entropy"),
    data=Partitioned("digits", Dirichlet(alpha=1.0), test_fraction=0.2),
)
