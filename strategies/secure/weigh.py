"""Weigh: updates count by their number of examples, and nobody learns the numbers.

    node             update x w, and behind it w and each metric x w, all scaled to the bound;
                     w = min(examples, cap) / cap
    node -> server   (masked, by SecureSum)
    server           sum of the updates over the sum of the weights: the weighted mean

The cap is the node's own limit on its influence: with fewer examples than the cap nodes count in
proportion, with more all the same. Metrics travel in the same sum or not at all.

Over noise (a layer nearer to the sum) the weighted mean is made of a noised sum and a noised
weight, which costs nothing more; the update, its weight and its metrics share the one bound.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.collect import EXAMPLES
from umbel.strategies.transform import Facts, NodeContext, RoundContext, Stateless


@dataclass(frozen=True)
class Weigh(Stateless):
    """Weights and metrics inside the vector.

    Args:
        cap: the largest number of examples that counts; 0 lets every update count once.
        limits: from a metric's name to the largest absolute value that counts.

    Raises:
        StackError: a value out of range, or updates without a bound.

    Metrics: each by its name, as a weighted mean over the nodes in the sum.
    """

    cap: float = 10_000.0
    limits: Mapping[str, float] = field(default_factory=dict)
    name: str = "weigh"
    needs: ClassVar[frozenset[str]] = frozenset({"metrics"})
    weighs_inside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        values = [("weight cap", self.cap), *((f"limit of {k}", v) for k, v in self.limits.items())]
        for name, value in values:
            if not (math.isfinite(value) and value >= 0):
                raise StackError(f"{name} is {value}; it must be a finite number, not below 0")

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        if facts.l2_bound is None:
            raise StackError("weigh needs bounded updates; put Clip before it")
        more = 1 + len(self.limits)
        joint = facts.l2_bound * math.sqrt(1 + more)
        # A weighted update leaves the grid of its clipping; the next layer makes a new one.
        return facts.replace(size=facts.size + more, l2_bound=joint, grid=None, wide=True)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        """The update times its weight, the weight, and the metrics times the weight."""
        bound = float(ctx.config["bound"])
        weight = 1.0
        if self.cap:
            weight = min(max(float(ctx.metrics.get(EXAMPLES, 0.0)), 0.0), self.cap) / self.cap
        parts = [weight * bound]
        for name, limit in self.limits.items():
            value = float(ctx.metrics.get(name, 0.0))
            part = 0.0 if math.isnan(value) or not limit else max(-1.0, min(1.0, value / limit))
            parts.append(part * weight * bound)
        # The last bit of a product must not lengthen what a bound was promised for.
        scaled = update.to(torch.float64) * weight
        return torch.cat([scaled, torch.tensor(parts, dtype=torch.float64)])

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        assert ctx.entering is not None and ctx.entering.l2_bound is not None
        more = 1 + len(self.limits)
        parts = (total[-more:] / ctx.entering.l2_bound).tolist()
        weight = parts[0]
        if weight <= 0:  # nobody had an example
            return torch.zeros_like(total[:-more]), state
        for part, (name, limit) in zip(parts[1:], self.limits.items(), strict=True):
            ctx.report(name, part * limit / weight)
        # The stack divides by its denominator afterwards.
        return total[:-more] * (ctx.denominator / weight), state
