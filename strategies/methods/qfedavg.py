"""q-FedAvg: nodes on which the model is worse count more.

    node             F, the loss of the model that was sent, on its own training examples
    node -> server   F^q x update; behind it unit x (F^q + q F^(q-1) |update|^2 / rate)
    server           the sum of the first over the sum of the second

Li, Sanjabi, Beirami and Smith 2020 (https://arxiv.org/abs/1905.10497, algorithm 2, with L the
inverse of the learning rate, by which both sums are divided). q = 0 is FedAvg; a larger q makes the
nodes' losses more alike. Losses leave a node inside the vector only, so that a secure sum hides
them and noise covers them. It costs a pass over the node's examples. Nodes keep nothing.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole, rate_of
from umbel.strategies.transform import Stateless

_LEAST = 1e-10
"""A loss of 0 has no power below 0."""


@dataclass(frozen=True)
class QFedAvg(Stateless):
    """Fair averaging with both halves.

    Args:
        q: how much worse losses count; 0 is FedAvg.
        unit: the length that the coordinate of the weights has in an update.

    Raises:
        StackError: a value out of range, or it stands below another layer.
    """

    q: float = 1.0
    unit: float = 0.1
    name: str = "q-fedavg"
    needs: ClassVar[frozenset[str]] = frozenset({"start-loss"})

    def __post_init__(self) -> None:
        try:
            positive(unit=self.unit)
        except ValueError as error:
            raise StackError(str(error)) from error
        if not 0 <= self.q < math.inf:
            raise StackError(f"q is {self.q}; it must be a finite number, not below 0")

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts.longer("weight", 1)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        if ctx.start_loss is None or not ctx.start_loss >= 0:
            raise RunError(
                f"{self.name} weighs nodes by their loss, which is {ctx.start_loss} here; take a "
                "trainer whose evaluation gives a loss of at least 0"
            )
        loss = ctx.start_loss + _LEAST
        square = float(update.square().sum())
        weight = loss**self.q + self.q * loss ** (self.q - 1) * square / rate_of(ctx)
        return torch.cat([update * loss**self.q, update.new_tensor([self.unit * weight])])

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        weight = float(total[-1]) / self.unit
        if not weight > 0:  # nobody came, or noise was larger than all weights
            return torch.zeros_like(total[:-1]), state
        return total[:-1] * (ctx.denominator / weight), state
