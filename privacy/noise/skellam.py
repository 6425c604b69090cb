"""Skellam noise: the difference of two Poisson variables, for sums that nobody sees in parts.

The sum of Skellam variables is a Skellam variable whose variance is the sum of theirs, so the
noise of a secure sum is known exactly whoever drops out (Agarwal, Kairouz and Liu 2021). Units
are steps of the grid throughout.

Renyi divergence of orders alpha = 2, 3, ... for a shift by an integer vector (their Theorem 3.5):

    alpha l2^2 / (2 mu) + min( ((2 alpha - 1) l2^2 + 6 l1) / (4 mu^2),  3 l1 / (2 mu) )

with mu the variance of the whole noise. An integer vector of length l2 has l1 <= l2^2, and any
vector l1 <= sqrt(size) l2.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from dp_accounting import DpEvent

from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.integer_table import Integers, IntegerTable
from umbel.privacy.validate import positive

_WIDTH = 14.5
"""Standard deviations that a table reaches to: beyond is less than 2^-130 of the mass."""
_BEYOND = 2.0**-130
_GUARD = 192
"""Bits with which the recurrence starts; its relative error stays below entries x 2^-192."""
_FINE = 256
"""A variance is rounded up to a multiple of 1/256, so that the recurrence divides exactly."""
LARGEST_DEVIATION = 1 << 15
"""Wider noise is drawn as the sum of several draws, which for Skellam noise is exact."""


@dataclass(frozen=True)
class SkellamDpEvent(DpEvent):  # type: ignore[misc]  # dp-accounting has no types
    """One release of an integer sum with Skellam noise.

    Attributes:
        variance: of the noise in steps^2.
        l2: the longest contribution in steps.
        l1: the largest sum of absolute values of a contribution in steps.
    """

    variance: float
    l2: float
    l1: float

    def rdp(self, order: int) -> float:
        """Renyi divergence of a whole order from 2 on."""
        mu, square = self.variance, self.l2**2
        first = ((2 * order - 1) * square + 6 * self.l1) / (4 * mu**2)
        return order * square / (2 * mu) + min(first, 3 * self.l1 / (2 * mu))


def skellam_event(variance: float, l2: float, size: int) -> SkellamDpEvent:
    """The event for contributions of `size` whole numbers of length at most `l2`.

    Raises:
        ValueError: a value that is not a finite number above 0.
    """
    positive(variance=variance)
    positive(l2=l2)
    return SkellamDpEvent(variance, l2, min(l2**2, math.sqrt(size) * l2))


def sample_skellam(variance: float, size: int, entropy: Entropy) -> Integers:
    """Skellam noise, shape (size,), int64, of at least this variance (by less than 1/256).

    Raises:
        ValueError: the variance is not a finite number above 0.
    """
    positive(variance=variance)
    draws = max(1, math.ceil(variance / LARGEST_DEVIATION**2))
    table = skellam_table(_round_up(variance / draws))
    noise = table.sample(size, entropy)
    for _ in range(draws - 1):
        noise += table.sample(size, entropy)
    return noise


def skellam_slack(variance: float) -> float:
    """Total-variation distance of one draw to the exact law."""
    draws = max(1, math.ceil(variance / LARGEST_DEVIATION**2))
    return draws * (2 * _WIDTH * math.sqrt(variance / draws) + 122) * 2.0**-128 + draws * _BEYOND


def _round_up(variance: float) -> Fraction:
    return Fraction(math.ceil(variance * _FINE), _FINE)


@functools.lru_cache(maxsize=4)
def skellam_table(variance: Fraction) -> IntegerTable:
    """P(k) = exp(-mu) I_k(mu) by Miller's backward recurrence in whole numbers.

    I_(k-1) = I_(k+1) + (2 k / mu) I_k is stable downwards, and what it is started with does not
    matter where k is small (Abramowitz and Stegun 1964, section 9.12).
    """
    last = math.ceil(_WIDTH * math.sqrt(variance)) + 60
    above, weight = 0, 1 << _GUARD
    weights = []
    for k in range(last + 20, 0, -1):
        if k <= last:
            weights.append(weight)
        above, weight = weight, above + 2 * k * variance.denominator * weight // variance.numerator
    weights.append(weight)
    return IntegerTable.symmetric(weights[::-1], _BEYOND)
