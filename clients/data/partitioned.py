"""A federation's `data` function for one data set that is divided among its nodes.

Partitioned("fashion-mnist", Dirichlet(0.5))     @federation.data ... written for you
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from umbel.clients.data import datasets
from umbel.clients.data.datasets import DataSet
from umbel.clients.data.examples import ArrayLike, Examples, Node, Split
from umbel.clients.data.inputs import Inputs
from umbel.clients.data.partition import DividesGroups, Iid, Partitioner, Rows, generator_of
from umbel.clients.data.sealed import check_open
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Partitioned:
    """A `data` function: each node gets its part of one data set.

        data = Partitioned("fashion-mnist", Dirichlet(0.5))
        data(node, options)         -> Split(train, test), only this node's rows converted
        data.central_test(options)  -> Examples, for central evaluation

    The split is computed once in a process. A node with too few examples to keep some apart
    (`test_fraction` of them rounds to 0) has no test examples.

    Attributes:
        dataset: a name in the catalogue, a `DataSet`, or a function that returns one.
        partitioner: a partitioner, or a function of the options that returns one.
        test_fraction: the share of a node's examples that it keeps for its own tests.
        transform: turns selected rows into a model's inputs; the data set's `prepare` by default.
        seed: of the split; None takes the option `seed`, else 0.
        arrays: x_train, y_train, x_test, y_test instead of a data set.

    Raises:
        ConfigError: not exactly one of `dataset` and `arrays`, or a fraction outside [0, 1).
    """

    dataset: str | DataSet | Callable[[], DataSet] | None = None
    partitioner: Partitioner | Callable[[Options], Partitioner] = field(default_factory=Iid)
    test_fraction: float = 0.0
    transform: Callable[[Examples], Examples] | None = None
    seed: int | None = None
    arrays: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike] | None = None
    FIXED: ClassVar[bool] = True
    _memory: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.arrays is None):
            raise ConfigError("give Partitioned a dataset or arrays, exactly one of them")
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"test_fraction is {self.test_fraction}; give at least 0 and less than 1"
            )

    @property
    def source(self) -> object:
        """Whose data these are, however they are divided: the name that a budget is kept under."""
        return "arrays" if self.dataset is None else self.dataset

    def __call__(self, node: Node, options: Options) -> Split:
        """The node's examples.

        Raises:
            ConfigError: there is no such part, or the data set cannot be had or divided.
        """
        if not 0 <= node.partition < node.partitions:
            raise ConfigError(
                f"there is no partition {node.partition} of {node.partitions}; "
                f"partition-id counts from 0 to num-partitions - 1"
            )
        rows = self.rows(node.partitions, options)[node.partition]
        kept = int(len(rows) * self.test_fraction + 0.5)
        if kept == len(rows):
            kept -= 1
        if kept == 0:
            return Split(self._ready(rows))
        mixed = generator_of(self._seed(options), node.partition).permutation(rows)
        return Split(self._ready(np.sort(mixed[kept:])), self._ready(np.sort(mixed[:kept])))

    def central_test(self, options: Options) -> Examples:  # noqa: ARG002 - same shape as data
        """The held-out examples, ready for a model; no node trains on them.

        Raises:
            ConfigError: they are locked; see `umbel.clients.data.sealed`.
        """
        check_open()
        if "test" not in self._memory:
            data = self.load()
            self._memory["test"] = (self.transform or data.prepare)(data.test)
        test: Examples = self._memory["test"]
        return test

    def load(self) -> DataSet:
        """The data set that is divided."""
        if "data" not in self._memory:
            self._memory["data"] = self._load()
        data: DataSet = self._memory["data"]
        return data

    def inputs(self) -> Inputs | None:
        """What the data set says of its inputs; None where they are transformed here."""
        return self.load().inputs if self.transform is None else None

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, where the data set has any."""
        return self.load().classes or ()

    def rows(self, partitions: int, options: Options) -> list[Rows]:
        """The rows of the training examples that each node gets, sorted."""
        partitioner = self._partitioner(options)
        key = (partitioner, partitions, self._seed(options))
        known: tuple[Any, list[Rows]] | None = self._memory.get("rows")
        if known is None or known[0] != key:
            data = self.load()
            labels = data.train.y
            grouped = isinstance(partitioner, DividesGroups) and partitioner.by_groups
            if grouped and data.groups is not None:
                labels = data.groups
            known = (key, partitioner.split(labels, partitions, key[2]))
            self._memory["rows"] = known
        return known[1]

    def describe(self, options: Options) -> str:
        """One line for reports."""
        kept = f", {self.test_fraction:.0%} of each node kept for its tests"
        line = f"{self.load().name}, {self._partitioner(options)}"
        return line + kept if self.test_fraction else line

    def _ready(self, rows: Rows) -> Examples:
        data = self.load()
        return (self.transform or data.prepare)(data.train.take(rows))

    def _partitioner(self, options: Options) -> Partitioner:
        if hasattr(self.partitioner, "split"):
            return self.partitioner
        return self.partitioner(options)

    def _seed(self, options: Options) -> int:
        return int(options.get("seed", 0)) if self.seed is None else self.seed

    def _load(self) -> DataSet:
        if self.arrays is not None:
            x_train, y_train, x_test, y_test = self.arrays
            return DataSet("arrays", Examples(x_train, y_train), Examples(x_test, y_test))
        if isinstance(self.dataset, str):
            return datasets.load(self.dataset)
        if isinstance(self.dataset, DataSet):
            return self.dataset
        data = self.dataset() if self.dataset is not None else None
        if not isinstance(data, DataSet):
            raise ConfigError(
                f"the function that Partitioned got gave a {type(data).__name__}; return a DataSet"
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        # Another process computes its own split: quicker than to send this one.
        return {**self.__dict__, "_memory": {}}
