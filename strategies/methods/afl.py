"""Agnostic federated learning: the model is for the mixture of nodes on which it is worst.

    node             ln l_i <- ln l_i + rate x F, the loss here of the model that was sent
    node -> server   l_i / Z x update; behind it unit x l_i / Z
    server           the sum of the first over the sum of the second; Z <- the mean of l_i

Mohri, Sivek and Suresh 2019 (https://arxiv.org/abs/1902.00146, section 3): the minimax over the
model and the weights l. Weights grow by factors (the entropic form of the ascent) and not by terms
that a projection onto the simplex follows: so each node keeps its own, the server needs sums only,
and a secure sum hides losses and weights, as noise covers them. It costs a pass over the node's
examples. A node that was away goes on with its weight; one that is new or lost it begins at the
mean.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import Broadcast, NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.transform import Stateless

MOST = 30.0
"""A weight of e^30 times the mean is that of a run that diverged."""


class MixtureState(TypedDict):
    """The logarithm of the mean weight."""

    mean: float


@dataclass(frozen=True)
class AgnosticFL(Stateless):
    """Minimax over nodes with both halves.

    Args:
        rate: of the weights, in 1 / loss; above 0.
        unit: the length that the coordinate of the weight has in an update.

    Raises:
        StackError: a value that is no finite number above 0, or it stands below another layer.

    Metrics: `mean`, the logarithm of the mean weight.
    """

    rate: float = 0.1
    unit: float = 0.1
    name: str = "afl"
    needs: ClassVar[frozenset[str]] = frozenset({"start-loss"})

    def __post_init__(self) -> None:
        try:
            positive(afl_rate=self.rate)
            positive(unit=self.unit)
        except ValueError as error:
            raise StackError(str(error)) from error

    def init(self, size: int) -> MixtureState:  # noqa: ARG002
        return {"mean": 0.0}

    def check(self, facts: Facts, state: MixtureState) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts.longer("weight", 1)

    def broadcast(self, state: MixtureState, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"mean": state["mean"]})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        if ctx.start_loss is None or not math.isfinite(ctx.start_loss):
            raise RunError(
                f"{self.name} weighs nodes by their loss, which is {ctx.start_loss} here; take a "
                "trainer whose evaluation gives a finite loss"
            )
        mean = float(ctx.config["mean"])
        before = float(ctx.memory["log"]) if "log" in ctx.memory else mean
        log = before + self.rate * ctx.start_loss
        if log - mean > MOST:
            raise RunError(
                f"this node's weight would be e^{log - mean:.0f} times the mean; lower afl-rate "
                f"({self.rate:g}), which the loss of {ctx.start_loss:.3g} multiplies"
            )
        ctx.memory["log"] = torch.tensor(log, dtype=torch.float64)
        weight = math.exp(log - mean)
        return torch.cat([update * weight, update.new_tensor([self.unit * weight])])

    def decode(
        self, total: Tensor, state: MixtureState, ctx: RoundContext
    ) -> tuple[Tensor, MixtureState]:
        weight = float(total[-1]) / self.unit
        if not (weight > 0 and ctx.denominator > 0):  # nobody came, or noise was larger than all
            return torch.zeros_like(total[:-1]), state
        mean = state["mean"] + math.log(weight / ctx.denominator)
        ctx.report("mean", mean)
        return total[:-1] * (ctx.denominator / weight), {"mean": mean}
