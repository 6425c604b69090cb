"""Clipping a flat update to an L2 norm, so that the bound really holds in floating point.

Two things go wrong in plain code: squares of large float32 numbers overflow to infinity (an
update of 1e30 becomes 0 or NaN), and `update * (norm / length)` can come out a little longer
than `norm`. Here lengths are taken in float64 after scaling by the largest coordinate, and a
clipped update is shrunk until its length, computed again, is within the bound.

Long updates are measured in float32 first, in short rows whose rounding is bounded; float64 is
needed only where that bound leaves a doubt.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.privacy.noise.lattice import grid_step, round_to_zero
from umbel.privacy.validate import positive

_PIECE = 1 << 13  # stays in the cache, and below where BLAS would start threads
_SMALL = 2.0**-100
"""A smaller factor would lose bits in float32."""
_HAIR = 2.0**-22
"""Rounding a factor and a product to float32 adds 2**-23 of it at most, so what is scaled to this
much below the norm stays below it."""
_ROW = 512
_DOUBT = 2.0**-14
"""The sum of a row's squares, in any order, is off by _ROW x 2**-24 = 2**-15 of itself at most
(Higham 2002, section 3.1), its root by half of that: this is four times as much."""
_LONG = 1 << 14
"""Coordinates from which a first look in float32 is worth the while."""
_LEAST, _MOST = 2.0**-30, 2.0**60
"""Lengths between which no square that matters underflows or overflows in float32."""


@dataclass(frozen=True)
class Clipped:
    """An update within the bound, and what it was before.

    Attributes:
        update: shape (size,), of the input's dtype, with an L2 norm of at most the bound.
        length: the L2 norm before clipping; private data of the node.
        was_clipped: the update was longer than the bound; private data of the node.
    """

    update: Tensor
    length: float
    was_clipped: bool


def l2_norm(update: Tensor) -> float:
    """The L2 norm of a tensor of any shape, in float64 and without overflow.

    Edge cases: an empty tensor has norm 0; a tensor with NaN has norm NaN; with an infinity,
    infinity.
    """
    if update.numel() == 0:
        return 0.0
    flat = update.detach().reshape(-1)
    if flat.dtype == torch.float32:
        return math.sqrt(_squares(flat.contiguous().numpy()))
    wide = flat.to(torch.float64)
    largest = float(wide.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(wide / largest))


def _squares(values: np.ndarray[Any, Any]) -> float:
    """The sum of squares, in float64: those of any float32 number fit."""
    total = 0.0
    for start in range(0, values.size, _PIECE):
        with np.errstate(invalid="ignore"):  # a signalling NaN is NaN as well
            piece = values[start : start + _PIECE].astype(np.float64)
        total += float(np.dot(piece, piece))
    return total


def _bounds(update: Tensor) -> tuple[float, float]:
    """Two numbers between which the L2 norm of a flat update lies; often they are equal."""
    if update.dtype == torch.float32 and update.numel() >= _LONG:
        flat = update.detach()
        whole = flat.numel() // _ROW * _ROW
        rows = torch.linalg.vector_norm(flat[:whole].reshape(-1, _ROW), dim=1).double()
        length = math.hypot(float(torch.linalg.vector_norm(rows)), l2_norm(flat[whole:]))
        if _LEAST < length < _MOST:  # not true of NaN
            return length * (1 - _DOUBT), length * (1 + _DOUBT)
    length = l2_norm(update)
    return length, length


def is_within(update: Tensor, limit: float) -> bool:
    """Whether `l2_norm(update) <= limit`, without computing it where that is clear.

    Edge cases: an update with NaN or an infinity is not within any finite limit.

    Args:
        update: shape (size,), floating point.
        limit: in the update's own unit.
    """
    low, high = _bounds(update)
    if high <= limit:
        return True
    return not low > limit and l2_norm(update) <= limit


def clip(update: Tensor, norm: float) -> Clipped:
    """Scale an update down to an L2 norm of at most `norm`; shorter ones are left as they are.

    Guarantees: `l2_norm(result.update) <= norm`, as computed in float64.

    Edge cases: the zero update stays zero. 1e30 is scaled like any other number.

    Args:
        update: shape (size,), floating point, finite.
        norm: the bound, above 0, in the update's own unit.

    Raises:
        ValueError: the norm is not positive, or the update is not floating point or not finite.

    Example:
        >>> clip(torch.tensor([3.0, 4.0]), norm=1.0).update.tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    _check(update, norm)
    length = l2_norm(update)
    _check_finite(length)
    if length <= norm:
        return Clipped(update, length, was_clipped=False)
    return Clipped(_shrink(update, norm, length), length, was_clipped=True)


def clip_to_grid(update: Tensor, norm: float) -> Clipped:
    """`clip`, then `round_to_zero` to the norm's grid, with fewer passes over a long update.

    Guarantees: `l2_norm(result.update) <= norm`, and every coordinate is on `grid_step(norm)`.
    A long update may come out shorter than the norm by a part of 2**-13; `result.length` is then
    the length in float32.

    Args:
        update: shape (size,), floating point, finite; not mutated.
        norm: the bound, above 0, in the update's own unit.

    Raises:
        ValueError: as `clip`.
    """
    _check(update, norm)
    step = grid_step(norm)
    low, high = _bounds(update)
    if not low < high or low <= norm < high or not _LEAST < norm < _MOST:
        result = clip(update, norm)
        return Clipped(round_to_zero(result.update, step), result.length, result.was_clipped)
    length = (low + high) / 2
    if high <= norm:
        return Clipped(round_to_zero(update, step), length, was_clipped=False)
    factor = norm / high * (1 - _HAIR)
    return Clipped(round_to_zero(update, step, factor), length, was_clipped=True)


def _check(update: Tensor, norm: float) -> None:
    positive(norm=norm)
    if not update.is_floating_point():
        raise ValueError(
            f"only floating-point updates can be clipped, but this one is {update.dtype}; "
            "keep integer buffers out of the update"
        )


def _check_finite(length: float) -> None:
    if not math.isfinite(length):
        raise ValueError("the update is not finite; a NaN or infinite update must be rejected")


def _shrink(update: Tensor, norm: float, length: float) -> Tensor:
    factor = norm / length * (1 - _HAIR)
    if factor >= _SMALL and update.dtype in (torch.float32, torch.float64):
        return update * factor
    step = 2.0**-22
    while True:
        shrunk = (update.to(torch.float64) * factor).to(update.dtype)
        if l2_norm(shrunk) <= norm:
            return shrunk
        factor *= 1 - step
        step *= 2
