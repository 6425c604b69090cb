"""SCAFFOLD, option II: control variates take the drift of unequal nodes out of local steps.

    server -> node   control c, the mean of the nodes' gradients as far as they are known
    node             gradient - c_i + c in every step;  c_i' = c_i - c - update / (steps x rate)
    node -> server   update; behind it rate x (c_i' - c_i)     (as one vector)
    server           c <- c + share of the nodes x mean of the changes

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh 2020 (https://arxiv.org/abs/1910.06378, algorithm
1, option II). The update and the change of the control have one joint bound where they are clipped:
noise is spent on both, and a secure sum hides both. The factor `rate` brings the change to the
length of one step, so that it does not fill the bound. With momentum, which the paper's nodes have
not, steps are counted by how far they reach (`effective_steps`); an update is no mean gradient
otherwise, and controls ten times too long drive the model away. A clipped change reaches the server
short, while its node remembers all of it.

Each node keeps its c_i. One that was away goes on with an old c_i, which is what the paper's nodes
do that are not sampled; one that is new, or lost its memory, begins with c_i = 0.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from umbel.strategies.contexts import Broadcast, NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import (
    check_momentum,
    effective_steps,
    need_whole,
    rate_of,
    steps_of,
)
from umbel.strategies.objective import Correction, Objective


class ControlState(TypedDict):
    """The server's control variate, shape (size,)."""

    control: Tensor


@dataclass(frozen=True)
class Scaffold(Objective):
    """SCAFFOLD with both halves.

    Args:
        momentum: of the nodes' SGD, from 0 up to 1.

    Raises:
        StackError: a value out of range, or it stands below a layer that changes updates.

    Metrics: `control`, the length of the server's control variate.
    """

    momentum: float = 0.0
    name: str = "scaffold"

    def __post_init__(self) -> None:
        check_momentum(self.momentum)

    def init(self, size: int) -> ControlState:
        return {"control": torch.zeros(size)}

    def check(self, facts: Facts, state: ControlState) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts.longer("control", facts.size)

    def broadcast(self, state: ControlState, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast(vectors={"control": state["control"]})

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:
        return Correction(offset=ctx.sent["control"] - ctx.recall("own", start))

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        own, rate = ctx.recall("own", update), rate_of(ctx)
        steps = effective_steps(steps_of(ctx, self.name), self.momentum)
        moved = update / (steps * rate)
        change = -ctx.sent["control"].to(update) - moved
        ctx.memory["own"] = own + change
        return torch.cat([update, change * rate])

    def decode(
        self, total: Tensor, state: ControlState, ctx: RoundContext
    ) -> tuple[Tensor, ControlState]:
        size, control = ctx.entered.size, state["control"]
        if ctx.denominator > 0:
            share = ctx.replies / max(ctx.entered.population, ctx.replies)
            mean = total[size:] / (ctx.denominator * ctx.learning_rate)
            control = control.to(total.dtype) + mean * share
        ctx.report("control", float(control.norm()))
        return total[:size], {"control": control}
