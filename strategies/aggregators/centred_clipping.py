"""Centred clipping (Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, algorithm 2).

From a centre, every update pulls in its direction, but no further than a radius; the mean of the
pulls moves the centre, a few times over. The centre begins at no change of the model, and the
radius is the median of the updates' distances from it, unless it is given.

The paper's bound holds up to a tenth of liars; fewer than half move the centre in each step by no
more than their share of the radius.
"""

from dataclasses import dataclass

import torch

from umbel.core.errors import StackError
from umbel.strategies.aggregators.each import Choice, EachRule, Rows


@dataclass(frozen=True)
class CentredClipping(EachRule):
    """See the module; `EachRule` has the other arguments.

    Args:
        radius: how far one update may pull; 0 is the median distance from the centre.
        steps: how often the centre moves.
    """

    radius: float = 0.0
    steps: int = 5
    name: str = "centred-clipping"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.radius < float("inf")) or self.steps < 1:
            raise StackError(
                f"{self.name} has the radius {self.radius:g} and {self.steps} steps; it needs a "
                "radius above 0, or 0 for the median distance, and a step at least"
            )

    def choose(self, rows: Rows, liars: int) -> Choice:  # noqa: ARG002
        count = len(rows)
        gram = rows.products
        weights = torch.zeros(count, dtype=torch.float64)
        pulls = torch.ones(count, dtype=torch.float64)
        for _ in range(self.steps):
            along = gram @ weights
            away = (gram.diagonal() - 2 * along + weights @ along).clamp_(min=0).sqrt()
            radius = self.radius or float(away.median())
            pulls = (radius / away.clamp(min=1e-300)).clamp_(max=1.0)
            weights = weights * (1 - float(pulls.mean())) + pulls / count
        return Choice(rows.combined(weights), pulls.tolist())
