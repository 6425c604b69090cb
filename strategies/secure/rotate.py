"""Rotate: spread every update evenly over its coordinates before it is quantised.

    node             update, signs, Hadamard transform; filled up with zeros to its size
    node -> server   (what the next layer makes of it)
    server           the sum, transformed back and cut to its size

The signs follow from the round's number and are public: the rotation hides nothing, it makes the
sum's coordinates small, so that the modulus can be.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import clip, l2_norm
from umbel.privacy.masking import keys
from umbel.privacy.masking.hadamard import padded, rotate, rotate_back
from umbel.strategies.transform import Broadcast, Facts, NodeContext, RoundContext, Stateless


@dataclass(frozen=True)
class Rotate(Stateless):
    """A randomised Hadamard transform; never raises a norm.

    Raises:
        StackError: the updates have no bound, or are whole numbers already.
    """

    name: str = "rotate"
    isometry: ClassVar[bool] = True
    for_sums: ClassVar[Literal["rotates"]] = "rotates"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        if facts.l2_bound is None:
            raise StackError("rotate needs bounded updates; put Clip before it")
        if facts.modulus is not None or facts.noise:
            raise StackError("rotate needs real numbers; put it before Quantize and before noise")
        size = padded(facts.size)
        return facts.replace(size=size, grid=None, spread=facts.l2_bound / math.sqrt(size))

    def broadcast(self, state: None, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"round": facts.round})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        rotated = rotate(update, _seed(int(ctx.config["round"])))
        length = l2_norm(update)
        # Rounding in the transform must not lengthen what a bound was promised for.
        return clip(rotated, length).update if length else rotated

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        assert ctx.entering is not None
        return rotate_back(total, _seed(ctx.number), ctx.entering.size), state


def _seed(number: int) -> bytes:
    return keys.digest("rotation", number)
