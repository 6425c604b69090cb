"""How fast noise is drawn, in nanoseconds a sample on one thread.

Beside the lattice Gaussian stand NumPy's floating-point normal, whose low bits betray what it is
added to, the 128-bit table for shares of noise, and the exact sampler of Canonne, Kamath and
Steinke 2020 (algorithms 1 to 3), which needs no table and is a sequence of coin flips.
"""

import secrets
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from math import isqrt

import numpy as np

from umbel.benchmarks.figures import Figure
from umbel.privacy.noise.discrete_gaussian import sample_discrete_gaussian
from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.lattice import LatticeGaussian

STEPS = 100
SIZE = 1_000_000
TARGET = 5e7
"""Samples a second."""


def measure(*, quick: bool = False) -> list[Figure]:
    """Noise alone, and noise added to real numbers as a round's sum needs it."""
    size, repeats = (10_000, 1) if quick else (SIZE, 15)
    few = max(20, size // 5000)
    lattice, entropy = LatticeGaussian(STEPS), Entropy()
    generator = np.random.default_rng()
    values = generator.standard_normal(size) * 1e4
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "lattice": (lambda: lattice.sample(size), size),
        "added to real numbers": (lambda: lattice.add(values), size),
        "NumPy's normal": (lambda: generator.standard_normal(size), size),
        "128-bit table": (lambda: sample_discrete_gaussian(STEPS, size, entropy), size),
        "exact, by coin flips": (lambda: [exact(STEPS) for _ in range(few)], few),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (draw, count) in ways.items():
            began = time.perf_counter()
            draw()
            if turn or quick:
                times[name].append((time.perf_counter() - began) / count)
    found = {name: 1e9 * statistics.median(seconds) for name, seconds in times.items()}
    return [
        Figure(
            "noise",
            f"lattice Gaussian, {STEPS} steps, one thread",
            found.pop("lattice"),
            "ns/sample",
            1e9 / TARGET,
            found,
        )
    ]


def exact(steps: int) -> int:
    """One draw of the discrete Gaussian with this sigma, without any rounding.

    Canonne, Kamath and Steinke (2020), algorithms 1 to 3, in whole numbers: slow, and what the
    quick samplers are tested against.
    """
    t = isqrt(steps * steps) + 1
    while True:
        y = _laplace(t)
        gap = abs(y) - Fraction(steps * steps, t)
        if _coin(gap * gap / (2 * steps * steps)):
            return y


def _laplace(t: int) -> int:
    while True:
        u = secrets.randbelow(t)
        if not _coin(Fraction(u, t)):
            continue
        whole = 0
        while _coin(Fraction(1)):
            whole += 1
        size = u + t * whole
        if secrets.randbits(1):
            return size
        if size:
            return -size


def _coin(exponent: Fraction) -> bool:
    """Heads with the probability exp(-exponent)."""
    while exponent > 1:
        if not _coin(Fraction(1)):
            return False
        exponent -= 1
    k = 1
    while secrets.randbelow(exponent.denominator * k) < exponent.numerator:
        k += 1
    return k % 2 == 1
