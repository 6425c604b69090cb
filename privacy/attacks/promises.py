"""Whether noise and sampling are what is claimed: tests that can say no, with a stated error.

    deviation_ceiling    how large the noise is at most, from what two runs do not share
    shift_floor          how far one unit moves the result at least
    gaussian_loss        the epsilon that both come to
    participation        how often each unit was drawn, against the rate that is claimed

A one-run audit assumes nothing and finds little: half of the noise is within what it cannot see.
These tests assume the form of the mechanism (normal noise, independent draws) and so see a tenth
of a difference. The probability that a correct mechanism fails is `FALSE_ALARM` at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from umbel.privacy.attacks.audit import EPSILON_LIMIT, Scores
from umbel.privacy.noise.gaussian import gaussian_epsilon

FALSE_ALARM = 1e-7
"""Of each test, where the mechanism is correct."""


def deviation_ceiling(one: Scores, two: Scores, false_alarm: float = FALSE_ALARM) -> float:
    """The largest standard deviation of normal noise that explains how two runs differ.

    What both runs have in common cancels, the noise does not; so noise that is the same in both
    counts as none. With 3,000 coordinates the ceiling is 7 % above the estimate.

    Args:
        one: shape (n,), what a run released.
        two: shape (n,), what the same run released another time.
        false_alarm: probability that the true deviation is larger.

    Raises:
        ValueError: shapes differ, or nothing was released.
    """
    if one.shape != two.shape or one.size == 0:
        raise ValueError(f"two releases of shapes {one.shape} and {two.shape} cannot be compared")
    squares = float(np.square((one - two) / math.sqrt(2)).sum())
    return math.sqrt(squares / float(stats.chi2.ppf(false_alarm, one.size)))


def shift_floor(scores: Scores, deviation: float, false_alarm: float = FALSE_ALARM) -> float:
    """The smallest mean of normal scores with this deviation that explains their average."""
    reach = float(stats.norm.isf(false_alarm)) * deviation / math.sqrt(len(scores))
    return float(np.mean(scores)) - reach


def gaussian_loss(deviation: float, shift: float, delta: float) -> float:
    """Epsilon at `delta` of normal noise where one unit moves the result by `shift`."""
    if deviation <= 0:
        return EPSILON_LIMIT
    return min(EPSILON_LIMIT, gaussian_epsilon(deviation / shift, delta))


@dataclass(frozen=True)
class Drawn:
    """What the draws of several rounds look like beside their claim.

    Attributes:
        p_value: probability of a result as odd as this or odder, under the claim; over all units.
        odd: the units that were drawn too often or too rarely to be chance.
        words: what is odd, for people; empty where nothing is.
    """

    p_value: float
    odd: tuple[int, ...]
    words: str


def participation(
    drawn: NDArray[np.bool_], rate: float, *, fixed: bool, false_alarm: float = FALSE_ALARM
) -> Drawn:
    """Exact binomial tests of who was drawn, each at its share of the false alarm.

    Each unit's rounds are Binomial(rounds, rate) under Poisson sampling and under sampling of a
    fixed number; under Poisson sampling so are all draws together, and the sizes of rounds vary.

    Args:
        drawn: shape (rounds, units).
        rate: that is claimed.
        fixed: every round has the same number.
        false_alarm: of all tests together.

    Raises:
        ValueError: no rounds, or a rate that is none.
    """
    rounds, units = drawn.shape
    if rounds == 0 or not 0 < rate <= 1:
        raise ValueError(f"{rounds} rounds at a rate of {rate} say nothing")
    share = false_alarm / 2
    counts = drawn.sum(axis=0)
    each = np.array([_binomial(int(count), rounds, rate) for count in counts])
    odd = tuple(int(unit) for unit in np.flatnonzero(each * units < share))
    if odd:
        shown = ", ".join(f"{unit} in {counts[unit]}" for unit in odd[:5])
        words = f"of {rounds} rounds, unit {shown} at a claimed rate of {rate:.3g}"
        return Drawn(float(each.min() * units), odd, words)
    if fixed:
        return Drawn(min(1.0, float(each.min() * units)), (), "")
    whole = _binomial(int(counts.sum()), rounds * units, rate)
    sizes = drawn.sum(axis=1)
    same = _all_equal(sizes, units, rate)
    if whole < share / 2:
        words = f"{counts.sum() / rounds:.2f} units a round, where {rate * units:.2f} are claimed"
        return Drawn(whole, (), words)
    if same < share / 2:
        return Drawn(
            same, (), f"every round has {sizes[0]} units, which independent draws have not"
        )
    return Drawn(min(1.0, float(each.min() * units), 2 * whole), (), "")


def rounds_needed(rate: float, units: int, *, least: int = 8, most: int = 60) -> int:
    """Rounds after which a unit that is always drawn stands out, where `most` are enough."""
    if rate >= 1:
        return least
    wanted = math.log(FALSE_ALARM / (4 * units)) / math.log(rate) + 1
    return int(min(most, max(least, math.ceil(wanted))))


def _binomial(count: int, trials: int, rate: float) -> float:
    """Two-sided p-value: twice the smaller tail."""
    below = float(stats.binom.cdf(count, trials, rate))
    above = float(stats.binom.sf(count - 1, trials, rate))
    return min(1.0, 2 * min(below, above))


def _all_equal(sizes: Sequence[int] | NDArray[np.int64], units: int, rate: float) -> float:
    """How likely so many independent rounds have one size, if they have; 1 if they have not."""
    if rate >= 1 or len(set(map(int, sizes))) > 1:
        return 1.0
    masses = stats.binom.pmf(np.arange(units + 1), units, rate)
    return float(np.sum(masses ** len(sizes)))
