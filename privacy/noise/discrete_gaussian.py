"""Discrete Gaussian noise whose shares are added by many nodes.

P(k) is proportional to exp(-k^2 / (2 sigma^2)) over whole numbers (Canonne, Kamath and Steinke
2020). A sum of n of them is nearly the one with n times the variance; Kairouz, Liu and Steinke
2021 (Theorem 1) bound what "nearly" costs, as concentrated DP with rho = e^2 / 2 and

    tau = 10 sum over k = 1 .. n-1 of exp(-2 pi^2 sigma^2 k / (k+1))
    e   = min( sqrt(l2^2 / (n sigma^2) + tau size / 2),  l2 / (sqrt(n) sigma) + tau sqrt(size) )

which is negligible once sigma is above 3 steps. Units are steps of the grid.
"""

import functools
import math

import mpmath

from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.integer_table import Integers, IntegerTable
from umbel.privacy.validate import count, positive

_WIDTH = 13.5
_BEYOND = 2.0**-130
_BITS = 320
LARGEST_DEVIATION = 1 << 17


def concentrated_rho(deviation: float, nodes: int, l2: float, size: int) -> float:
    """The rho of zero-concentrated DP of a sum with `nodes` shares of noise.

    Args:
        deviation: of each node's share, in steps.
        nodes: whose shares are surely in the sum.
        l2: the longest contribution in steps.
        size: coordinates.

    Raises:
        ValueError: a value out of range.
    """
    sigma, n = positive(deviation=deviation), count(nodes=nodes)
    positive(l2=l2)
    tau = 10 * math.fsum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, n))
    exact = l2 / (math.sqrt(n) * sigma)
    first = math.sqrt(exact**2 + tau * size / 2)
    return min(first, exact + tau * math.sqrt(size)) ** 2 / 2


def sample_discrete_gaussian(deviation: float, size: int, entropy: Entropy) -> Integers:
    """Discrete Gaussian noise, shape (size,), int64.

    Raises:
        ValueError: the deviation is not above 0, or too wide for a table.
    """
    if not positive(deviation=deviation) <= LARGEST_DEVIATION:
        raise ValueError(
            f"noise of {deviation:.3g} steps is too wide for a table; quantise with fewer levels, "
            "or take Skellam noise, which can be drawn in parts"
        )
    return discrete_gaussian_table(deviation).sample(size, entropy)


def discrete_gaussian_slack(deviation: float) -> float:
    """Total-variation distance of one draw to the exact law."""
    return (2 * _WIDTH * deviation + 50) * 2.0**-128 + _BEYOND


@functools.lru_cache(maxsize=4)
def discrete_gaussian_table(deviation: float) -> IntegerTable:
    """Weights by exp(-(k+1)^2 t) = exp(-k^2 t) exp(-(2k+1) t), in whole numbers of 2^-320."""
    one = 1 << _BITS
    with mpmath.workprec(_BITS + 64):
        t = 1 / (2 * mpmath.mpf(deviation) ** 2)
        ratio = int(mpmath.exp(-t) * one)
        square = int(mpmath.exp(-2 * t) * one)
    weight, weights = one, [one]
    for _ in range(math.ceil(_WIDTH * deviation) + 20):
        weight = weight * ratio >> _BITS
        ratio = ratio * square >> _BITS
        weights.append(weight)
    return IntegerTable.symmetric(weights, _BEYOND)
