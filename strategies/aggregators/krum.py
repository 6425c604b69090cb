"""Krum and multi-Krum (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757, section 4).

The score of an update is the sum of its squared distances to the n - f - 2 others that are nearest.
Krum takes the update of the lowest score, multi-Krum the mean of the n - f - 2 lowest (as many as
keep its guarantee: Damaskinos et al. 2019, section 3). All distances follow from one Gram matrix.

Stands f liars among n >= 2 f + 3 updates: fewer than half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umbel.strategies.aggregators.each import Choice, EachRule, Rows


def scores(distances: Tensor, liars: int) -> Tensor:
    """Krum's scores, shape (n,), from squared distances of shape (n, n)."""
    near = max(1, len(distances) - liars - 2)
    return distances.sort(dim=1).values[:, 1 : near + 1].sum(1)  # the first is itself


def best(distances: Tensor, liars: int, keep: int) -> list[int]:
    """The rows of the lowest scores in ascending order of the cohort; of equals the first."""
    order = scores(distances, liars).argsort(stable=True)[:keep]
    return sorted(order.tolist())


def mean_of(rows: Rows, chosen: list[int]) -> Choice:
    """The mean of the chosen rows; the others are left out."""
    weights = torch.zeros(len(rows), dtype=torch.float64)
    weights[chosen] = 1 / len(chosen)
    return Choice(rows.combined(weights), [float(weight > 0) for weight in weights])


@dataclass(frozen=True)
class MultiKrum(EachRule):
    """The mean of the updates that are nearest to most others; see `EachRule` for the arguments."""

    name: str = "multi-krum"

    def need(self, liars: int) -> tuple[int, str]:
        return 2 * liars + 3, f"2 x {liars} + 3"

    def keep(self, count: int, liars: int) -> int:
        """How many of so many updates are averaged."""
        return max(1, count - liars - 2)

    def choose(self, rows: Rows, liars: int) -> Choice:
        return mean_of(rows, best(rows.distances, liars, self.keep(len(rows), liars)))


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The one update that is nearest to most others; see `EachRule` for the arguments.

    It learns from one node a round, so where data differ it costs much accuracy.
    """

    name: str = "krum"

    def keep(self, count: int, liars: int) -> int:  # noqa: ARG002
        return 1
