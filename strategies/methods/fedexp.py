"""FedExP: the server steps further where the nodes' updates point apart.

    node -> server   update; behind it its squared length
    server           mean x max(1, mean of squared lengths / (2 (|mean|^2 + eps)))

Jhunjhunwala, Wang and Joshi 2023 (https://arxiv.org/abs/2301.09604, equation 7). The squared
length travels inside the vector, so that a secure sum hides it and noise covers it; noise in the
mean makes that longer, and the step shorter, never below FedAvg's. The paper ends with the mean of
the last two models (option `average-from`). Nodes keep nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.transform import Stateless


@dataclass(frozen=True)
class FedExP(Stateless):
    """Extrapolation on the server.

    Args:
        eps: keeps the step bounded where updates cancel out.

    Raises:
        StackError: eps is not a finite number above 0, or it stands below another layer.

    Metrics: `rate`, the server's step.
    """

    eps: float = 1e-3
    name: str = "fedexp"

    def __post_init__(self) -> None:
        try:
            positive(fedexp_eps=self.eps)
        except ValueError as error:
            raise StackError(str(error)) from error

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts.longer("square", 1)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return torch.cat([update, update.square().sum()[None]])

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        if not ctx.denominator > 0:
            return total[:-1], state
        mean = total[:-1] / ctx.denominator
        square = float(total[-1]) / ctx.denominator
        rate = max(1.0, square / (2 * (float(mean.square().sum()) + self.eps)))
        ctx.report("rate", rate)
        return total[:-1] * rate, state
