"""Options by chance alone, from the operating system's entropy, as a private search draws them."""

import math
from typing import Any

from umbel.privacy.noise.entropy import Entropy


class Chance:
    """Picks values without looking at any result; see `umbel.deliver.search.space.Trial`.

    Args:
        entropy: another source, for tests.
    """

    def __init__(self, entropy: Entropy | None = None) -> None:
        self._entropy = Entropy() if entropy is None else entropy

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:  # noqa: ARG002
        """A number of the range."""
        share = self._uniform()
        if log:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return low + share * (high - low)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number of the range, ends included."""
        if log:
            return min(high, max(low, round(self.suggest_float(name, low, high, log=True))))
        return low + min(high - low, int(self._uniform() * (high - low + 1)))

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:  # noqa: ARG002
        """One of these."""
        return choices[min(len(choices) - 1, int(self._uniform() * len(choices)))]

    def _uniform(self) -> float:
        return (int(self._entropy.words64(1)[0]) >> 11) / (1 << 53)
