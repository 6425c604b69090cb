"""Sign with error feedback: one bit a coordinate, and a size for each block.

    node             update + what was left unsent; of each block the signs times the mean size
                     leave, the rest stays
    node -> server   sizes: float32, one a block of 1,024 coordinates; signs: bits, in bytes
    server           signs x size, to the rule as any update

This is EF-signSGD (Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847, algorithm 1, blocks
as in section 6.1): signs alone are biased, and with what is kept nothing is lost over rounds. The
layer stands first, so clipping bounds what leaves with all that was left over in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from umbel.core.errors import RunError
from umbel.strategies.compression.blocks import BLOCK, blocks_of
from umbel.strategies.compression.unsent import Unsent
from umbel.strategies.contexts import NodeContext
from umbel.strategies.payload import Part, Parts


@dataclass(frozen=True)
class Sign(Unsent):
    """Sends the signs of the coordinates, and keeps the difference for later rounds.

    Raises:
        StackError: a layer before it has put more behind the update than the model's change,
            which must arrive whole.

    Metrics: `unsent`, the length of what a node keeps over the length of what it had to send.
    """

    name: str = "sign"
    keeps_shape: ClassVar[bool] = True

    def chosen(self, whole: Tensor) -> Tensor:
        rows = _rows(whole.abs())
        sizes = rows.sum(dim=1) / _lengths(whole.numel()).to(whole.dtype)
        spread = sizes.float().to(whole.dtype).repeat_interleave(BLOCK)[: whole.numel()]
        return torch.where(whole < 0, -spread, spread)

    def layout(self, size: int, dtype: torch.dtype) -> Mapping[str, Part]:  # noqa: ARG002
        return {
            "sizes": Part(torch.float32, blocks_of(size)),
            "signs": Part(torch.uint8, -(-size // 8)),
        }

    def pack(self, vector: Tensor, bound: float, ctx: NodeContext) -> Parts:  # noqa: ARG002
        sizes = _rows(vector.abs()).amax(dim=1).float()
        signs = np.packbits((vector < 0).numpy(), bitorder="little")
        spread = sizes.to(vector.dtype).repeat_interleave(BLOCK)[: vector.numel()]
        if not bool(((vector.abs() == spread) | ~torch.isfinite(spread)).all()):
            raise RunError(
                f"a layer below {self.name} has made numbers of several sizes of a block that had "
                "one; put that layer before it, or take compression=qsgd-2"
            )
        return {"sizes": sizes, "signs": torch.from_numpy(signs)}

    def unpack(self, parts: Parts, size: int, dtype: torch.dtype) -> Tensor:
        sizes = parts["sizes"]
        if not bool((torch.isfinite(sizes) & (sizes >= 0)).all()):
            raise ValueError("an update with NaN or infinity: a size is no finite number from 0 up")
        spread = sizes.to(dtype).repeat_interleave(BLOCK)[:size]
        bits = np.unpackbits(parts["signs"].numpy(), count=size, bitorder="little")
        return torch.where(torch.from_numpy(bits.view(np.bool_)), -spread, spread)


def _rows(vector: Tensor) -> Tensor:
    """Shape (blocks, BLOCK), with zeros behind the end."""
    return pad(vector, (0, -vector.numel() % BLOCK)).reshape(-1, BLOCK)


def _lengths(size: int) -> Tensor:
    """How many coordinates each block has."""
    lengths = torch.full((blocks_of(size),), BLOCK)
    lengths[-1] = size - BLOCK * (len(lengths) - 1)
    return lengths
