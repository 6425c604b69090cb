"""AdaptiveClip: a clipping norm that follows a quantile of the updates' lengths.

    server -> node   norm C(t)
    node             update clipped to C(t); one more coordinate: +1 if it was not clipped, else -1,
                     times share x C(t)
    node -> server   the longer update, no longer than C(t) sqrt(1 + share^2)
    server           (noise is added to all coordinates by a layer below)
                     fraction b of updates that were not clipped, from the last coordinate;
                     C(t+1) = C(t) exp(-rate (b - quantile))

Andrew, Thakkar, McMahan and Ramaswamy 2021, algorithm 1: if more updates fit than the quantile
says, the norm is too generous and falls; if fewer do, it rises. The noise of a round is for the
norm that its updates were clipped to, never for the next one.

The bit costs no extra release: it is part of the vector that is protected as a whole, whose
bound it raises by sqrt(1 + share^2), half a per cent at the default. That is the same trade as
splitting the noise between two queries (ibid., theorem 1). The fraction is taken over the
expected cohort, a public number.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import clip_to_grid
from umbel.privacy.noise.lattice import grid_step, round_to_zero
from umbel.privacy.validate import inside_unit, positive
from umbel.strategies.private.clip import bounded
from umbel.strategies.transform import (
    Broadcast,
    Facts,
    IdleNode,
    NodeContext,
    RoundContext,
    Unclaimed,
)

LEAST = 1e-6
"""The norm never falls below this part of the first one: zero updates must not end it."""


class NormState(TypedDict):
    """The norm of the coming round."""

    norm: float


@dataclass(frozen=True)
class AdaptiveClip(IdleNode, Unclaimed):
    """Clips updates to a norm that tracks a quantile of their lengths.

    Args:
        initial: the first norm.
        quantile: part of the updates that should not be clipped.
        rate: how fast the norm follows; 0.2 in the paper.
        share: length of the bit's coordinate over the norm; larger is a more exact quantile and
            more noise on the update.

    Raises:
        StackError: an argument is out of range.

    Metrics: `norm` of the round, `unclipped`, the noised fraction.
    """

    initial: float = 1.0
    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.1
    name: str = "adaptive-clip"
    adapts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            positive(clipping_norm=self.initial)
            inside_unit(clipping_quantile=self.quantile)
            positive(rate=self.rate)
            inside_unit(share=self.share)
        except ValueError as error:
            raise StackError(str(error)) from error

    @property
    def clips_to(self) -> float:
        """The first norm."""
        return self.initial

    def init(self, size: int) -> NormState:  # noqa: ARG002
        return {"norm": float(self.initial)}

    def check(self, facts: Facts, state: NormState) -> Facts:
        facts = bounded(facts, state["norm"])
        joint = state["norm"] * math.sqrt(1 + self.share**2)
        return facts.replace(size=facts.size + 1, l2_bound=joint)

    def broadcast(self, state: NormState, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"norm": state["norm"]})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        norm = float(ctx.config["norm"])
        result = clip_to_grid(update, norm)
        sign = -1.0 if result.was_clipped else 1.0
        bit = torch.tensor([sign * self._unit(norm)], dtype=update.dtype)
        return torch.cat([result.update, bit])

    def decode(
        self, total: Tensor, state: NormState, ctx: RoundContext
    ) -> tuple[Tensor, NormState]:
        norm = state["norm"]
        said = float(total[-1]) / (self._unit(norm) * ctx.cohort)
        unclipped = min(1.0, max(0.0, (1 + said) / 2))
        after = norm * math.exp(-self.rate * (unclipped - self.quantile))
        kept: NormState = {"norm": max(after, LEAST * self.initial)}
        ctx.report("norm", norm)
        ctx.report("unclipped", unclipped)
        return total[:-1], kept

    def _unit(self, norm: float) -> float:
        """The bit's coordinate: share x norm, on the grid."""
        exact = torch.tensor([self.share * norm], dtype=torch.float64)
        return float(round_to_zero(exact, grid_step(norm)))
