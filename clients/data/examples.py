"""A node's data: what the `data` function of a federation returns.

    @federation.data ...        data(node, options) -> Split

`Examples` are two aligned arrays; a `torch.utils.data.Dataset` of (input, target) pairs is
accepted by the torch trainer as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from umbel.core.errors import ConfigError

ArrayLike = np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class Examples:
    """Inputs and targets of equal length.

    Attributes:
        x: inputs, first axis is the example.
        y: targets, first axis is the example.

    Raises:
        ConfigError: the lengths differ.
    """

    x: ArrayLike
    y: ArrayLike

    def __post_init__(self) -> None:
        inputs, targets = _length(self.x, "x"), _length(self.y, "y")
        if inputs != targets:
            raise ConfigError(
                f"examples need as many targets as inputs, but there are {inputs} inputs "
                f"and {targets} targets; give one target for each input"
            )

    def __len__(self) -> int:
        return _length(self.x, "x")

    def take(self, rows: Any) -> "Examples":
        """The examples at `rows` (indices, a slice or a mask)."""
        return Examples(self.x[rows], self.y[rows])


def _length(values: Any, name: str) -> int:
    """The size of the first axis; sparse arrays of SciPy have one, but no `len`."""
    shape = getattr(values, "shape", None)
    if shape is None and hasattr(values, "__len__"):
        return len(values)
    if not shape:
        raise ConfigError(
            f"{name} of Examples is a {type(values).__name__} without a first axis; give an "
            "array, a tensor or a list, one row for each example"
        )
    return int(shape[0])


@dataclass(frozen=True)
class Shares(Examples):
    """Examples of several nodes, one node's after another's.

    Attributes:
        each: how many a node has.
    """

    each: int = 1


def each_of(examples: Any) -> int:
    """How many examples a node has in a batch of several nodes' examples."""
    return examples.each if isinstance(examples, Shares) else 1


@dataclass(frozen=True)
class Split:
    """A node's training examples and, if it keeps some apart, its own test examples."""

    train: Any
    test: Any = None


@runtime_checkable
class ChecksNodes(Protocol):
    """A `data` function that can tell beforehand whether so many nodes get their examples."""

    def check(self, nodes: int, options: Mapping[str, bool | int | float | str]) -> None:
        """Raises:
        ConfigError: they do not, with the cure.
        """
        ...


@dataclass(frozen=True)
class Node:
    """Who is asking for data.

    Attributes:
        partition: which part of a partitioned data set is this node's, from 0.
        partitions: how many parts there are.
        config: the node's own configuration, as given to `umbel client --node-config`.
    """

    partition: int
    partitions: int
    config: Mapping[str, bool | int | float | str]
