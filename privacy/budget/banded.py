"""Banded matrix factorisation: noise that is correlated over rounds, for prefix sums.

What is released in round t is row t of C x + w, where x are the rounds' sums, w is fresh noise
and C is a lower-triangular Toeplitz matrix with `bands` diagonals and columns of norm 1. The
update that is applied, C^-1 (C x + w), is post-processing: later rounds take back part of the
noise of earlier ones (BandMF, Choquette-Choo et al. 2023).

Privacy: a unit that takes part at most once in any `separation` >= `bands` consecutive rounds
touches columns of C without common rows, so k participations have the squared sensitivity k
(theorem 2 there). No sampling is assumed. Each round is charged the growth of k, as in
`umbel.privacy.budget.trees`. None of that depends on the values of the diagonals, only on their
norm.

The diagonals are those with the least mean squared noise of the models over the planned rounds:
models are prefix sums of updates, or of updates with momentum (Denisov et al. 2022, section 4).
They are found by L-BFGS from the square root of the workload, 1, 1/2, 3/8, 5/16, ... cut off
after `bands` (Kalinin and Lampert 2024); the gradient is exact, as all matrices are Toeplitz
and so are products and quotients of power series (McKenna 2024, section 3). Where the number of
rounds is not known, the square root itself is used.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from umbel.privacy.validate import count

Array = np.ndarray[Any, np.dtype[np.float64]]

_HAIR = 1 - 2.0**-40
"""Below 1, so that float rounding cannot make a column longer than accounted."""
_STEPS = 500
_STUCK = 1e3
"""Log of a squared error that stands for overflow."""


@dataclass(frozen=True)
class BandedSchedule:
    """A banded factorisation over rounds.

    Attributes:
        bands: diagonals; 1 is independent noise.
        separation: a unit takes part at most once in this many consecutive rounds.
        rounds: for which the diagonals are the best; 0 where that is not known.
        momentum: of the server's optimiser, from 0 up to 1: what the models are made with.

    Raises:
        ValueError: there are more bands than the separation protects, or a number is out of range.

    Example:
        >>> best = BandedSchedule(bands=8, separation=8, rounds=100)
        >>> best.error(100) < BandedSchedule(bands=8, separation=8).error(100)
        True
    """

    bands: int
    separation: int
    rounds: int = 0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        count(bands=self.bands)
        count(separation=self.separation)
        if self.rounds:
            count(rounds=self.rounds)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be from 0 up to 1")
        if self.bands > self.separation:
            raise ValueError(
                f"{self.bands} bands need a minimum separation of as many rounds, but it is "
                f"{self.separation}; lower bands or raise the separation"
            )

    @cached_property
    def diagonals(self) -> tuple[float, ...]:
        """C's diagonals from the main one down, with a Euclidean norm of 1 at most."""
        plain = _root(self.bands, 0.0)
        if self.rounds and self.bands > 1:
            workload = _workload(self.rounds, self.momentum)
            starts = [plain, np.convolve(plain, _root(self.bands, self.momentum))[: self.bands]]
            found = [best for start in starts for best in (start, _improved(start, workload))]
            plain = min(found, key=lambda diagonals: _log_error(diagonals, workload)[0])
        return tuple((plain / np.linalg.norm(plain) * _HAIR).tolist())

    def growth(self, step: int) -> float:
        """What step `step` (from 1) adds to the squared sensitivity."""
        return 1.0 if (step - 1) % self.separation == 0 else 0.0

    def error(self, rounds: int) -> float:
        """Root mean squared noise of the models over `rounds`, in units of w's deviation."""
        workload = _workload(count(rounds=rounds), self.momentum)
        noise = _divided(workload, np.array(self.diagonals))
        # Row t of A C^-1 holds noise[0..t], so noise[i] stands in rounds - i rows.
        return float(np.sqrt(np.mean(np.cumsum(noise**2))))


def _root(bands: int, momentum: float) -> Array:
    """The power series (1 - z)^-1/2, or at `momentum` z in place of z, up to `bands` terms.

    The workload is 1 / ((1 - z) (1 - momentum z)), so its root is a product of two of these.
    """
    scale = momentum if momentum else 1.0
    root = [1.0]
    for k in range(1, bands):
        root.append(root[-1] * (2 * k - 1) / (2 * k) * scale)
    return np.array(root)


def _workload(rounds: int, momentum: float) -> Array:
    """What an update does to the models after it: 1, 1 + m, 1 + m + m^2, ..."""
    return np.cumsum(momentum ** np.arange(rounds, dtype=np.float64))


def _divided(series: Array, by: Array) -> Array:
    """The quotient of two power series, to the length of the first."""
    from scipy.signal import lfilter  # slow to import

    result: Array = lfilter([1.0], by, series)
    return result


def _log_error(diagonals: Array, workload: Array) -> tuple[float, Array]:
    """Log of the summed squared noise at a column norm of 1, and its gradient."""
    with np.errstate(all="ignore"):
        noise = _divided(workload, diagonals)
        again = _divided(noise, diagonals)
        weighted = noise * np.arange(len(workload), 0, -1)
        total, square = weighted @ noise, diagonals @ diagonals
        if not (np.isfinite(total) and np.isfinite(again).all()):
            return _STUCK, np.zeros_like(diagonals)
        lags = range(min(len(diagonals), len(noise)))
        slope = np.zeros_like(diagonals)
        slope[: len(lags)] = [weighted[lag:] @ again[: len(again) - lag] for lag in lags]
        gradient = 2 * (diagonals / square - slope / total)
    return float(np.log(total) + np.log(square)), gradient


def _improved(start: Array, workload: Array) -> Array:
    """A local optimum below `start`; the first diagonal is fixed, as the scale is free."""
    from scipy.optimize import minimize

    def whole(rest: Array) -> Array:
        return np.concatenate([[1.0], rest])

    def objective(rest: Array) -> tuple[float, Array]:
        value, gradient = _log_error(whole(rest), workload)
        return value, gradient[1:]

    found = minimize(
        objective, start[1:] / start[0], jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
    )
    return whole(found.x)
