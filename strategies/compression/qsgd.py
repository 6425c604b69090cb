"""QSGD: stochastic quantisation to 8, 4 or 2 bits, with a step for each block.

    node             each block of 1,024 coordinates over its step; up or down at random
    node -> server   steps: float32, one a block; codes: bits a coordinate, in bytes
    server           codes x step

A block's step is its largest coordinate over the number of levels, 127, 7 or 1. A coordinate goes
up with the chance that makes its mean right, so what arrives is unbiased (Alistarh et al. 2017,
https://arxiv.org/abs/1610.02132, section 3.1; one scale a block as in section 4, by the largest
coordinate). The chance has 16 bits: a mean is off by 2^-17 of a step at most.

Random numbers come from SFC64, seeded by the node's work in the round and by some of the update's
own bits. They hide nothing. Under a bound (clipping, noise of the server) the steps are made
smaller where rounding has lengthened the update beyond it, so that the bound holds and noise is
that of the same run without compression; the mean is then a little short.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.compression.blocks import (
    BLOCK,
    PIECE,
    Bytes,
    Floats,
    blocks_of,
    padded,
)
from umbel.strategies.contexts import NodeContext
from umbel.strategies.payload import SHRINK, Part, Parts
from umbel.strategies.transform import Stateless

_LEAST = np.float32(2.0**-100)
"""A block whose step would be smaller is sent as zeros."""
_WIDER = np.float32(1 + 2.0**-20)
"""Steps are so much larger that no coordinate comes above the highest level by rounding."""
_LOOKED_AT = 64
"""Coordinates whose bits are part of the seed: nodes of one seed draw different numbers."""


@dataclass(frozen=True)
class Qsgd(Stateless):
    """Sends updates as whole numbers of few bits.

    Args:
        bits: of a coordinate: 8, 4 or 2.

    Raises:
        StackError: other bits.
    """

    bits: Literal[8, 4, 2] = 8
    name: str = "qsgd"
    keeps_shape: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2):
            raise StackError(f"{self.name} has {self.bits} bits; give 8, 4 or 2")

    @property
    def levels(self) -> int:
        """Codes are whole numbers from minus this to this."""
        return int(2 ** (self.bits - 1)) - 1

    def layout(self, size: int, dtype: torch.dtype) -> Mapping[str, Part]:  # noqa: ARG002
        blocks = blocks_of(size)
        return {
            "steps": Part(torch.float32, blocks),
            "codes": Part(torch.uint8, blocks * BLOCK * self.bits // 8),
        }

    def pack(self, vector: Tensor, bound: float, ctx: NodeContext) -> Parts:
        values = vector.detach().to(torch.float32).contiguous().numpy()
        draws = np.random.SFC64([ctx.seed, *_some_bits(values)])
        blocks = blocks_of(values.size)
        steps = np.empty(blocks, np.float32)
        codes = np.empty((blocks, BLOCK * self.bits // 8), np.uint8)
        room, squares = np.empty((2, PIECE, BLOCK), np.float32), 0.0
        with np.errstate(invalid="ignore", over="ignore"):  # the server refuses what is not finite
            for start in range(0, blocks, PIECE):
                here = slice(start, min(start + PIECE, blocks))
                count = here.stop - start
                piece = padded(values, start, count, room[0])
                whole = self._rounded(piece, steps[here], room[1, :count], draws)
                if math.isfinite(bound):
                    each = np.einsum("ij,ij->i", whole, whole, dtype=np.float64)
                    squares += float(each @ steps[here].astype(np.float64) ** 2)
                self._squeeze(whole, codes[here])
        if math.isfinite(bound) and math.sqrt(squares) > bound * SHRINK:
            steps *= np.float32(bound / math.sqrt(squares) * SHRINK**2)
        return {
            "steps": torch.from_numpy(steps),
            "codes": torch.from_numpy(codes.reshape(-1)),
        }

    def _rounded(self, piece: Floats, steps: Floats, out: Floats, draws: np.random.SFC64) -> Floats:
        """Blocks in steps, each coordinate rounded up or down at random; `steps` is written."""
        largest = np.maximum(piece.max(axis=1), -piece.min(axis=1))
        np.multiply(largest, _WIDER / np.float32(self.levels), out=steps)
        steps[steps < _LEAST] = 0
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
        words = draws.random_raw(piece.size // 4).view(np.uint16).reshape(piece.shape)
        np.multiply(words, np.float32(2.0**-16), out=out)
        out += np.float32(2.0**-17)
        out += piece * inverse[:, None]
        return np.floor(out, out=out)

    def _squeeze(self, whole: Floats, out: Bytes) -> None:
        """Codes in bytes: with b bits, the k-th part of a block's 8 / b is at bit k b of them."""
        codes = whole.astype(np.int8).view(np.uint8)
        each = 8 // self.bits
        if each == 1:
            out[...] = codes
            return
        width = BLOCK // each
        mask = np.uint8((1 << self.bits) - 1)
        out[...] = codes[:, :width] & mask
        for k in range(1, each):
            out |= (codes[:, k * width : (k + 1) * width] & mask) << np.uint8(k * self.bits)

    def unpack(self, parts: Parts, size: int, dtype: torch.dtype) -> Tensor:
        steps = parts["steps"].numpy()
        if not (np.isfinite(steps).all() and (steps >= 0).all()):
            raise ValueError("an update with NaN or infinity: a step is no finite number from 0 up")
        codes = parts["codes"].numpy().reshape(len(steps), -1)
        out = np.empty((len(steps), BLOCK), np.float32)
        table = self._table()
        each = 8 // self.bits
        width = BLOCK // each
        with np.errstate(over="ignore"):  # whoever reads it refuses what is not finite
            for start in range(0, len(steps), PIECE):
                here = slice(start, start + PIECE)
                if each == 1:
                    np.multiply(codes[here].view(np.int8), steps[here, None], out=out[here])
                    continue
                for k in range(each):
                    part = out[here, k * width : (k + 1) * width]
                    np.take(table[k], codes[here], out=part, mode="clip")
                    part *= steps[here, None]
        return torch.from_numpy(out.reshape(-1)[:size]).to(dtype)

    def _table(self) -> list[Floats]:
        """For each place in a byte, the number that each value of the byte has there."""
        every = np.arange(256, dtype=np.uint8)
        top = 8 - self.bits
        return [
            ((every << np.uint8(top - k * self.bits)).view(np.int8) >> top).astype(np.float32)
            for k in range(8 // self.bits)
        ]


def _some_bits(values: Floats) -> list[int]:
    found: list[int] = values[:: max(1, values.size // _LOOKED_AT)].view(np.uint32).tolist()
    return found
