"""FedDyn: a linear term on each node makes the nodes' optima those of all.

    node             gradient - h_i + alpha (w - w0) in every step;  h_i <- h_i - alpha x update
    node -> server   update
    server           h <- h - alpha x share of the nodes x mean update;  model += mean - h / alpha

Acar, Zhao, Matas Navarro, Mattina, Whatmough and Saligrama 2021 (https://arxiv.org/abs/2111.04263,
algorithm 1). Nothing more than the update travels, so noise and secure sums cost what they cost
FedAvg. The server's h takes the place of the mean of the nodes'; where updates are clipped, nodes
remember theirs whole.

Each node keeps h_i; one that was away goes on with it, one that is new or lost it begins at 0. The
server's optimiser should be `fedavg` with rate 1.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.objective import Correction, Objective


class DynState(TypedDict):
    """The server's h, shape (size,)."""

    h: Tensor


@dataclass(frozen=True)
class FedDyn(Objective):
    """Dynamic regularisation with both halves.

    Args:
        alpha: strength of the pull, in 1 / learning rate; above 0.

    Raises:
        StackError: alpha is not a finite number above 0, or it stands below another layer.
    """

    alpha: float = 0.1
    name: str = "feddyn"

    def __post_init__(self) -> None:
        try:
            positive(feddyn_alpha=self.alpha)
        except ValueError as error:
            raise StackError(str(error)) from error

    def init(self, size: int) -> DynState:
        return {"h": torch.zeros(size)}

    def check(self, facts: Facts, state: DynState) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:
        return Correction(offset=-ctx.recall("h", start), anchor=start, strength=self.alpha)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        ctx.memory["h"] = ctx.recall("h", update) - self.alpha * update
        return update

    def decode(self, total: Tensor, state: DynState, ctx: RoundContext) -> tuple[Tensor, DynState]:
        if not ctx.denominator > 0:
            return total, state
        share = ctx.replies / max(ctx.entered.population, ctx.replies)
        h = state["h"].to(total.dtype) - total * (self.alpha * share / ctx.denominator)
        return total - h * (ctx.denominator / self.alpha), {"h": h}
