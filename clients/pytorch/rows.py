"""Rows of a map-style data set: what one holds, and how several become a batch.

    (input, target)                     as PyTorch's own data sets give them
    ((a, b), target)                    several inputs: the model's arguments
    ({"name": a, ...}, target)          several inputs by name
    {"name": a, ..., "label": target}   rows of tables and of Hugging Face: one key is the target

Whatever is something else is refused by the row's number, because the words of the library that
would stumble over it name neither the row nor the cure.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import default_collate

from umbel.core.errors import ConfigError, UmbelError, described

TARGETS = ("labels", "label")
"""What Hugging Face calls the target of a row, the first that is there."""

PAIR = "a row is (input, target), several inputs are ((a, b), target) or ({'name': a}, target)"


def names_of(module: nn.Module) -> tuple[str, ...] | None:
    """The arguments of a module's `forward`; None where it takes any by name."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def is_hugging_face(examples: Any) -> bool:
    """Whether this is a `datasets.Dataset`, known by what it can do: that package is not needed."""
    return all(hasattr(examples, name) for name in ("column_names", "features", "with_format"))


@dataclass(frozen=True)
class RowReader:
    """Takes rows of a data set apart and puts batches together.

    Attributes:
        dataset: the rows.
        target: the key of the target in rows that are dicts; empty where nobody named it.
        names: of the model's arguments; None if it takes any.
    """

    dataset: Any
    target: str = ""
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, dataset: Any, target: str, names: tuple[str, ...] | None) -> "RowReader":
        """The rows of a data set; those of Hugging Face come as tensors, their target by name."""
        if not is_hugging_face(dataset):
            return cls(dataset, target, names)
        if not target:
            target = next((name for name in TARGETS if name in dataset.column_names), "")
        kind = (getattr(dataset, "format", None) or {}).get("type")
        plain = dataset.with_format("numpy") if kind is None else dataset
        return cls(plain, target, names)

    def batch(self, wanted: Sequence[int]) -> tuple[Any, Any]:
        """Inputs and targets of these rows, as tensors.

        Raises:
            ConfigError: a row cannot be read, or the rows do not make a batch.
        """
        pairs = [self._pair(row) for row in wanted]
        inputs = _collated([x for x, _ in pairs], wanted, "input")
        return inputs, _collated([y for _, y in pairs], wanted, "target")

    def _pair(self, number: int) -> tuple[Any, Any]:
        try:
            row = self.dataset[number]
        except UmbelError:
            raise
        except Exception as error:
            raise ConfigError(
                f"row {number} of a node's data set cannot be read: {described(error)}"
            ) from error
        if isinstance(row, Mapping):
            return self._by_name(row)
        if isinstance(row, tuple | list) and len(row) == 2:
            return row[0], row[1]
        many = isinstance(row, tuple | list)
        what = type(row).__name__ + (f" of {len(row)} values" if many else " alone")
        raise ConfigError(f"row {number} of a node's data set is a {what}; {PAIR}")

    def _by_name(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """A row that is a dict, as inputs by name and the target."""
        keys = ", ".join(map(str, row))
        if not self.target:
            raise ConfigError(
                f"a row of a node's data set is a dict with the keys {keys}; say which of them is "
                "the target, as in TorchTrainer(..., target='label')"
            )
        if self.target not in row:
            raise ConfigError(
                f"a row of a node's data set has no {self.target!r}, which is to be the target; "
                f"its keys are {keys}"
            )
        inputs = {n: _plain(value) for n, value in row.items() if n != self.target}
        if self.names is not None and not inputs.keys() <= set(self.names):
            taken = {n: value for n, value in inputs.items() if n in self.names}
            numbers = [value for value in inputs.values() if not _is_text(value)]
            if not taken and len(numbers) == 1:
                return numbers[0], _plain(row[self.target])
            if not taken:
                raise ConfigError(
                    f"a row of a node's data set has the keys {keys}, of which the model takes "
                    f"none: its arguments are {', '.join(self.names)}; rename the columns"
                )
            inputs = taken
        return inputs, _plain(row[self.target])


def _plain(value: Any) -> Any:
    """A list of numbers as an array: a row of a table is one value, not several."""
    if isinstance(value, list) and value and not _is_text(value[0]):
        try:
            return np.asarray(value)
        except ValueError:
            return value
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


def _collated(values: list[Any], rows: Sequence[int], what: str) -> Any:
    """Values of several rows as tensors with an axis more."""
    _refuse_texts(values[0], rows[0], what)
    try:
        return default_collate(values)
    except Exception as error:
        raise ConfigError(_why_not(values, rows, what, error)) from error


def _refuse_texts(value: Any, row: int, what: str) -> None:
    parts = value.items() if isinstance(value, Mapping) else [("", value)]
    if isinstance(value, tuple | list):
        parts = [("", part) for part in value]
    for name, part in parts:
        if _is_text(part):
            which = f" {name!r}" if name else ""
            cure = (
                "number the classes, in the same order on every node"
                if what == "target"
                else "turn it into numbers, such as tokens of a fixed vocabulary"
            )
            raise ConfigError(f"the {what}{which} of row {row} is the text {part[:40]!r}; {cure}")


def _why_not(values: list[Any], rows: Sequence[int], what: str, error: Exception) -> str:
    """Which row does not fit, as far as that can be seen."""
    shapes = [_shape(value) for value in values]
    for row, shape, value in zip(rows, shapes, values, strict=True):
        if shape is None:
            return (
                f"the {what} of row {row} is a {type(value).__name__}, of which no tensor can be "
                "made; give numbers, arrays or tensors"
            )
        if shape != shapes[0]:
            return (
                f"the rows are unequal: the {what} of row {row} has {_words(shape)}, that of row "
                f"{rows[0]} has {_words(shapes[0])}; pad or crop them to one shape"
            )
    return f"the {what}s of rows {rows[0]} to {rows[-1]} make no batch: {described(error)}"


def _words(shape: Any) -> str:
    return f"the shape {shape}" if isinstance(shape, tuple) else f"the shapes {shape}"


def _shape(value: Any) -> Any:
    """The shape of a value, or of each of its parts; None where it has none."""
    if isinstance(value, Mapping):
        return {name: _shape(part) for name, part in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        fits = isinstance(value, Tensor) or value.dtype.kind in "biufc"
        return tuple(value.shape) if fits else None
    if isinstance(value, list | tuple):
        parts = [_shape(part) for part in value]
        return None if None in parts else parts
    return () if isinstance(value, bool | int | float | complex | np.number) else None


def first_shape(value: Any) -> str:
    """`float32 (8, 4)`: what a batch is made of, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{n}: {first_shape(part)}" for n, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(first_shape, value)) + "]"
    return type(value).__name__
