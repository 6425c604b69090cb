"""Files that people have, as inputs of a model: images, tables, arrays, texts, sounds, folders.

Whatever is wrong is said with the file's name, and the row where there are rows. Tables are read
in pieces, so that one may be larger than the memory.
"""

import csv
import io
import itertools
import json
import wave
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umbel.clients.data.inputs import Columns, Inputs, Letters, Pixels, Plain, Samples
from umbel.core.errors import ConfigError
from umbel.deliver.extras import needed

Array = np.ndarray[Any, Any]
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
TABLES = (".csv", ".parquet")
KNOWN = (*IMAGES, *TABLES, ".npy", ".txt", ".wav", ".json")
PIECE = 1024
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Piece:
    """Some inputs.

    Attributes:
        names: of each: a file, or a row of one.
        x: as the model takes them, shape (n, ...).
    """

    names: Sequence[str]
    x: Array


def read_inputs(path: Path, inputs: Inputs) -> Iterator[Piece]:
    """The inputs in a file, or in all files of a folder, in the order of their names.

    Args:
        path: a file or a folder.
        inputs: what the model takes.

    Raises:
        ConfigError: there is no such file, or what is in it does not fit the model.
    """
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in KNOWN]
        if not files:
            raise ConfigError(
                f"{path} holds no file that could be an input; known are {', '.join(KNOWN)}"
            )
        yield from _joined(itertools.chain.from_iterable(_read(one, inputs) for one in files))
        return
    if not path.is_file():
        raise ConfigError(f"there is no file or folder {path}; name one with inputs for the model")
    yield from _read(path, inputs)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of many small files put together."""
    names: list[str] = []
    arrays: list[Array] = []
    for piece in pieces:
        names += piece.names
        arrays.append(piece.x)
        if len(names) >= PIECE:
            yield Piece(names, np.concatenate(arrays))
            names, arrays = [], []
    if names:
        yield Piece(names, np.concatenate(arrays))


def _read(file: Path, inputs: Inputs) -> Iterator[Piece]:
    kind = file.suffix.lower()
    if kind not in KNOWN:
        raise ConfigError(
            f"{file} ends in {kind or 'nothing'}, which is no known kind of input; known are "
            f"{', '.join(KNOWN)}"
        )
    try:
        if kind == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as text:
                yield from _table(str(file), csv.DictReader(text), inputs)
        elif kind == ".parquet":
            yield from _parquet(file, inputs)
        else:
            ready = parse(file.read_bytes(), kind, inputs)
            many = len(ready) > 1
            yield Piece(
                [f"{file}:{row + 1}" if many else str(file) for row in range(len(ready))], ready
            )
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if str(file) in said else f"{file}: {said}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file} cannot be read as {kind}: {error}") from error


def parse(content: bytes, kind: str, inputs: Inputs) -> Array:
    """The inputs in the bytes of one file, as the model takes them, shape (n, ...).

    Args:
        content: of the file, whole.
        kind: its ending, one of `KNOWN` but ".parquet".
        inputs: what the model takes.

    Raises:
        ConfigError: they are no such file, or do not fit the model.
    """
    if not content:
        raise ConfigError("the file is empty; give a file with at least one input")
    if kind in IMAGES:
        return image(content, inputs)[None]
    if kind == ".npy":
        return _array(content, inputs)
    if kind == ".wav":
        return _sound(content, inputs)[None]
    if kind == ".csv":
        text = io.StringIO(_decoded(content), newline="")
        pieces = list(_table("", csv.DictReader(text), inputs))
        return np.concatenate([piece.x for piece in pieces])
    if kind == ".json":
        return from_json(content, inputs)
    lines = [line for line in _decoded(content).splitlines() if line.strip()]
    if not isinstance(inputs, Letters):
        raise ConfigError(f"a text was given, but the model takes {_what(inputs)}")
    if not lines:
        raise ConfigError("the file is empty; give a text, one input a line")
    return inputs.ready_all(lines)


def from_json(content: bytes, inputs: Inputs) -> Array:
    """What `{"inputs": [...]}` says, as the model takes it.

    Raises:
        ConfigError: it is no such JSON, or does not fit the model.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'this is no JSON ({error}); give {{"inputs": [...]}}') from error
    if not isinstance(value, Mapping) or not isinstance(value.get("inputs"), list):
        raise ConfigError('this JSON has no list "inputs"; give {"inputs": [...]}, one each')
    if not value["inputs"]:
        raise ConfigError('the list "inputs" is empty; give at least one input')
    return inputs.ready_all(value["inputs"])


