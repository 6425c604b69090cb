"""The geometric median by smoothed Weiszfeld steps: RFA (Pillutla et al. 2022,
https://arxiv.org/abs/1912.13445, algorithm 2).

The point whose distances to all updates have the smallest sum. Each step is a mean in which an
update weighs the inverse of its distance from the step before, never more than 1 / `smoothing`.
As each step is a weighted mean of the rows, one Gram matrix gives the distances of all steps.

Stands fewer than half of the nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umbel.strategies.aggregators.each import Choice, EachRule, Rows

STEPS = 1000
SETTLED = 1e-10
"""Steps end where the weights change by less."""


def distances_from(gram: Tensor, weights: Tensor) -> Tensor:
    """Of each row from the rows' combination by weights that add up to 1, shape (rows,)."""
    along = gram @ weights
    return (gram.diagonal() - 2 * along + weights @ along).clamp_(min=0).sqrt()


@dataclass(frozen=True)
class GeometricMedian(EachRule):
    """The geometric median; `EachRule` has the other arguments.

    Args:
        smoothing: as a part of the rows' mean distance; below it distances count alike.
    """

    smoothing: float = 1e-6
    name: str = "geometric-median"

    def choose(self, rows: Rows, liars: int) -> Choice:  # noqa: ARG002
        weights = weiszfeld(rows.gram, self.smoothing)
        share = weights / weights.median()
        influence = [1.0 if value >= 0.5 else value for value in share.tolist()]
        return Choice(rows.combined(weights), influence)


def weiszfeld(gram: Tensor, smoothing: float) -> Tensor:
    """Weights that add up to 1 and whose combination of the rows is their geometric median."""
    count = len(gram)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    least = smoothing * float(distances_from(gram, weights).mean())
    if not least > 0:  # all rows are one
        return weights
    for _ in range(STEPS):
        inverse = 1 / distances_from(gram, weights).clamp(min=least)
        after = inverse / inverse.sum()
        moved = float((after - weights).abs().max())
        weights = after
        if moved < SETTLED:
            break
    return weights
