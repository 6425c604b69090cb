"""What values an option may have, said once at its field: checked from there and listed from there.

    rounds: int = option(10, at_least(1))

`check_limits` refuses what is outside with a sentence; `umbel options` prints the same limits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.options import Options, checked, dashed
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

    def refusal(self, name: str, value: bool | int | float | str) -> str:
        """The sentence for a value that is not admitted."""
        hint = f" ({self.hint})" if self.hint else ""
        if self.choices or self.kind:
            return f"{name} is {value!r}; it can be {self.words()}{hint}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}; it must be finite{hint}"
        return f"{name} is {value}; it must be {self.words()}{hint}"


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


def _problems(settings: Any) -> Iterator[str]:
    for name, limit in limits_of(settings).items():
        value = getattr(settings, name.replace("-", "_"))
        if not limit.admits(value):
            yield limit.refusal(name, value)


def check_values(kind: Any, options: Options, *, registers: bool) -> None:
    """Look at each option alone: its type and its limit, not what options are together.

    Args:
        kind: a group of options; names of others are left alone.
        options: some of a run.
        registers: parts may still be registered, so an unknown name of one may be good.

    Raises:
        ConfigError: the first value that no run can have.
    """
    limits = limits_of(kind)
    for name, default in kind.defaults().items():
        if name not in options:
            continue
        value = checked(name, options[name], default)
        limit = limits.get(name)
        if limit is None or (registers and limit.kind) or limit.admits(value):
            continue
        raise ConfigError(limit.refusal(name, value))
