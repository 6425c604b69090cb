"""Epsilon where a privacy-loss distribution is out of reach: too wide a table, too small a delta.

A table of the privacy loss has a cell every 1e-4, so that noise of a thousandth of the norm, or
ten million rounds, would take tens of gigabytes; and a table is cut where its tails weigh e^-50,
which a smaller delta would have to see. There epsilon is the smaller of two upper bounds:

    Gaussian    the rounds without their sampling, which compose to one release whose curve is
                known in closed form (Balle and Wang 2018); sampling only lowers epsilon
    RDP         with the sampling (Mironov, Talwar and Zhang 2019)
"""

import math
from collections.abc import Mapping

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent

from umbel.privacy.noise.gaussian import gaussian_epsilon

WIDEST_LOSS = 100.0
"""The largest privacy loss of one round that a table is made for."""
LARGEST_EPSILON = 60.0
"""The largest epsilon that a table is made for; beyond it nobody is protected anyway."""
SMALLEST_DELTA = 1e-14
"""The smallest delta that a table whose tails are cut can be asked for."""

LEAST_FOR_RDP = 0.02
"""The smallest noise multiplier whose Renyi series are computed without overflow."""


def multiplier_of(event: DpEvent) -> float | None:
    """The noise multiplier of a plain or Poisson-sampled Gaussian release; None for others."""
    inner = event.event if isinstance(event, PoissonSampledDpEvent) else event
    return float(inner.noise_multiplier) if isinstance(inner, GaussianDpEvent) else None


def without_sampling(events: Mapping[DpEvent, int], distance: float) -> float | None:
    """The multiplier of the one Gaussian release that all events are without their sampling.

    Args:
        events: releases, and how often each happened.
        distance: between the sums of neighbours, in norms: 1, or 2 where one unit is replaced.

    Returns:
        None where an event is no Gaussian release.
    """
    precision = 0.0
    for event, times in events.items():
        multiplier = multiplier_of(event)
        if multiplier is None:
            return None
        loss = distance / multiplier
        precision += times * loss * loss  # infinity, where a power would overflow
    return 1 / math.sqrt(precision)


def is_beyond(events: Mapping[DpEvent, int], distance: float, delta: float, bound: float) -> bool:
    """Whether a table should not be made.

    Args:
        events: Gaussian releases, and how often each happened.
        distance: see `without_sampling`.
        delta: that epsilon is asked for.
        bound: no epsilon of theirs is above this.
    """
    loss = distance / smallest_multiplier(events)
    widest = loss * (loss / 2 + 12)  # twelve standard deviations beyond its mean
    return widest > WIDEST_LOSS or bound > LARGEST_EPSILON or delta < SMALLEST_DELTA


def smallest_multiplier(events: Mapping[DpEvent, int]) -> float:
    """The least noise among Gaussian releases; infinity where there are none."""
    return min((m for m in map(multiplier_of, events) if m is not None), default=math.inf)


def gaussian_bound(multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian release, for any multiplier from 0 up.

    Below a multiplier of 1e-6 the closed form is lost in rounding; there the tail bound
    1/(2 s^2) + sqrt(2 ln(1/delta)) / s is used (Bun and Steinke 2016, proposition 1.3).
    """
    if multiplier < 1e-6:
        if multiplier * multiplier == 0:
            return math.inf
        return (0.5 / multiplier + math.sqrt(2 * math.log(1 / delta))) / multiplier
    return gaussian_epsilon(multiplier, delta)
