"""Exact draws from a distribution over whole numbers, by a table of 128 bits an entry.

The cumulative probabilities are kept in two words each. A draw compares 64 random bits with the
upper words by binary search; only when they are equal, once in 2^64 draws an entry, does it
look at 64 bits more. The distance to the law that the table was made of is below entries x 2^-128
(rounding) plus the mass beyond its ends.

Not constant-time: a search touches memory in an order that depends on the noise. The node that
draws it knows its own update anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.privacy.noise.entropy import Entropy

Integers = np.ndarray[Any, np.dtype[np.int64]]

BITS = 128
_CHUNK = 1 << 16


@dataclass(frozen=True)
class IntegerTable:
    """Cumulative probabilities of the values lowest, lowest + 1, ...

    Attributes:
        lowest: the smallest value.
        upper: shape (values - 1,), uint64, the upper words of P(X <= value) x 2^128.
        lower: the lower words.
        tv: total-variation distance of a draw to the exact law is at most this.
    """

    lowest: int
    upper: np.ndarray[Any, np.dtype[np.uint64]]
    lower: np.ndarray[Any, np.dtype[np.uint64]]
    tv: float

    @staticmethod
    def symmetric(half: Sequence[int], beyond: float) -> "IntegerTable":
        """The table of a law symmetric about zero.

        Args:
            half: proportional to the probabilities of 0, 1, ..., K.
            beyond: at most this much mass lies outside -K .. K.
        """
        whole = half[0] + 2 * sum(half[1:])
        below, running = [], 0
        for weight in reversed(half[1:]):  # P(X <= -K), ..., P(X <= -1)
            running += weight
            below.append((running << BITS) // whole)
        one = 1 << BITS
        # P(X <= k) = 1 - P(X <= -k - 1), and P(X <= 0) = 1 - P(X <= -1).
        cumulative = below + [one - mass for mass in reversed(below)]
        # Where the mass above rounds to nothing, the value above is never drawn.
        kept = [mass for mass in cumulative if mass < one]
        raw = b"".join(mass.to_bytes(16, "little") for mass in kept)
        words = np.frombuffer(raw, "<u8").reshape(-1, 2)
        return IntegerTable(
            lowest=-(len(half) - 1),
            upper=words[:, 1].copy(),
            lower=words[:, 0].copy(),
            tv=len(cumulative) * 2.0**-BITS + beyond,
        )

    def sample(self, size: int, entropy: Entropy) -> Integers:
        """Independent draws, shape (size,)."""
        out = np.empty(size, np.int64)
        for start in range(0, size, _CHUNK):
            words = entropy.words64(min(_CHUNK, size - start))
            found = np.searchsorted(self.upper, words, side="right")
            tied = np.flatnonzero(self.upper[np.maximum(found, 1) - 1] == words)
            for place in tied:
                found[place] = self._settle(int(words[place]), int(entropy.words64(1)[0]))
            out[start : start + len(words)] = found
        out += self.lowest
        return out

    def _settle(self, first: int, second: int) -> int:
        """How many entries are at most first x 2^64 + second."""
        word = np.uint64(first)
        begin = int(np.searchsorted(self.upper, word, side="left"))
        end = int(np.searchsorted(self.upper, word, side="right"))
        low = np.uint64(second)
        return begin + int(np.searchsorted(self.lower[begin:end], low, side="right"))
