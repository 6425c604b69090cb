"""From what people have (a photograph, a row of a table, a text) to what a model takes.

    Pixels(28, 28, mean=(0.286,), std=(0.353,))     an image file
    Columns(("age", "weight"), mean, std)           a row of numbers, by the names of its columns
    Letters("abc...", length=80)                    a text, letter by letter
    Samples(rate=8000, length=8000)                 a sound
    Plain((30,), "float32")                         an array that is ready

A model without this is numbers that nobody can use: so an app says it, an export carries it as
JSON, and whoever serves the model does the same steps. Nothing here needs torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Plain:
    """An array that the model takes as it is.

    Attributes:
        shape: of one example.
        dtype: "float32", "int64", or "uint8" for bytes, which reach the model divided by 255.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    KIND: ClassVar[str] = "array"

    @property
    def model_dtype(self) -> str:
        """Of what the model takes."""
        return "int64" if self.dtype == "int64" else "float32"

    def ready(self, value: Any) -> Array:
        """One example, of shape `shape`.

        Raises:
            ConfigError: another shape, or no numbers.
        """
        found: Array = self.ready_all(as_numbers(value)[None])[0]
        return found

    def ready_all(self, values: Any) -> Array:
        """Examples of shape (n, *shape), in the model's type.

        Raises:
            ConfigError: another shape, or no numbers.
        """
        array = as_numbers(values)
        if array.shape[1:] != self.shape:
            raise ConfigError(
                f"an input has the shape {_shape(array.shape[1:])}, but the model takes "
                f"{_shape(self.shape)}; give inputs of that shape"
            )
        return _typed(array, self.dtype)


