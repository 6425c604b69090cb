"""Banded matrix factorisation: noise that is correlated over rounds, for prefix sums.

What is released in round t is row t of C x + w, where x are the rounds' sums, w is fresh noise
and C is a lower-triangular Toeplitz matrix with `bands` diagonals and columns of norm 1. The
update that is applied, C^-1 (C x + w), is post-processing: later rounds take back part of the
noise of earlier ones (BandMF, Choquette-Choo et al. 2023).

Privacy: a unit that takes part at most once in any `separation` >= `bands` consecutive rounds
touches columns of C without common rows, so k participations have the squared sensitivity k
(theorem 2 there). No sampling is assumed. Each round is charged the growth of k, as in
`umbel.privacy.budget.trees`.

The diagonals: those of the square root of the prefix-sum matrix, 1, 1/2, 3/8, 5/16, ... cut off
after `bands` (Kalinin and Lampert 2024, whose bounds show it close to the best), then scaled.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from umbel.privacy.validate import count


@dataclass(frozen=True)
class BandedSchedule:
    """A banded factorisation over rounds.

    Attributes:
        bands: diagonals; 1 is independent noise.
        separation: a unit takes part at most once in this many consecutive rounds.

    Raises:
        ValueError: there are more bands than the separation protects.
    """

    bands: int
    separation: int

    def __post_init__(self) -> None:
        count(bands=self.bands)
        count(separation=self.separation)
        if self.bands > self.separation:
            raise ValueError(
                f"{self.bands} bands need a minimum separation of as many rounds, but it is "
                f"{self.separation}; lower bands or raise the separation"
            )

    @cached_property
    def diagonals(self) -> tuple[float, ...]:
        """C's diagonals from the main one down, with a Euclidean norm of 1 at most."""
        root = [1.0]
        for k in range(1, self.bands):
            root.append(root[-1] * (2 * k - 1) / (2 * k))
        values = np.array(root)
        # A hair below 1, so that float rounding cannot make a column longer than accounted.
        return tuple((values / np.linalg.norm(values) * (1 - 2.0**-40)).tolist())

    def growth(self, step: int) -> float:
        """What step `step` (from 1) adds to the squared sensitivity."""
        return 1.0 if (step - 1) % self.separation == 0 else 0.0

    def error(self, rounds: int) -> float:
        """Root mean squared noise of the prefix sums over `rounds`, in units of w's deviation."""
        inverse = np.zeros(count(rounds=rounds))
        inverse[0] = 1 / self.diagonals[0]
        for t in range(1, rounds):
            reach = min(t, self.bands - 1)
            past = inverse[t - reach : t][::-1]
            inverse[t] = -np.dot(self.diagonals[1 : reach + 1], past) / self.diagonals[0]
        prefix = np.cumsum(inverse)
        # Row t of A C^-1 holds prefix[0..t], so prefix[i] stands in rounds - i rows.
        return float(np.sqrt(np.mean(np.cumsum(prefix**2))))
