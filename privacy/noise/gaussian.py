"""The analytic Gaussian mechanism: how much noise one release needs, exactly.

The textbook sqrt(2 ln(1.25/delta))/epsilon is wrong for epsilon above 1 (at epsilon 20 the real
delta is 150 times the promised one) and wasteful below. Balle and Wang 2018, theorem 8, give
the exact relation; dp-accounting solves it.
"""

import functools
import math

import numpy as np
from dp_accounting import gaussian_mechanism
from scipy.special import log_ndtr

from umbel.privacy.validate import inside_unit, positive


@functools.lru_cache(maxsize=64)
def gaussian_noise(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest standard deviation that makes one release (epsilon, delta)-private.

    Args:
        epsilon: above 0.
        delta: strictly between 0 and 1.
        sensitivity: the L2 distance between the values of two neighbouring inputs. For a clipped
            update that is replaced by another it is twice the norm.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> round(gaussian_noise(1.0, 1e-5), 4)
        3.7306
    """
    positive(epsilon=epsilon)
    inside_unit(delta=delta)
    positive(sensitivity=sensitivity)
    sigma = float(gaussian_mechanism.get_sigma_gaussian(epsilon, delta))
    # The solver stops within a tolerance of the root, on either side: end on the private one.
    while gaussian_delta(epsilon, sigma) > delta:
        sigma *= 1 + 1e-9
    return sigma * sensitivity


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon at `delta` of one release with noise of `noise_multiplier` sensitivities.

    Raises:
        ValueError: an argument is out of range.
    """
    positive(noise_multiplier=noise_multiplier)
    inside_unit(delta=delta)
    with np.errstate(divide="ignore"):  # a delta of exactly 0 has the logarithm -inf
        return float(gaussian_mechanism.get_epsilon_gaussian(noise_multiplier, delta))


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """Delta at `epsilon` of one release with noise of `noise_multiplier` sensitivities.

    Balle and Wang 2018, theorem 8: Phi(1/2s - es) - e^epsilon Phi(-1/2s - es).
    """
    s = noise_multiplier
    first = float(log_ndtr(0.5 / s - epsilon * s))
    second = epsilon + float(log_ndtr(-0.5 / s - epsilon * s))
    return max(0.0, math.exp(first) * -math.expm1(second - first))
