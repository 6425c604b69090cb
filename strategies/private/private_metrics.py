"""PrivateMetrics: what nodes measured, as sums under the same noise as the update.

    node             update + one coordinate a metric: value / limit, cut to [-1, 1],
                     times share x B / sqrt(number of metrics)
    node -> server   the longer update, no longer than B sqrt(1 + share^2); no metrics beside it
    server           (noise is added to all coordinates by a layer below)
                     sums of the metrics, with noise; over the expected cohort, their means

A loss, an accuracy, a number of examples or a flag such as "was clipped" says something about
the node that sent it. Under a private stack nothing of it travels beside the update; this layer
puts the metrics that are wanted inside, where the one noise covers them and the one charge pays
for them. Works under a secure sum as well, because it is part of the vector.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.noise.lattice import grid_step, round_to_zero
from umbel.privacy.validate import inside_unit, positive
from umbel.strategies.private.gaussian import need_bound
from umbel.strategies.transform import Facts, NodeContext, RoundContext, Stateless


@dataclass(frozen=True)
class PrivateMetrics(Stateless):
    """Releases metrics of the nodes under the update's own noise.

    Args:
        limits: from a metric's name to the largest absolute value that counts; larger ones are
            cut. What is not listed is dropped.
        share: length of all metrics' coordinates together over the update's bound; larger is
            more exact metrics and more noise on the update (half a per cent at 0.1).

    Raises:
        StackError: no metric, or a limit or the share is out of range.

    Metrics: each by its name, as a mean over the expected cohort; noised.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.1
    name: str = "private-metrics"
    needs: ClassVar[frozenset[str]] = frozenset({"metrics"})

    def __post_init__(self) -> None:
        if not self.limits:
            raise StackError("private-metrics needs a metric and its limit, such as {'loss': 5.0}")
        try:
            inside_unit(share=self.share)
            for name, limit in self.limits.items():
                positive(**{f"limit of {name}": limit})
        except ValueError as error:
            raise StackError(str(error)) from error

    @property
    def releases(self) -> Mapping[str, float]:
        """The limits."""
        return self.limits

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        bound = need_bound(facts, self.name)
        if facts.grid is not None and facts.grid > grid_step(bound):
            raise StackError(
                f"{self.name} puts metrics on a finer grid than the update is on by now; put it "
                "before the layer that quantises"
            )
        joint = bound * math.sqrt(1 + self.share**2)
        return facts.replace(size=facts.size + len(self.limits), l2_bound=joint)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        """The update and, behind it, the metrics; one that was not measured counts as 0."""
        bound = float(ctx.config["bound"])
        parts = []
        for name, limit in self.limits.items():
            value = float(ctx.metrics.get(name, 0.0))
            part = 0.0 if math.isnan(value) else max(-1.0, min(1.0, value / limit))
            parts.append(part * self._unit(bound))
        values = round_to_zero(torch.tensor(parts, dtype=torch.float64), grid_step(bound))
        return torch.cat([update, values.to(update.dtype)])

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        assert ctx.entering is not None
        bound = need_bound(ctx.entering, self.name)
        sums = (total[-len(self.limits) :] / (self._unit(bound) * ctx.cohort)).tolist()
        for value, (name, limit) in zip(sums, self.limits.items(), strict=True):
            ctx.report(name, value * limit)
        return total[: -len(self.limits)], state

    def _unit(self, bound: float) -> float:
        return self.share * bound / math.sqrt(len(self.limits))