def image(content: bytes, inputs: Inputs) -> Array:
    """One image, as the model takes it.

    Raises:
        ConfigError: it is no image, or one of another size than the model's.
    """
    if not isinstance(inputs, Pixels):
        raise ConfigError(f"an image was given, but the model takes {_what(inputs)}")
    pillow = needed("PIL.Image", "reading images")
    try:
        opened = pillow.open(io.BytesIO(content))
    except Exception as error:
        raise ConfigError(f"this is no image that can be read ({type(error).__name__})") from error
    width, height = opened.size  # known from the head: an image of any size is refused unread
    if (height, width) != (inputs.height, inputs.width):
        raise ConfigError(
            f"an image has {width} x {height} pixels, but the model takes {inputs.width} x "
            f"{inputs.height}; scale it first, since how that is done changes what the model sees"
        )
    try:
        pixels = np.asarray(opened.convert("L" if inputs.channels == 1 else "RGB"))
    except Exception as error:
        raise ConfigError(f"this image is damaged ({type(error).__name__}: {error})") from error
    return inputs.ready(pixels)


def _array(content: bytes, inputs: Inputs) -> Array:
    try:
        value: Array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"this is no array of numbers in the form .npy ({error})") from error
    if isinstance(inputs, Letters):
        raise ConfigError(f"an array was given, but the model takes {_what(inputs)}")
    one = len(inputs.shape)
    if isinstance(inputs, Pixels):
        one = 2 if inputs.channels == 1 else 3
    return inputs.ready_all(value[None] if value.ndim == one else value)


def _sound(content: bytes, inputs: Inputs) -> Array:
    if not isinstance(inputs, Samples):
        raise ConfigError(f"a sound was given, but the model takes {_what(inputs)}")
    try:
        with wave.open(io.BytesIO(content)) as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            frames = sound.readframes(min(sound.getnframes(), inputs.length))
    except (wave.Error, EOFError) as error:
        raise ConfigError(f"this is no sound in the form .wav ({error})") from error
    if rate != inputs.rate:
        raise ConfigError(
            f"a sound has {rate} samples a second, but the model takes {inputs.rate}; resample it"
        )
    if width != 2:
        raise ConfigError(f"a sound has {8 * width} bits a sample; give 16 bits")
    samples = np.frombuffer(frames, "<i2").reshape(-1, channels)
    return inputs.ready(samples.mean(1) / 32768)


def _parquet(file: Path, inputs: Inputs) -> Iterator[Piece]:
    parquet = needed("pyarrow.parquet", "reading Parquet", "parquet")
    try:
        opened = parquet.ParquetFile(file)
    except Exception as error:
        raise ConfigError(f"{file} cannot be read as Parquet: {error}") from error
    rows = (row for batch in opened.iter_batches(batch_size=PIECE) for row in batch.to_pylist())
    yield from _table(str(file), rows, inputs)


def _table(name: str, rows: Iterable[Mapping[str, Any]], inputs: Inputs) -> Iterator[Piece]:
    start = 0
    iterator = iter(rows)
    while piece := list(itertools.islice(iterator, PIECE)):
        names = [f"{name}:{start + place + 1}" for place in range(len(piece))]
        try:
            ready = _of_rows(piece, inputs)
        except ConfigError as error:
            for place, row in enumerate(piece):  # which of them it is
                try:
                    _of_rows([row], inputs)
                except ConfigError as one:
                    raise ConfigError(f"row {start + place + 1}: {one}") from error
            raise
        yield Piece(names, ready)
        start += len(piece)
    if start == 0:
        raise ConfigError(
            "the table is empty: it has no row below its head; give at least one input"
        )


def _of_rows(rows: Sequence[Mapping[str, Any]], inputs: Inputs) -> Array:
    if isinstance(inputs, Columns):
        return inputs.ready_all(rows)
    if isinstance(inputs, Letters):
        column = "text" if "text" in rows[0] else next(iter(rows[0]))
        return inputs.ready_all([str(row[column]) for row in rows])
    shape: tuple[int, ...] = inputs.shape
    if isinstance(inputs, Pixels):
        shape = (inputs.height, inputs.width, inputs.channels)
    size = int(np.prod(shape))
    short = next((row for row in rows if len(row) != size or None in row.values()), None)
    if short is not None:
        raise ConfigError(
            f"a row has {len(short)} values, but an input of the model has {size} "
            f"({' x '.join(map(str, shape))}); give one column for each"
        )
    flat = np.asarray([_numbers(row) for row in rows])
    return inputs.ready_all(flat.reshape(len(rows), *shape))


def _numbers(row: Mapping[str, Any]) -> list[float]:
    found = []
    for name, value in row.items():
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            raise ConfigError(f"the column {name!r} holds {value!r}, which is no number") from None
    return found


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"this text is not in UTF-8 (byte {error.start})") from error


def _what(inputs: Inputs) -> str:
    match inputs:
        case Pixels():
            return f"images of {inputs.width} x {inputs.height} pixels"
        case Columns():
            return f"rows of {len(inputs.names)} numbers"
        case Letters():
            return "texts"
        case Samples():
            return f"sounds of {inputs.rate} samples a second"
        case Plain():
            return f"arrays of the shape {' x '.join(map(str, inputs.shape))}"
