"""FedNova: nodes that make more local steps do not weigh more.

    server -> node   T, the effective steps of the round before
    node             update x T / a_i, a_i the effective steps of this node
    node -> server   that; behind it unit x a_i / T
    server           mean x (mean of a_i / T)

Wang, Liu, Liang, Joshi and Poor 2020 (https://arxiv.org/abs/2007.07481, equation 5): each update is
normalised by its node's steps, and the mean goes as far as the mean number of steps. With momentum
rho of the local SGD, tau steps count (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho). The number
of steps tells about a node's number of examples; it travels inside the vector, so a secure sum
hides it and noise covers it.

T only brings the update to its usual length; it is 1 in the first round. Nodes keep nothing.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import Broadcast, NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import (
    check_momentum,
    effective_steps,
    need_whole,
    steps_of,
)
from umbel.strategies.transform import Stateless


class NovaState(TypedDict):
    """The effective steps of the round before."""

    steps: float


@dataclass(frozen=True)
class FedNova(Stateless):
    """Normalised averaging with both halves.

    Args:
        momentum: of the nodes' SGD, from 0 up to 1.
        unit: the length that the coordinate of the steps has in an update.

    Raises:
        StackError: a value out of range, or it stands below another layer.

    Metrics: `steps`, the effective steps of the round.
    """

    momentum: float = 0.0
    unit: float = 0.1
    name: str = "fednova"
    needs: ClassVar[frozenset[str]] = frozenset({"steps"})

    def __post_init__(self) -> None:
        try:
            positive(unit=self.unit)
        except ValueError as error:
            raise StackError(str(error)) from error
        check_momentum(self.momentum)

    def init(self, size: int) -> NovaState:  # noqa: ARG002
        return {"steps": 1.0}

    def check(self, facts: Facts, state: NovaState) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts.longer("steps", 1)

    def broadcast(self, state: NovaState, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"steps": state["steps"]})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        steps = effective_steps(steps_of(ctx, self.name), self.momentum)
        part = steps / float(ctx.config["steps"])
        return torch.cat([update / part, update.new_tensor([self.unit * part])])

    def decode(
        self, total: Tensor, state: NovaState, ctx: RoundContext
    ) -> tuple[Tensor, NovaState]:
        if not ctx.denominator > 0:
            return total[:-1], state
        mean = float(total[-1]) / (ctx.denominator * self.unit)
        steps = max(1.0, state["steps"] * mean) if math.isfinite(mean) else state["steps"]
        ctx.report("steps", steps)
        return total[:-1] * (steps / state["steps"]), {"steps": steps}
