"""Many nodes' updates as one object: clipped, put on a grid and added up, none of them formed.

A node with one example and one step of a linear model sends an outer product; a node that is
asked for a second moment sends a Gram matrix. Thousands of such updates are a few matrices.
Here each update is clipped by itself and rounded to a grid on which every sum is exact, so that
the total is what adding them one by one would give, whatever the order. Rounding never takes an
update over the norm: it goes toward zero, or room for it is left before.

    Vectors         values[i]
    OuterProducts   left[i] x right[i]
    Grams           x[i] x[i]^T

`total()` after `clipped(norm)` is a sum of `count` vectors, each of L2 norm `norm` at most.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from umbel.privacy.noise.lattice import MANTISSA, grid_step
from umbel.privacy.validate import positive

UNIT_STEP = 2.0**-13
"""Grid of the rows of an outer product, whose length is 1 at most."""
_LEFT_BITS = 10
_HALF = 32.0
"""The left factor's whole numbers are split into two parts below this."""
_GRAM_BITS = 13
_HAIR = 1 - 2.0**-40
_EXACT = float(1 << 24)
_CHUNK = 256
_TINY = 1e-12
_ADDED = 1 << (24 - MANTISSA - 1)
"""Rows of whole numbers below 2**(MANTISSA + 1) that float32 adds up exactly."""


class Bundle(Protocol):
    """Updates of several nodes."""

    @property
    def count(self) -> int:
        """How many updates there are."""
        ...

    def clipped(self, norm: float) -> "Bundle":
        """Each update no longer than `norm`, on a grid; one that is not finite becomes zero."""
        ...

    def total(self) -> Tensor:
        """Their sum, flat, float64; exact where they are on a grid."""
        ...


@dataclass(frozen=True)
class Vectors:
    """Updates as the rows of a matrix of shape (n, size).

    Attributes:
        values: the rows; whole numbers of `unit`, once they are on the grid.
        unit: None before.
    """

    values: Tensor
    unit: float | None = None

    @property
    def count(self) -> int:
        return len(self.values)

    def clipped(self, norm: float) -> "Vectors":
        step = grid_step(norm)
        single = self.values.dtype == torch.float32
        lengths = _lengths(self.values, norm)
        # Below by more than lengths and products in float32 may round.
        factor = _factor(lengths, norm * (1 - 2.0**-18) if single else norm)
        whole = self.values * (factor / step).to(self.values.dtype)[:, None]
        broken = ~torch.isfinite(lengths)
        if bool(broken.any()):
            whole[broken] = 0.0  # a factor of 0 does not make a NaN vanish
        return Vectors(whole.to(torch.int32).to(whole.dtype), step)  # faster than trunc

    def total(self) -> Tensor:
        """Float32 rows of whole numbers are added up in pieces that are too small to round."""
        if self.unit is None:
            return self.values.double().sum(0)
        total = torch.zeros(self.values.shape[1], dtype=torch.float64)
        for start in range(0, self.count, _ADDED):
            total += self.values[start : start + _ADDED].sum(0)
        return total.mul_(self.unit)


@dataclass(frozen=True)
class UnitRows:
    """Vectors of length 1 at most on the grid of `UNIT_STEP`.

    Attributes:
        whole: shape (n, size), whole numbers of steps; int16, or float32 that holds them.
        peak: the largest of their absolute values, or a bound of it.
    """

    whole: Tensor
    peak: int

    @classmethod
    def of(cls, vectors: Tensor) -> "UnitRows":
        """Vectors of shape (n, size), scaled to just below length 1 and rounded, as int16.

        Raises:
            ValueError: the vectors have so many coordinates that rounding could double them.
        """
        room = 0.5 * UNIT_STEP * math.sqrt(vectors.shape[1])
        if room > 0.5:
            raise ValueError(
                f"vectors of {vectors.shape[1]} coordinates are too long for this grid; "
                "use fewer features"
            )
        lengths = vectors.norm(dim=1, keepdim=True, dtype=torch.float64)
        scale = (1 - room) * (1 - 2.0**-20) / UNIT_STEP / lengths.clamp_min(1e-30)
        whole = torch.round(vectors * scale.to(torch.float32)).to(torch.int16)
        return cls(whole, int(whole.abs().max()) if whole.numel() else 0)


