"""What it costs to try a mechanism a random number of times and to release the best result only.

Liu and Talwar 2019 (https://arxiv.org/abs/1811.07971) showed that the best of a random number of
runs costs little more than one run; Papernot and Steinke 2022 (https://arxiv.org/abs/2110.03620)
give the bounds that are used here, of Renyi divergence:

    Poisson     theorem 6: number ~ Poisson(mean). With e^h = 1 + 1/(order - 1), and every run
                (h, d)-DP:  rdp(order) + mean d + log(mean) / (order - 1)
    negative    theorem 2: number ~ truncated negative binomial of shape n > -1 and parameter g
    binomial    (shape 1 is geometric, 0 logarithmic), and any other order o >= 1:
                rdp(order) + (1 + n) (1 - 1/o) rdp(o) + (1 + n) log(1/g) / o + log(mean)/(order - 1)

All runs have to be alike: each draws its own options by chance, from a choice that depends on no
data and on no other run; the number is drawn independently of the data and is not released, nor is
anything of the other runs. A fixed number of runs, or a search that learns from its runs, has no
such bound: it costs what all of its runs cost together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from scipy.optimize import brentq

from umbel.privacy.noise.entropy import Entropy

SHAPES: Mapping[str, float] = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
"""Distributions of the number of runs, by the shape of the negative binomial; Poisson is its limit.
"""
ORDERS = (1.5, 2, 2.5, *range(3, 33), *range(34, 65, 3), 80, 96, 128, 192, 256, 512, 1024)
"""Renyi orders; nearly all whole, whose divergences of sampled noise are quick to compute."""


@dataclass(frozen=True)
class SelectionDpEvent(DpEvent):  # type: ignore[misc]  # dp-accounting has no types
    """The best of a random number of runs of one mechanism.

    Attributes:
        run: the releases of one run, each with how often it happens.
        mean: expected number of runs, above 0 for Poisson and at least 1 else.
        distribution: a key of `SHAPES`.
    """

    run: tuple[tuple[DpEvent, int], ...]
    mean: float
    distribution: str

    def __post_init__(self) -> None:
        if self.distribution not in SHAPES:
            raise ValueError(
                f"distribution is {self.distribution!r}; it can be {', '.join(SHAPES)}"
            )
        if not (self.mean >= 1 and math.isfinite(self.mean)):
            raise ValueError(f"mean is {self.mean}; expect at least one run")
        if not self.run:
            raise ValueError("a run without releases needs no accounting")


def selection_rdp(
    orders: Sequence[float], rdp: Sequence[float], mean: float, distribution: str
) -> list[float]:
    """Renyi divergences of the selection, from those of one run.

    Args:
        orders: above 1.
        rdp: of one run, at these orders.
        mean: expected number of runs.
        distribution: a key of `SHAPES`.

    Returns:
        At the same orders. A smaller order never has a larger one: Renyi divergence grows with it.
    """
    shape = SHAPES[distribution]
    more = max(0.0, math.log(mean))  # for a Poisson mean below 1 the bound stays that of mean 1
    found = []
    if math.isinf(shape):
        for order, one in zip(orders, rdp, strict=True):
            hat = math.log1p(1 / (order - 1))
            found.append(one + mean * delta_of(orders, rdp, hat) + more / (order - 1))
    else:
        gamma = _gamma(mean, shape)
        other = min(
            (1 + shape) * ((1 - 1 / order) * one - math.log(gamma) / order)
            for order, one in zip(orders, rdp, strict=True)
        )
        found = [one + other + more / (order - 1) for order, one in zip(orders, rdp, strict=True)]
    best = math.inf
    for place in range(len(found) - 1, -1, -1):
        found[place] = best = min(best, found[place])
    return found


def delta_of(orders: Sequence[float], rdp: Sequence[float], epsilon: float) -> float:
    """The smallest delta that Renyi divergences prove at an epsilon.

    Canonne, Kamath and Steinke 2020 (https://arxiv.org/abs/2004.00010), proposition 12:
    log delta = (a - 1) (rdp - epsilon + log(1 - 1/a)) - log a.
    """
    logs = [
        (a - 1) * (one - epsilon + math.log1p(-1 / a)) - math.log(a)
        for a, one in zip(orders, rdp, strict=True)
        if math.isfinite(one)
    ]
    return min(1.0, math.exp(min(min(logs, default=0.0), 0.0)))


def selection_curve(event: SelectionDpEvent, relation: NeighboringRelation) -> list[float]:
    """Renyi divergences of a selection at `ORDERS`."""
    accountant = RdpAccountant(ORDERS, relation)
    for one, times in event.run:
        accountant.compose(one, times)
    return selection_rdp(ORDERS, accountant._rdp.tolist(), event.mean, event.distribution)


def selection_epsilon(
    events: Mapping[DpEvent, int], relation: NeighboringRelation, delta: float
) -> float:
    """Epsilon at `delta` of selections together, and of other releases beside them.

    Raises:
        ValueError: a release that RDP does not bound under this relation.
    """
    accountant = RdpAccountant(ORDERS, relation)
    total = np.zeros(len(ORDERS))
    for event, times in events.items():
        if isinstance(event, SelectionDpEvent):
            total += times * np.asarray(selection_curve(event, relation))
        else:
            accountant.compose(event, times)
    total += accountant._rdp
    return float(rdp_privacy_accountant.compute_epsilon(ORDERS, total, delta)[0])


def draw_number(mean: float, distribution: str, entropy: Entropy | None = None) -> int:
    """How often to try, from the operating system's entropy; 0 is possible under Poisson.

    Args:
        mean: expected number.
        distribution: a key of `SHAPES`.
        entropy: another source, for tests.
    """
    source = Entropy() if entropy is None else entropy
    uniform = ((int(source.words64(1)[0]) >> 11) + 0.5) / (1 << 53)
    shape, total, number = SHAPES[distribution], 0.0, 0 if distribution == "poisson" else 1
    gamma = 0.0 if math.isinf(shape) else _gamma(mean, shape)
    while True:
        total += math.exp(_log_probability(number, mean, shape, gamma))
        if uniform <= total or number > 1000 * (mean + 10):
            return number
        number += 1


def _log_probability(number: int, mean: float, shape: float, gamma: float) -> float:
    """Of the number of runs (definition 1 of Papernot and Steinke)."""
    if math.isinf(shape):
        return number * math.log(mean) - mean - math.lgamma(number + 1)
    if gamma >= 1:
        return 0.0 if number == 1 else -math.inf
    if shape == 0:
        return number * math.log1p(-gamma) - math.log(number) - math.log(-math.log(gamma))
    return (
        number * math.log1p(-gamma)
        + math.lgamma(number + shape)
        - math.lgamma(shape)
        - math.lgamma(number + 1)
        - math.log(gamma**-shape - 1)
    )


def _gamma(mean: float, shape: float) -> float:
    """The parameter of the negative binomial that has this mean."""
    if mean <= 1:
        return 1.0
    if shape == 1:
        return 1 / mean

    def over(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        if shape == 0:
            return (1 / gamma - 1) / -log_gamma - mean
        return shape * (1 - gamma) / (gamma * -math.expm1(shape * log_gamma)) - mean

    return math.exp(float(brentq(over, -60.0, -1e-12, xtol=1e-14)))
