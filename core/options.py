"""How options are read and checked; each group of them says what there is, in a dataclass."""

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from umbel.core.errors import ConfigError

Value = bool | int | float | str
Options = Mapping[str, Value]


LARGEST = 10**18
"""No whole number among the options is beyond this: nodes receive them as 64-bit integers."""
FORMER: Mapping[str, str] = {
    "tau": "adaptive-epsilon",
    "federated-every": "client-eval-every",
    "federated-nodes": "client-eval-nodes",
    "keep": "keep-model",
}
"""Options under the names that they had in earlier releases, and today's."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def shown(value: object) -> str:
    """A value as a person writes it in `-c`: `true` rather than Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def dashed(name: str) -> str:
    """A field's name as an option."""
    return name.replace("_", "-")


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under today's names.

    Raises:
        ConfigError: one is given under both of its names, with two values.

    >>> renamed({"tau": 0.5, "rounds": 3})
    {'adaptive-epsilon': 0.5, 'rounds': 3}
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        today = FORMER.get(name, name)
        if today != name and options.get(today, value) != value:
            raise ConfigError(
                f"{name} and {today} are one option, with two values; give {today} alone"
            )
        result[today] = value
    return result


def renaming_notes(options: Mapping[str, Any]) -> list[str]:
    """A sentence for each option that is given under its former name."""
    return [
        f"the option {name} is now called {FORMER[name]}; the former name is still understood"
        for name in options
        if name in FORMER
    ]


def choose(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`; else a ConfigError that lists them."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it can be {', '.join(allowed)}")
    return value


@dataclass(frozen=True)
class OptionGroup:
    """Options that belong together; a dataclass made of this has them as fields with defaults."""

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Every option with its default."""
        return {dashed(field.name): field.default for field in fields(cls)}  # type: ignore[misc]  # all have one

    def changed(self) -> dict[str, Value]:
        """The options that are others than their defaults."""
        own = {name: getattr(self, name.replace("-", "_")) for name in self.defaults()}
        return {name: own[name] for name, before in self.defaults().items() if own[name] != before}

    @classmethod
    def read(cls, options: Options) -> Self:
        """The group with what a run says of it; other names in the mapping are left alone.

        Raises:
            ConfigError: a value has the wrong type, or the group refuses it.
        """
        own = cls.defaults()
        options = renamed(options)
        return cls(
            **{
                name.replace("-", "_"): checked(name, value, own[name])
                for name, value in options.items()
                if name in own
            }
        )


def checked(name: str, value: Any, default: Value) -> Value:
    """`value` in the type of `default`: an int is a float too, nothing else is converted.

    Raises:
        ConfigError: another type, or NaN. Infinity is a number: no budget, no bound.
    """
    kind = type(default)
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ConfigError(
            f"{name} is {value}; a whole number has at most 18 digits, because it travels to the "
            "nodes in 64 bits"
        )
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{name} is {shown(value)}, but it must be {_WORDS[kind]}, such as {shown(default)}"
        )
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name} is NaN; give a number, such as {default!r}")
    return value


def parse(texts: Iterable[str]) -> dict[str, Value]:
    """What `-c "rounds=5 recipe=quick"` says, as TOML values; a bare word is a text.

    A text that ends in `.toml` is a file of options. Later values win.

    Raises:
        ConfigError: something that is not `name=value`, or a file that cannot be read.
    """
    options: dict[str, Value] = {}
    for text in texts:
        if text.strip().endswith(".toml") and "=" not in text:
            options |= flatten(read_toml(Path(text.strip())))
            continue
        pairs = re.findall(r"([^\s=]+)\s*=\s*('[^']*'|\"[^\"]*\"|\S+)", text)
        left = re.sub(r"([^\s=]+)\s*=\s*('[^']*'|\"[^\"]*\"|\S+)", "", text).strip()
        if left:
            raise ConfigError(f"{left!r} is not name=value; write for example -c 'rounds=5 seed=1'")
        options |= {name: _value(name, value) for name, value in pairs}
    return options


def _value(name: str, text: str) -> Value:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(
            f"{name} is {text}, in which a backslash makes a control character; write it in single "
            "quotes, where a backslash is only itself"
        )
    return value if isinstance(value, bool | int | float | str) else text


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file in UTF-8, with or without the mark that Windows editors put first.

    Raises:
        ConfigError: it cannot be read; the sentence names the file and what is wrong with it.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} cannot be read: it is not in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested tables as dotted names, the way Flower does it.

    Raises:
        ConfigError: a value that is neither a table nor a bool, number or text.
    """
    flat: dict[str, Value] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = value
        else:
            raise ConfigError(
                f"the option {prefix + name} is {value!r}; options are true or false, numbers and "
                "texts"
            )
    return flat


def override(known: Options, changes: Options) -> dict[str, Value]:
    """`known` with `changes`, each of a known name and of that option's type.

    Raises:
        ConfigError: an unknown name (with the closest known one), or a wrong type.
    """
    result = dict(known)
    for name, value in changes.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"there is no option {name!r}; {hint}")
        result[name] = checked(name, value, known[name])
    return result
