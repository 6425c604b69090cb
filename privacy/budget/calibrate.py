"""From a budget to the noise that meets it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import brentq

from umbel.privacy.budget.accounting import COARSE, FINE, Accountant, poisson, spent
from umbel.privacy.budget.events import Charge
from umbel.privacy.validate import count, inside_unit, positive

MOST = 2.0**20
"""A larger noise multiplier is no plan."""
LEAST = 2.0**-5
"""A smaller one is not searched for: such a budget protects nobody."""

FAR = 0.01
"""Relative difference to the budget beyond which the fine table is searched."""


def noise_multiplier(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    rounds: int,
    *,
    accountant: Accountant = "pld",
) -> float:
    """The smallest noise multiplier whose `rounds` rounds stay within a budget.

    Args:
        epsilon: the budget.
        delta: strictly between 0 and 1.
        sampling_rate: of Poisson sampling; 1 is everyone in every round.
        rounds: planned.
        accountant: `pld` or `rdp`.

    Returns:
        Standard deviation of the noise over the clipping norm, rounded up to six digits.

    Raises:
        ValueError: an argument is out of range, or no noise meets the budget.

    Example:
        >>> round(noise_multiplier(1.0, 1e-5, 0.1, 100), 2)
        3.94
    """
    count(rounds=rounds)

    def plan(multiplier: float) -> Mapping[Charge, int]:
        return {Charge(poisson(multiplier, sampling_rate)): rounds}

    return calibrate(plan, epsilon, delta, accountant=accountant)


def calibrate(
    plan: Callable[[float], Mapping[Charge, int]],
    epsilon: float,
    delta: float,
    *,
    before: Mapping[Charge, int] | None = None,
    accountant: Accountant = "pld",
) -> float:
    """The smallest multiplier for which `plan` and what was spent `before` stay within a budget.

    Args:
        plan: from a multiplier to every planned release.
        epsilon: the budget for both together.
        delta: the same.
        before: releases that happened already.
        accountant: `pld` or `rdp`.

    Raises:
        ValueError: an argument is out of range, or no noise meets the budget.
    """
    positive(epsilon=epsilon)
    inside_unit(delta=delta)
    start = Counter(before or {})

    def over(multiplier: float, interval: float = COARSE) -> float:
        charges = start + Counter(plan(multiplier))
        # Very much noise leaves a privacy loss of nothing, whose logarithm is asked for in vain.
        with np.errstate(divide="ignore"):
            return spent(charges, delta, accountant=accountant, interval=interval).epsilon - epsilon

    high = 1.0
    while over(high) > 0:
        high *= 2
        if high > MOST:
            raise ValueError(_impossible(start, epsilon, delta, accountant))
    low = high / 2
    while high > LEAST and over(low) <= 0:
        high, low = low, low / 2
    if high <= LEAST:
        return high
    root = float(brentq(over, low, high, xtol=1e-5 * low, rtol=1e-5))
    root = _round_up(_finer(over, root, epsilon))
    while over(root, FINE) > 0:
        root = _round_up(root * (1 + 2e-5))
    return root


def _finer(over: Callable[[float, float], float], root: float, epsilon: float) -> float:
    """The root of the coarse table, or that of the fine one where they are far apart.

    Many rounds add up what the coarse table rounds up: a million of them lose a fifth.
    """
    spare = -over(root, FINE)
    if spare < FAR * epsilon:
        return root
    low = root * max(0.5, (epsilon - spare) / epsilon) * (1 - FAR)
    if over(low, FINE) <= 0:
        return low
    found = brentq(over, low, root, args=(FINE,), xtol=5e-4 * root, rtol=5e-4)
    return min(root, float(found) * 1.0005)


def _round_up(value: float) -> float:
    scale = 10.0 ** (5 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


def _impossible(
    before: Mapping[Charge, int], epsilon: float, delta: float, accountant: Accountant
) -> str:
    if before:
        gone = spent(before, delta, accountant=accountant, interval=COARSE).epsilon
        if gone >= epsilon:
            return (
                f"the budget epsilon {epsilon:g} at delta {delta:g} is spent: earlier releases "
                f"cost {gone:.4g}; raise epsilon, or open a new population for other people"
            )
    return (
        f"no noise meets epsilon {epsilon:g} at delta {delta:g} for this plan; raise epsilon or "
        "delta, or plan fewer rounds"
    )
