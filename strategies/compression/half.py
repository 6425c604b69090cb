"""Half precision: 16 bits a coordinate.

    node             the update over a power of two, to the nearest number of 16 bits
    node -> server   scale: float32; values: float16, one a coordinate
    server           values x scale

The scale brings the largest coordinate to between 2^14 and 2^15, so that nothing overflows and
what is 2^29 times smaller than the largest coordinate is kept still. A coordinate that is not among
the smallest of these is off by 2^-11 of itself at most.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from umbel.privacy.bounds.clipping import l2_norm
from umbel.strategies.contexts import NodeContext
from umbel.strategies.payload import SHRINK, Part, Parts
from umbel.strategies.transform import Stateless

_TOP = 15
"""The largest coordinate is scaled to below this power of two; float16 ends just below 2^16."""


@dataclass(frozen=True)
class Half(Stateless):
    """Sends updates as numbers of 16 bits."""

    name: str = "half"
    keeps_shape: ClassVar[bool] = False

    def layout(self, size: int, dtype: torch.dtype) -> Mapping[str, Part]:  # noqa: ARG002
        return {"scale": Part(torch.float32, 1), "values": Part(torch.float16, size)}

    def pack(self, vector: Tensor, bound: float, ctx: NodeContext) -> Parts:  # noqa: ARG002
        largest = float(vector.abs().max()) if vector.numel() else 0.0
        finite = math.isfinite(largest)
        exponent = math.frexp(largest)[1] - _TOP if largest and finite else 0
        scale = math.ldexp(1.0, max(-120, min(100, exponent)))
        values = (vector / scale).half()
        length = l2_norm(values.float()) * scale
        if length > bound:
            scale *= bound / length * SHRINK
        return {"scale": torch.tensor([scale], dtype=torch.float32), "values": values}

    def unpack(self, parts: Parts, size: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        scale = float(parts["scale"][0])
        if not 0 < scale < math.inf:
            raise ValueError(f"a scale of {scale:g} is of no update")
        return parts["values"].to(dtype).mul_(scale)
