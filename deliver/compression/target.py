"""What a small model should reach: `size<1MB accuracy>0.84 latency<1ms`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umbel.core.errors import ConfigError

UNITS: Mapping[str, Mapping[str, float]] = {
    "size": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "": 1},
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1, "": 1},
}
"""Of `size` in bytes, of `latency` in seconds; metrics have none."""
_ONE = re.compile(r"([A-Za-z_][\w-]*)(<=|>=|<|>)([0-9.]+(?:e[+-]?\d+)?)([A-Za-z%]*)")


@dataclass(frozen=True)
class Condition:
    """One bound.

    Attributes:
        name: "size", "latency", or a metric.
        below: whether the value must be below the bound, or above.
        bound: in bytes, seconds, or the metric's own unit.
    """

    name: str
    below: bool
    bound: float

    def misses(self, values: Mapping[str, float]) -> float:
        """By how much of the bound it is missed; 0 where it is met."""
        value = values[self.name]
        over = value - self.bound if self.below else self.bound - value
        return max(0.0, over / max(abs(self.bound), 1e-12))


def conditions(text: str, metrics: Sequence[str]) -> list[Condition]:
    """What a target asks for.

    Args:
        text: conditions with spaces between them.
        metrics: that the model is judged by.

    Raises:
        ConfigError: something that is no condition, or about a value that nobody measures.
    """
    known = (*UNITS, *metrics)
    found = []
    for part in text.split():
        match = _ONE.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"--target has {part!r}; write conditions such as 'size<1MB accuracy>0.84'"
            )
        name, sign, number, unit = match.groups()
        if name not in known:
            raise ConfigError(f"--target asks for {name!r}; what is measured is {', '.join(known)}")
        units = UNITS.get(name, {"": 1, "%": 0.01})
        if unit.lower() not in units:
            raise ConfigError(
                f"--target has the unit {unit!r} of {name}; it can be "
                f"{', '.join(one for one in units if one)}, or none"
            )
        found.append(Condition(name, sign[0] == "<", float(number) * units[unit.lower()]))
    if not found:
        raise ConfigError("--target is empty; write conditions such as 'size<1MB accuracy>0.84'")
    return found
