"""Batches of a node's examples: which rows make a step, and how rows become tensors.

Arrays are indexed directly, without a `DataLoader`: one gather a batch. Inputs arrive at the
model in the type it computes in: real numbers as its own floating type, integers as int64, and
`uint8` as pixels, scaled from 0..255 to 0..1. (Token ids come in a wider integer type.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from umbel.clients.data.examples import ArrayLike, Examples
from umbel.clients.pytorch.settings import TorchSettings
from umbel.strategies.errors import ConfigError

SHUFFLE = 0x5DEECE66D
"""Sets the stream of shuffles apart from that of dropout, which starts from the same seed."""

RESIDENT_BYTES = 1 << 28
"""Arrays up to this size are moved to an accelerator whole, larger ones batch by batch."""


def plan(
    size: int, settings: TorchSettings, seed: int, *, least: int = 1
) -> Iterator[Tensor | None]:
    """The rows of each step, in order; None is all rows (a full batch needs no shuffle).

    Every epoch is a fresh permutation, and its last batch may be short. A last batch of fewer
    than `least` examples joins the one before it.

    Args:
        size: number of examples.
        settings: batch size, epochs and steps.
        seed: of the shuffles.
        least: the smallest batch that the model can be trained on (2 with batch norm).
    """
    batch = settings.batch_size or size
    generator = torch.Generator().manual_seed((seed ^ SHUFFLE) & ((1 << 63) - 1))
    cuts = list(range(0, size, batch))
    if len(cuts) > 1 and size - cuts[-1] < least:
        cuts.pop()
    edges = [*cuts, size]
    steps = settings.local_steps or settings.local_epochs * len(cuts)
    for done in range(0, steps, len(cuts)):
        if len(cuts) == 1:
            yield None
            continue
        order = torch.randperm(size, generator=generator)
        for step in range(min(len(cuts), steps - done)):
            yield order[edges[step] : edges[step + 1]]


class Source(Protocol):
    """Examples that can be asked for by row."""

    @property
    def size(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, rows: Tensor | None) -> tuple[Any, Any]:
        """Inputs and targets of `rows`, or of all; as stored, not yet in the model's type."""
        ...


def open_source(examples: Any, device: torch.device) -> Source:
    """What a node's `data` function returned, as a source of batches.

    Args:
        examples: `Examples`, a pair of arrays, or a Dataset of (input, target) pairs.
        device: where the batches will be needed.

    Raises:
        ConfigError: it is none of these, or it is empty.
    """
    source: Source
    if isinstance(examples, tuple) and len(examples) == 2:
        examples = Examples(*examples)
    if isinstance(examples, Examples):
        source = ArraySource(_stored(examples.x, device), _stored(examples.y, device))
    elif hasattr(examples, "__getitem__") and hasattr(examples, "__len__"):
        source = DatasetSource(examples)
    else:
        raise ConfigError(
            f"a node's examples are a {type(examples).__name__}; give Examples(x, y) or a "
            "Dataset of (input, target) pairs that has a length"
        )
    if source.size == 0:
        raise ConfigError("a node has no examples; every node needs at least one")
    return source


@dataclass(frozen=True)
class ArraySource:
    """Two aligned arrays: tensors, or NumPy arrays where torch cannot share their memory."""

    x: ArrayLike
    y: ArrayLike

    @property
    def size(self) -> int:
        return int(self.x.shape[0])

    def batch(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return rows_of(self.x, rows), rows_of(self.y, rows)


@dataclass(frozen=True)
class DatasetSource:
    """Any map-style Dataset of (input, target) pairs, collated as `DataLoader` does."""

    dataset: "Dataset[Any]"

    @property
    def size(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # open_source saw its length

    def batch(self, rows: Tensor | None) -> tuple[Any, Any]:
        wanted = range(self.size) if rows is None else rows.tolist()
        x, y = default_collate([self.dataset[row] for row in wanted])
        return x, y


def _stored(array: Any, device: torch.device) -> ArrayLike:
    """The array as a tensor that shares its memory where that is possible."""
    if not isinstance(array, Tensor):
        array = np.asarray(array) if not isinstance(array, np.ndarray) else array
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"a node's examples hold values of type {array.dtype}; give numbers")
        if not array.dtype.isnative or array.dtype.itemsize > 8:
            array = array.astype(array.dtype.kind + str(min(8, array.dtype.itemsize)))
        if array.flags.writeable and all(step >= 0 for step in array.strides):
            array = torch.from_numpy(array)
    if device.type != "cpu" and array.nbytes <= RESIDENT_BYTES:
        return rows_of(array, None).to(device)
    return array  # type: ignore[no-any-return]


def rows_of(array: ArrayLike, rows: Tensor | None) -> Tensor:
    """Some rows of an array, or all of them, as a tensor; all of a tensor are not copied."""
    if isinstance(array, Tensor):
        return array if rows is None else array.index_select(0, rows.to(array.device))
    return torch.from_numpy(np.array(array) if rows is None else array[rows.numpy()])


def to_model(value: Any, device: torch.device, real: torch.dtype) -> Any:
    """Inputs on the model's device and in its type; lists, tuples and mappings item by item."""
    if isinstance(value, Tensor):
        if value.dtype == torch.uint8:
            return value.to(device).to(real).div_(255)
        return value.to(device, _compute_type(value, real))
    if isinstance(value, dict):
        return {name: to_model(item, device, real) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_model(item, device, real) for item in value]
    return value


def _compute_type(value: Tensor, real: torch.dtype) -> torch.dtype:
    if value.is_floating_point() or value.dtype == torch.bool:
        return real
    return value.dtype if value.is_complex() else torch.int64


def to_device(value: Any, device: torch.device) -> Any:
    """Targets on the model's device, in their own type."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value