@dataclass(frozen=True)
class Pixels:
    """An image.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: 1 is grey, 3 is red, green, blue; they come first in what the model takes.
        mean: of the pixels (0 to 1) that is taken off, one a channel.
        std: that they are divided by then, one a channel.
        flat: whether the model takes a row of height x width x channels numbers.
    """

    height: int
    width: int
    channels: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flat: bool = False
    KIND: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (1, self.channels):
                raise ConfigError(
                    f"Pixels has {len(value)} values of {name} for {self.channels} channels; give "
                    "one for each, or one for all"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        whole = (self.channels, self.height, self.width)
        return (math.prod(whole),) if self.flat else whole

    @property
    def model_dtype(self) -> str:
        """Of what the model takes."""
        return "float32"

    def ready(self, value: Any) -> Array:
        """An image of bytes, (height, width) or (height, width, channels), as the model takes it.

        Raises:
            ConfigError: another size, or other values than bytes.
        """
        found: Array = self.ready_all(as_numbers(value)[None])[0]
        return found

    def ready_all(self, values: Any) -> Array:
        """Images of bytes, (n, height, width) or (n, height, width, channels).

        Raises:
            ConfigError: another size, or other values than bytes.
        """
        pixels = as_numbers(values)
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.shape[1:] != (self.height, self.width, self.channels):
            raise ConfigError(
                f"an image has the size {_shape(pixels.shape[1:])}, but the model takes images of "
                f"{self.height} x {self.width} pixels in {_colours(self.channels)}; scale it first"
            )
        if pixels.dtype != np.uint8:
            whole = pixels.dtype.kind in "iub" or bool((pixels == np.floor(pixels)).all())
            if not (whole and pixels.min() >= 0 and pixels.max() <= 255):
                raise ConfigError(
                    "an image holds values that are no whole numbers from 0 to 255; give its "
                    "pixels as they are in the file"
                )
        scaled = pixels.astype(np.float32)
        scaled *= (1 / (255 * np.asarray(self.std, np.float64))).astype(np.float32)
        scaled -= (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)
        first = np.ascontiguousarray(np.moveaxis(scaled, -1, 1))
        return first.reshape(len(first), -1) if self.flat else first


@dataclass(frozen=True)
class Columns:
    """A row of numbers.

    Attributes:
        names: of the columns, in the model's order.
        mean: that is taken off each; none is 0.
        std: that each is divided by then; none is 1.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    KIND: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (0, len(self.names)):
                raise ConfigError(
                    f"Columns has {len(value)} values of {name} for {len(self.names)} columns; "
                    "give one for each, or none"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return (len(self.names),)

    @property
    def model_dtype(self) -> str:
        """Of what the model takes."""
        return "float32"

    def ready(self, value: Any) -> Array:
        """One row: numbers in the order of the columns, or a mapping of names to numbers.

        Raises:
            ConfigError: a column is missing, unknown, or no number.
        """
        found: Array = self.ready_all([value])[0]
        return found

    def ready_all(self, values: Any) -> Array:
        """Rows of shape (n, columns), or mappings of names to numbers.

        Raises:
            ConfigError: a column is missing, unknown, or no number.
        """
        if isinstance(values, Sequence) and len(values) and isinstance(values[0], Mapping):
            values = [self._ordered(row) for row in values]
        rows = as_numbers(values)
        if rows.ndim != 2 or rows.shape[1] != len(self.names):
            raise ConfigError(
                f"a row has {rows.shape[1] if rows.ndim == 2 else _shape(rows.shape[1:])} values, "
                f"but the model takes {len(self.names)}: {_listed(self.names)}"
            )
        rows = rows.astype(np.float64)
        if not np.isfinite(rows).all():
            at = int(np.argwhere(~np.isfinite(rows))[0][1])
            raise ConfigError(
                f"the column {self.names[at]!r} holds a value that is no finite number; fill it "
                "or leave that row out"
            )
        if self.mean:
            rows = rows - np.asarray(self.mean)
        if self.std:
            rows = rows / np.asarray(self.std)
        return rows.astype(np.float32)

    def _ordered(self, row: Mapping[str, Any]) -> list[Any]:
        missing = [name for name in self.names if name not in row]
        if missing:
            raise ConfigError(
                f"the column {missing[0]!r} is missing ({len(missing)} of {len(self.names)} are); "
                f"the model takes {_listed(self.names)}"
            )
        return [row[name] for name in self.names]


@dataclass(frozen=True)
class Letters:
    """A text as the numbers of its letters.

    Attributes:
        alphabet: the letters; the first is number 1, and 0 is every other one and the filling.
        length: of what the model takes; a longer text keeps its end, a shorter one is filled up
            in front.
    """

    alphabet: str
    length: int
    KIND: ClassVar[str] = "text"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return (self.length,)

    @property
    def model_dtype(self) -> str:
        """Of what the model takes."""
        return "int64"

    def ready(self, value: Any) -> Array:
        """One text.

        Raises:
            ConfigError: it is no text.
        """
        if not isinstance(value, str):
            raise ConfigError(f"an input is a {type(value).__name__}, but the model takes a text")
        number = {letter: place + 1 for place, letter in enumerate(self.alphabet)}
        ids = [number.get(letter, 0) for letter in value[-self.length :]]
        return np.asarray([0] * (self.length - len(ids)) + ids, np.int64)

    def ready_all(self, values: Any) -> Array:
        """Texts, as (n, length)."""
        return np.stack([self.ready(value) for value in values])


@dataclass(frozen=True)
class Samples:
    """A sound of one channel.

    Attributes:
        rate: samples a second; a sound of another rate is refused, not resampled.
        length: of what the model takes; a longer sound is cut, a shorter one filled up with zeros.
    """

    rate: int
    length: int
    KIND: ClassVar[str] = "sound"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return (self.length,)

    @property
    def model_dtype(self) -> str:
        """Of what the model takes."""
        return "float32"

    def ready(self, value: Any) -> Array:
        """Samples from -1 to 1, one after another.

        Raises:
            ConfigError: more than one channel.
        """
        samples = as_numbers(value).astype(np.float32)
        if samples.ndim != 1:
            raise ConfigError(
                f"a sound has the shape {_shape(samples.shape)}, but the model takes one channel"
            )
        return np.pad(samples[: self.length], (0, max(0, self.length - len(samples))))

    def ready_all(self, values: Any) -> Array:
        """Sounds, as (n, length)."""
        return np.stack([self.ready(value) for value in values])


Inputs = Plain | Pixels | Columns | Letters | Samples
_KINDS: Mapping[str, type[Inputs]] = {
    kind.KIND: kind for kind in (Plain, Pixels, Columns, Letters, Samples)
}


def to_json(inputs: Inputs) -> dict[str, Any]:
    """As a JSON object that `from_json` turns back into the same value."""
    return {"kind": inputs.KIND, **asdict(inputs)}


def from_json(value: Mapping[str, Any]) -> Inputs:
    """What `to_json` wrote.

    Raises:
        ConfigError: it is something else.
    """
    kind = _KINDS.get(str(value.get("kind")))
    known = {field.name for field in fields(kind)} if kind is not None else set()
    if kind is None or value.keys() - {"kind"} != known:
        raise ConfigError(
            f"{dict(value)!r} says nothing about inputs that this version knows; it knows the "
            f"kinds {', '.join(_KINDS)}"
        )
    make: Any = kind  # the fields are those of this kind, and their values are as written
    made: Inputs = make(
        **{
            name: tuple(part) if isinstance(part, list) else part
            for name, part in value.items()
            if name != "kind"
        }
    )
    return made


def as_numbers(value: Any) -> Array:
    """A list or an array of numbers as an array.

    Raises:
        ConfigError: a text among them, rows of unequal length, or nothing at all.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind in "US":
            array = array.astype(np.float64)
    except (ValueError, TypeError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"an input is {_short(value)}, which is no array of numbers; give numbers in rows of "
            "one length"
        )
    if array.size == 0:
        raise ConfigError("an input is empty; give at least one example")
    return array


def _typed(array: Array, dtype: str) -> Array:
    if dtype == "int64":
        whole = array.astype(np.int64)
        if (whole != array).any():
            raise ConfigError("an input holds broken numbers, but the model takes whole ones")
        return whole
    real = array.astype(np.float32)
    if dtype == "uint8":
        real /= 255
    if not np.isfinite(real).all():
        raise ConfigError(
            "an input holds a value that is no finite number; fill it or leave it out"
        )
    return real


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "of one number"


def _colours(channels: int) -> str:
    return {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(names[:6])
    return few if len(names) <= 6 else f"{few} and {len(names) - 6} more"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
