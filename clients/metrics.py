"""Numbers by name that functions of users return, and their means over batches.

A metric that a batch does not have (recall without a positive, an AUC of one class: NaN, or left
out) is averaged over the examples of those batches that have it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from umbel.core.errors import ConfigError


def named_numbers(returned: Any, who: str) -> dict[str, float]:
    """What a function of metrics returned, as plain numbers.

    Args:
        returned: a mapping of names to numbers, or scalar tensors or arrays.
        who: the function, for messages.

    Raises:
        ConfigError: it is none, or a value is no single number.
    """
    if not isinstance(returned, Mapping):
        raise ConfigError(
            f"{who} returned {_short(returned)}; return a dict of names to numbers, {{}} for none"
        )
    numbers = {}
    for name, value in returned.items():
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            numbers[str(name)] = float(value)
        except Exception:
            raise ConfigError(
                f"{who} returned {name!r} as {_short(value)}; a metric is one number, NaN where "
                "it is not defined"
            ) from None
    return numbers


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + " ..."


@dataclass
class Means:
    """Weighted means by name, each over the batches that have a value.

    NaN is no value; a metric that no batch has stays NaN, so that it is seen to be missing.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, mean: float, weight: float) -> None:
        """Take in one batch's mean."""
        known = weight > 0 and not math.isnan(mean)
        self.sums[name] = self.sums.get(name, 0.0) + (mean * weight if known else 0.0)
        self.weights[name] = self.weights.get(name, 0.0) + (weight if known else 0.0)

    def result(self) -> dict[str, float]:
        """The means."""
        return {
            name: total / self.weights[name] if self.weights[name] else math.nan
            for name, total in self.sums.items()
        }