@dataclass(frozen=True)
class OuterProducts:
    """Updates left[i] x right[i], flattened in the order of (rows of left, columns of right).

    Attributes:
        left: shape (n, k); carries the updates' lengths.
        right: n rows of length 1 at most.
        unit: of `left` as whole numbers, once it is on the grid.
    """

    left: Tensor
    right: UnitRows
    unit: float | None = None

    @property
    def count(self) -> int:
        return len(self.left)

    def clipped(self, norm: float) -> "OuterProducts":
        unit = math.ldexp(grid_step(norm), MANTISSA - _LEFT_BITS)
        left = self.left.double()
        room = 0.5 * unit * math.sqrt(left.shape[1])
        scaled = left * _factor(left.norm(dim=1), norm - room)[:, None]
        whole = torch.round(torch.nan_to_num(scaled, 0.0, 0.0, 0.0) / unit)
        return OuterProducts(whole.float(), self.right, unit)

    def total(self) -> Tensor:
        """Sums of products of whole numbers, in float32 pieces that are too small to round."""
        if self.unit is None:
            left, right = self.left.double(), self.right.whole.double() * UNIT_STEP
            return (left.T @ right).flatten()
        high = torch.trunc(self.left / _HALF)
        halves = torch.cat([high, self.left - high * _HALF], 1)
        width, size = self.left.shape[1], self.right.whole.shape[1]
        total = torch.zeros(2 * width, size, dtype=torch.float64)
        peak = float(halves.abs().max()) * self.right.peak if self.count else 0.0
        piece = max(1, min(self.count, int(_EXACT / max(peak, 1.0))))
        for start in range(0, self.count, piece):
            rows = slice(start, start + piece)
            total += halves[rows].T @ self.right.whole[rows].float()
        return total[:width].mul_(_HALF).add_(total[width:]).mul_(self.unit * UNIT_STEP).flatten()


@dataclass(frozen=True)
class Grams:
    """Updates x[i] x[i]^T of x with shape (n, p, q): symmetric, flattened to p * p.

    A Gram matrix is no longer than the squared length of what it is made of.
    """

    values: Tensor
    on_grid: bool = False

    @property
    def count(self) -> int:
        return len(self.values)

    def clipped(self, norm: float) -> "Grams":
        bound = math.sqrt(positive(norm=norm))
        step = math.ldexp(grid_step(bound), MANTISSA - _GRAM_BITS)
        values = self.values.double()
        lengths = values.flatten(1).norm(dim=1)
        scaled = values * _factor(lengths, bound)[:, None, None]
        return Grams(torch.trunc(torch.nan_to_num(scaled, 0.0, 0.0, 0.0) / step) * step, True)

    def total(self) -> Tensor:
        side = self.values.shape[1]
        total = torch.zeros(side, side, dtype=torch.float64)
        for start in range(0, self.count, _CHUNK):
            piece = self.values[start : start + _CHUNK].double()
            flat = piece.transpose(0, 1).reshape(side, -1)
            total += flat @ flat.T
        return total.flatten()


def _lengths(values: Tensor, norm: float) -> Tensor:
    """Of each row, float64, to 2**-19 of itself; float32 squares are added up 32 at a time."""
    plain = values.dtype != torch.float32 or norm < _TINY
    squares = values if plain else values.square()
    if plain or (len(squares) and float(squares.max()) > 1 / _TINY):  # they may leave float32
        lengths: Tensor = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
        return lengths
    even = squares.shape[1] // 32 * 32
    sums = squares[:, :even].reshape(len(values), -1, 32).sum(2).sum(1, dtype=torch.float64)
    return (sums + squares[:, even:].sum(1, dtype=torch.float64)).sqrt()


def _factor(lengths: Tensor, norm: float) -> Tensor:
    """What each row is multiplied by, so that it is no longer than `norm`; 0 where it is NaN."""
    factor = (norm * _HAIR / lengths.clamp_min(1e-300)).clamp_max(1.0)
    return torch.where(torch.isfinite(lengths), factor, 0.0)
