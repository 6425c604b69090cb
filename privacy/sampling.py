"""Choosing a cohort with the randomness that the accountant assumes.

Amplification by sampling holds only while the adversary cannot know who was drawn, so the draw
takes its bits from the operating system, like noise does.
"""

import secrets
from typing import Any

import numpy as np

from umbel.privacy.entropy import Entropy
from umbel.privacy.validate import fraction


def poisson_sample(
    population: int, rate: float, entropy: Entropy | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each of `population` positions with probability `rate`, independently; ascending.

    The probability is `rate` rounded down to a multiple of 2**-64, never above it.

    Raises:
        ValueError: the rate is not above 0 and at most 1.
    """
    if fraction(rate=rate) == 1:
        return np.arange(population)
    words = (entropy or Entropy()).words64(population)
    return np.flatnonzero(words < np.uint64(int(rate * 2.0**64)))


def uniform_subset(
    positions: np.ndarray[Any, np.dtype[np.int64]], size: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`size` of `positions`, every subset equally likely; ascending. All, if there are fewer."""
    if len(positions) <= size:
        return positions
    chosen = secrets.SystemRandom().sample(range(len(positions)), size)
    kept: np.ndarray[Any, np.dtype[np.int64]] = positions[np.sort(chosen)]
    return kept
