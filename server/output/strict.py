"""Strict JSON for everything that a run writes down.

JSON has no word for infinity or for "not a number". They are written as the texts `"Infinity"`,
`"-Infinity"` and `"NaN"`, as Protocol Buffers write them, and readers here turn those three texts
back into numbers: an infinite epsilon must not turn into "no epsilon". Every reader of JSON in
every language can read the files.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""The texts that stand for the numbers that JSON does not have."""


def dumps(value: Any, *, indent: int | None = None) -> str:
    """One JSON text, in which every number is finite.

    Raises:
        TypeError: a value that is no JSON, no number of numpy or torch, and no path.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def dumps_options(value: Any, *, indent: int | None = None) -> str:
    """One JSON text for what was asked for, in which an infinite option is a number still.

    It is written as `1e999`, which is a JSON number beyond every double: readers with doubles get
    infinity, so an option keeps its type.

    Raises:
        TypeError: as `dumps`.
    """
    mark = "\ue000"  # of the private use area: in nobody's options
    text = json.dumps(_marked(value, mark), indent=indent, allow_nan=False)
    return text.replace(f'"\\ue000{math.inf}"', "1e999").replace(f'"\\ue000{-math.inf}"', "-1e999")


def _marked(value: Any, mark: str) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return f"{mark}{value}"
    if isinstance(value, Mapping):
        return {str(key): _marked(part, mark) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(part, mark) for part in value]
    return plain(value)


def canonical(value: Any) -> str:
    """The one form that is hashed and signed: sorted keys, no spaces, ASCII."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(text: str | bytes) -> Any:
    """The value of a JSON text, infinities and NaN as numbers; older files had them bare.

    Raises:
        ValueError: it is no JSON.
    """
    return revived(json.loads(text))


def loads_strictly(text: str | bytes) -> Any:
    """The value of a JSON text as it stands, texts for infinities left alone.

    Raises:
        ValueError: it is no JSON, has a bare `Infinity` or `NaN`, or names a key twice.
    """
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)


def plain(value: Any) -> Any:
    """The value with only what JSON knows: infinities as texts, paths and numbers of numpy too."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _word(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    scalar = getattr(value, "item", None)
    if callable(scalar) and getattr(value, "ndim", 0) == 0:
        return plain(scalar())
    raise TypeError(f"{type(value).__name__} cannot be written to a run directory: {value!r}")


def revived(value: Any) -> Any:
    """What `plain` was given, as far as infinities and NaN are concerned."""
    if isinstance(value, str):
        return WORDS.get(value, value)
    if isinstance(value, dict):
        return {key: revived(part) for key, part in value.items()}
    return [revived(part) for part in value] if isinstance(value, list) else value


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is not JSON; it is written as a text")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found
