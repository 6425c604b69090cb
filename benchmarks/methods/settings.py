"""What the benchmark of methods trains: two data sets, divided in two ways, and every method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from umbel.clients.data.partition import Dirichlet, Partitioner, Shards
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError

SPLITS: Mapping[str, Partitioner] = {
    "dirichlet": Dirichlet(0.1),
    "shards": Shards(2),
}
"""How the data are divided: Dirichlet 0.1, and shards of two labels."""

OWN_TESTS = 0.2
"""The share of a node's examples that judges its own model."""

METHODS: Mapping[str, Mapping[str, str | int | float]] = {
    "fedavg": {},
    "fedprox": {"method": "fedprox", "proximal-mu": 0.01},
    "scaffold": {"method": "scaffold"},
    "feddyn": {"method": "feddyn", "feddyn-alpha": 0.1},
    "fednova": {"method": "fednova"},
    "fedexp": {"method": "fedexp"},
    "q-fedavg": {"method": "q-fedavg", "qfedavg-q": 1.0},
    "afl": {"method": "afl", "afl-rate": 0.1},
    "power-of-choice": {"cohort": "power-of-choice"},
    "oort": {"cohort": "oort"},
    "fine-tuning": {"fine-tune-epochs": 5},
    "ditto": {"method": "ditto", "ditto-lambda": 0.1},
    "fedper": {"method": "fedper", "personal-layers": "head.*"},
    "fedrep": {"method": "fedrep", "personal-layers": "head.*", "fedrep-head-epochs": 5},
    "per-fedavg": {"method": "per-fedavg", "perfedavg-alpha": 0.05},
}
"""What each line of the table changes of FedAvg, from which all others differ in this alone."""


class Net(nn.Module):
    """A body of one layer, and a head."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(inputs, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.flatten(1)).relu())
        return out


@dataclass(frozen=True)
class Setting:
    """One data set with all that the methods have in common.

    Attributes:
        dataset: its name in the catalogue.
        inputs: of the model.
        width: of its body.
        nodes: how many there are.
        target: the accuracy to which rounds are counted.
        options: of every run.
    """

    dataset: str
    inputs: int
    width: int
    nodes: int
    target: float
    options: Mapping[str, str | int | float] = field(default_factory=dict)

    def parts(self) -> dict[str, Any]:
        """Of a `Federation`, whose option `split` says how the data are divided."""
        return {
            "trainer": TorchTrainer(self._net, loss="cross-entropy"),
            "data": Partitioned(self.dataset, _split, test_fraction=OWN_TESTS),
            "options": {"split": "dirichlet", **self.options},
            "name": f"{self.dataset} methods",
        }

    def _net(self) -> nn.Module:
        return Net(self.inputs, self.width)


def _split(options: Options) -> Partitioner:
    return SPLITS[str(options["split"])]


SETTINGS: Mapping[str, Setting] = {
    "digits": Setting(
        "digits",
        64,
        32,
        nodes=20,
        target=0.8,
        options={
            "rounds": 20,
            "cohort": "fixed",
            "cohort-size": 8.0,
            "learning-rate": 0.05,
            "batch-size": 16,
            "local-epochs": 5,
            "client-eval-every": 5,
        },
    ),
    "fashion-mnist": Setting(
        "fashion-mnist",
        784,
        100,
        nodes=100,
        target=0.8,
        options={
            "rounds": 100,
            "cohort": "fixed",
            "cohort-size": 10.0,
            "learning-rate": 0.05,
            "batch-size": 32,
            "local-epochs": 5,
            "client-eval-every": 20,
        },
    ),
}
"""By the names that `--data` has."""


def setting_named(name: str) -> Setting:
    """Raises:
    ConfigError: there is none of that name.
    """
    if name not in SETTINGS:
        raise ConfigError(f"--data is {name!r}; it can be {', '.join(SETTINGS)}")
    return SETTINGS[name]
