"""Batches of a node's examples: which rows make a step, and how rows become tensors.

Arrays are indexed directly, without a `DataLoader`: one gather a batch. Inputs arrive at the
model in the type it computes in: real numbers as its own floating type, and `uint8` as pixels,
scaled from 0..255 to 0..1. Other integers arrive as int64 where the model takes them so (token
ids, categories), else as real numbers (16-bit images, counts), if those hold them exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from umbel.clients.at_rest.rows import StoredRows
from umbel.clients.data.arrays import plain_array
from umbel.clients.data.examples import ArrayLike, Examples
from umbel.clients.local_settings import LocalSettings
from umbel.clients.pytorch.rows import PAIR, RowReader, is_hugging_face
from umbel.core.errors import ConfigError

SHUFFLE = 0x5DEECE66D
"""Sets the stream of shuffles apart from that of dropout, which starts from the same seed."""

RESIDENT_BYTES = 1 << 28
"""Arrays up to this size are moved to an accelerator whole, larger ones batch by batch."""


Mixed = Callable[[torch.Generator], Iterator[Tensor]]
"""An epoch's rows in a mixed order, piece by piece."""


def plan(
    size: int, settings: LocalSettings, seed: int, *, least: int = 1, mixed: Mixed | None = None
) -> Iterator[Tensor | None]:
    """The rows of each step, in order; None is all rows (a full batch needs no shuffle).

    Every epoch is a fresh permutation, and its last batch may be short. A last batch of fewer
    than `least` examples joins the one before it.

    Args:
        size: number of examples.
        settings: batch size, epochs and steps.
        seed: of the shuffles.
        least: the smallest batch that the model can be trained on (2 with batch norm).
        mixed: draws the order of an epoch; a random permutation if None.
    """
    batch = settings.batch_size or size
    generator = torch.Generator().manual_seed((seed ^ SHUFFLE) & ((1 << 63) - 1))
    cuts = list(range(0, size, batch))
    if len(cuts) > 1 and size - cuts[-1] < least:
        cuts.pop()
    sizes = [end - start for start, end in zip(cuts, [*cuts[1:], size], strict=True)]
    steps = settings.local_steps or settings.local_epochs * len(cuts)
    for done in range(0, steps, len(cuts)):
        if len(cuts) == 1:
            yield None
            continue
        if mixed is None:
            pieces = iter([torch.randperm(size, generator=generator)])
        else:
            pieces = mixed(generator)
        yield from _cut(pieces, sizes[: steps - done])


