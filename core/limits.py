"""What values an option may have, said once at its field: checked from there and listed from there.

    rounds: int = option(10, at_least(1))

`check_limits` refuses what is outside with a sentence; `umbel options` prints the same limits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.options import OptionGroup, Options, Value, checked, dashed, renamed
from umbel.core.registry import is_known, names

_KEY = "umbel.limit"


@dataclass(frozen=True)
class Limit:
    """The values that an option may have.

    Attributes:
        least: the smallest number.
        most: the largest number.
        without_least: `least` itself is excluded.
        without_most: `most` itself is excluded.
        infinite: infinity is a value too (no budget, no bound).
        choices: the only texts; empty where any will do.
        kind: the kind of part whose names are the only texts, besides `choices`; see
            `umbel.core.registry`.
        hint: what to do instead, added to the refusal.
    """

    least: float = -math.inf
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False
    infinite: bool = False
    choices: tuple[str, ...] = ()
    kind: str = ""
    hint: str = ""

    def admits(self, value: bool | int | float | str) -> bool:
        """Whether an option may have this value."""
        if isinstance(value, str):
            if value in self.choices or not (self.choices or self.kind):
                return True
            return bool(self.kind) and is_known(self.kind, value)
        if math.isinf(value):
            return self.infinite and value > 0
        low = value > self.least if self.without_least else value >= self.least
        high = value < self.most if self.without_most else value <= self.most
        return low and high

    def words(self) -> str:
        """The limit as the rest of "it must be ..." or "it can be ..."."""
        if self.choices or self.kind:
            return ", ".join((*(names(self.kind) if self.kind else ()), *self.choices))
        if math.isfinite(self.least) and math.isfinite(self.most):
            if not (self.without_least or self.without_most):
                return f"from {self.least:g} to {self.most:g}"
            if not self.without_least:
                return f"from {self.least:g} up to {self.most:g}"
            return f"between {self.least:g} and {self.most:g}"
        if math.isfinite(self.least):
            return f"{'above' if self.without_least else 'at least'} {self.least:g}"
        return "any" if self.infinite else "finite"


def at_least(least: float, hint: str = "") -> Limit:
    """Finite numbers from `least` up."""
    return Limit(least=least, hint=hint)


def above(least: float, *, infinite: bool = False, hint: str = "") -> Limit:
    """Numbers larger than `least`."""
    return Limit(least=least, without_least=True, infinite=infinite, hint=hint)


def up_to_one(*, without_zero: bool = False, hint: str = "") -> Limit:
    """Numbers below 1, from 0 up or above it."""
    return Limit(0, 1, without_least=without_zero, without_most=True, hint=hint)


def one_of(*choices: str) -> Limit:
    """These texts only."""
    return Limit(choices=choices)


def named(kind: str, *choices: str) -> Limit:
    """The names of the parts of a kind, and these texts."""
    return Limit(choices=choices, kind=kind)


def option(default: bool | int | float | str, limit: Limit) -> Any:
    """A dataclass field with a default, and with the values that it may have."""
    return field(default=default, metadata={_KEY: limit})


def limits_of(kind: Any) -> dict[str, Limit]:
    """The limits of a dataclass's fields (or of an instance's), by option name."""
    return {dashed(f.name): f.metadata[_KEY] for f in fields(kind) if _KEY in f.metadata}


def check_limits(settings: Any) -> None:
    """Refuse values that an option may not have.

    Args:
        settings: an instance of a dataclass whose fields are made by `option`.

    Raises:
        ConfigError: the first value that is outside its limit, with what it may be.
    """
    for problem in _problems(settings):
        raise ConfigError(problem)


def check_alone(group: type[OptionGroup], options: Options) -> None:
    """Refuse what can be refused of a group's options one by one, before anything is imported.

    What goes together is left to the group, and the names of parts to where the app is there,
    which may bring its own.

    Args:
        group: the dataclass.
        options: any; names that the group does not have are left alone.

    Raises:
        ConfigError: as `check_limits`, or a value of another type.
    """
    defaults, limits = group.defaults(), limits_of(group)
    for name, value in renamed(options).items():
        if name in defaults:
            right = checked(name, value, defaults[name])
            if name in limits and not limits[name].kind and not limits[name].admits(right):
                raise ConfigError(_problem(name, right, limits[name]))


def _problems(settings: Any) -> Iterator[str]:
    for name, limit in limits_of(settings).items():
        value = getattr(settings, name.replace("-", "_"))
        if not limit.admits(value):
            yield _problem(name, value, limit)


def _problem(name: str, value: Value, limit: Limit) -> str:
    hint = f" ({limit.hint})" if limit.hint else ""
    if limit.choices or limit.kind:
        return f"{name} is {value!r}; it can be {limit.words()}{hint}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}; it must be finite{hint}"
    return f"{name} is {value}; it must be {limit.words()}{hint}"