def _cut(pieces: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Rows that come in pieces, as batches of these sizes."""
    waiting = next(pieces)
    start = 0
    for size in sizes:
        while len(waiting) - start < size:
            waiting, start = torch.cat([waiting[start:], next(pieces)]), 0
        yield waiting[start : start + size]
        start += size


class Source(Protocol):
    """Examples that can be asked for by row."""

    @property
    def size(self) -> int:
        """How many examples there are."""
        ...

    @property
    def mixed(self) -> Mixed | None:
        """The order of an epoch; None where any order is as quick as another."""
        ...

    def batch(self, rows: Tensor | None) -> tuple[Any, Any]:
        """Inputs and targets of `rows`, or of all; as stored, not yet in the model's type."""
        ...


def open_source(
    examples: Any,
    device: torch.device,
    target: str = "",
    names: tuple[str, ...] | None = None,
) -> Source:
    """What a node's `data` function returned, as a source of batches.

    Args:
        examples: `Examples`, a pair of arrays, or a Dataset; see `umbel.clients.pytorch.rows`.
        device: where the batches will be needed.
        target: the key of the target in rows that are dicts.
        names: of the model's arguments, for such rows; None if it takes any.

    Raises:
        ConfigError: it is none of these, or it is empty.
    """
    source: Source
    if isinstance(examples, tuple) and len(examples) == 2:
        examples = Examples(*examples)
    if isinstance(examples, Examples):
        source = ArraySource(
            _stored(examples.x, device, "inputs"), _stored(examples.y, device, "targets")
        )
    elif isinstance(examples, StoredRows):
        source = StreamSource(examples)
    else:
        _refuse_others(examples)
        source = DatasetSource(RowReader.of(examples, target, names))
    if source.size == 0:
        raise ConfigError("a node has no examples; every node needs at least one")
    return source


def _refuse_others(examples: Any) -> None:
    kind, cure = type(examples).__name__, "give Examples(x, y) or a Dataset; " + PAIR
    if isinstance(examples, str | bytes):
        raise ConfigError(
            f"a node's examples are the text {examples[:80]!r}; read what it names, and {cure}"
        )
    if isinstance(examples, Mapping):
        keys = ", ".join(map(str, examples))
        raise ConfigError(
            f"a node's examples are a dict with the keys {keys}; give one data set of it, or "
            "Examples(x, y) of two of its arrays"
        )
    frame = hasattr(examples, "columns") and not is_hugging_face(examples)
    if frame:
        raise ConfigError(
            f"a node's examples are a {kind}; give Examples(frame[inputs].to_numpy(), "
            "frame[target].to_numpy())"
        )
    if not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
        raise ConfigError(
            f"a node's examples are a {kind}, not a data set that has a length; {cure}"
        )


@dataclass(frozen=True)
class ArraySource:
    """Two aligned arrays: tensors, or NumPy arrays where torch cannot share their memory."""

    x: ArrayLike
    y: ArrayLike

    @property
    def size(self) -> int:
        return int(self.x.shape[0])

    @property
    def mixed(self) -> Mixed | None:
        return None

    def batch(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return rows_of(self.x, rows), rows_of(self.y, rows)


@dataclass(frozen=True)
class DatasetSource:
    """Any map-style Dataset, row by row."""

    rows: RowReader

    @property
    def size(self) -> int:
        return len(self.rows.dataset)

    @property
    def mixed(self) -> Mixed | None:
        return None

    def batch(self, rows: Tensor | None) -> tuple[Any, Any]:
        return self.rows.batch(range(self.size) if rows is None else rows.tolist())


@dataclass(frozen=True)
class StreamSource:
    """Rows that are read from where they lie while they are trained on."""

    rows: StoredRows

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def mixed(self) -> Mixed | None:
        return self._mixed

    def _mixed(self, generator: torch.Generator) -> Iterator[Tensor]:
        seed = int(torch.randint(1 << 62, (), generator=generator))
        return map(torch.from_numpy, self.rows.order(np.random.default_rng(seed)))

    def batch(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if rows is None and self.rows.bytes > self.rows.memory:
            raise ConfigError(
                f"{self.rows.who} has {self.size:,} rows of {self.rows.bytes:,} bytes, more than "
                f"memory={self.rows.memory:,}, and a batch of all of them was asked for; set "
                "batch-size, or raise memory"
            )
        wanted = np.arange(self.size) if rows is None else rows.numpy()
        found = self.rows.take(wanted)
        return rows_of(found.x, None), rows_of(found.y, None)


def whole_source(source: Source, who: str) -> Source:
    """The source, for somebody who takes rows from anywhere at any time.

    Raises:
        ConfigError: its rows are read one after another.
    """
    if source.mixed is not None:
        raise ConfigError(
            f"{who} takes every batch from all of a node's {source.size:,} records, and these are "
            "too many to be held in memory; raise memory=... of the stored data"
        )
    return source


@dataclass(frozen=True)
class RealSource:
    """A source whose integers (but pixels) the model takes as real numbers only.

    Attributes:
        stored: where the batches come from.
        real: the floating type that the model computes in.
    """

    stored: Source
    real: torch.dtype

    @property
    def size(self) -> int:
        return self.stored.size

    @property
    def mixed(self) -> Mixed | None:
        return self.stored.mixed

    def batch(self, rows: Tensor | None) -> tuple[Any, Any]:
        x, y = self.stored.batch(rows)
        return as_real(x, self.real), y


def holds_integers(value: Any) -> bool:
    """Whether inputs have integers that are no pixels."""
    if isinstance(value, Tensor):
        return not (
            value.is_floating_point()
            or value.is_complex()
            or value.dtype in (torch.bool, torch.uint8)
        )
    if isinstance(value, Mapping):
        return any(map(holds_integers, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_integers, value))


def as_real(value: Any, real: torch.dtype) -> Any:
    """Inputs with their integers as real numbers; pixels (uint8) stay as they are.

    Raises:
        ConfigError: an integer that the type cannot hold exactly.
    """
    if isinstance(value, dict):
        return {name: as_real(item, real) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_real(item, real) for item in value]
    if not holds_integers(value):
        return value
    if value.dtype.itemsize > 2 or real.itemsize < 4:
        largest = int(value.abs().max()) if value.numel() else 0
        exact = int(2 / torch.finfo(real).eps)
        if largest > exact:
            raise ConfigError(
                f"the inputs hold whole numbers up to {largest}, and the model computes in "
                f"{str(real).removeprefix('torch.')}, which is exact up to {exact} only; scale "
                "them, or make real numbers of them"
            )
    return value.to(real)


def _stored(array: Any, device: torch.device, what: str) -> ArrayLike:
    """The array as a tensor that shares its memory where that is possible."""
    array = plain_array(array, what)
    if isinstance(array, np.ndarray):
        if not array.dtype.isnative or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
            array = array.astype(array.dtype.kind + str(min(8, array.dtype.itemsize)))
        # torch can index few of the unsigned types; a batch of them is converted.
        indexed = array.dtype.kind != "u" or array.dtype.itemsize == 1
        if indexed and array.flags.writeable and all(step >= 0 for step in array.strides):
            array = torch.from_numpy(array)
    else:
        array = _signed(array)
    if device.type != "cpu" and array.nbytes <= RESIDENT_BYTES:
        return rows_of(array, None).to(device)
    result: ArrayLike = array
    return result


def rows_of(array: ArrayLike, rows: Tensor | None) -> Tensor:
    """Some rows of an array, or all of them, as a tensor; all of a tensor are not copied."""
    if isinstance(array, Tensor):
        return array if rows is None else array.index_select(0, rows.to(array.device))
    return _signed(torch.from_numpy(np.array(array) if rows is None else array[rows.numpy()]))


def _signed(value: Tensor) -> Tensor:
    """Unsigned numbers of 16 bits and more in the next signed type, which torch computes with."""
    if value.dtype == torch.uint16:
        return value.to(torch.int32)
    if value.dtype == torch.uint64:
        value = value.view(torch.int64)
        if value.numel() and int(value.min()) < 0:
            raise ConfigError("the examples hold whole numbers of 2^63 and more; scale them down")
        return value
    return value.to(torch.int64) if value.dtype == torch.uint32 else value


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


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The floating type of a model whose parameters are of this type, complex ones included."""
    return dtype.to_real() if dtype.is_complex else dtype


def _compute_type(value: Tensor, real: torch.dtype) -> torch.dtype:
    if value.is_floating_point() or value.dtype == torch.bool:
        return real
    return real.to_complex() if value.is_complex() else torch.int64


def to_device(value: Any, device: torch.device) -> Any:
    """Targets on the model's device, in their own type."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value
