"""A streaming sum whose bits do not depend on the order in which the terms arrive.

Floating-point addition is not associative, so the order is fixed: terms are added by their
position in the cohort. A term that comes early is held back, in memory up to a limit and in an
unnamed temporary file beyond it. Memory is a few models, whatever the number of replies.

Terms that are multiples of a grid, each below a bound, are added up exactly: in single precision
as many at a time as cannot round, the rest in double precision.
"""

import math
import tempfile
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""Terms that are added in the vector's own precision before they go into the float64 total."""
_SINGLE = 2.0**24
"""Up to here float32 holds every whole number."""


def exact_block(bound: float | None, grid: float | None) -> int:
    """How many multiples of `grid`, none above `bound`, float32 adds up without rounding.

    Of vectors, whose coordinates are not above their L2 norm. At most `BLOCK`; without a grid or
    a bound nothing is exact, and `BLOCK` is as good as another number.
    """
    if bound is None or grid is None:
        return BLOCK
    return max(0, min(BLOCK, math.floor(_SINGLE * grid / bound)))


@dataclass
class _Held:
    weight: float
    vector: Tensor | None
    offset: int = 0


class OrderedSum:
    """The weighted sum of vectors of one size, offered in any order, added in one.

    Args:
        size: coordinates of a vector.
        dtype: float32 or float64.
        hold_bytes: how much of the early terms is kept in memory.
        block: terms that are added up in float32 before they go into a float64 total.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, hold_bytes: int = 32 << 20, block: int = BLOCK
    ) -> None:
        self._block = torch.zeros(size, dtype=dtype)
        self._total: Tensor | None = None
        self._in_block = 0
        self._next = 0
        self._held: dict[int, _Held | None] = {}
        self._most = block
        self._room = hold_bytes
        self._file: IO[bytes] | None = None

    def offer(self, position: int, vector: Tensor, weight: float) -> None:
        """Take the term at `position` in the cohort; each position is offered or skipped once."""
        if position == self._next:
            self._add(vector, weight)
            self._advance()
        else:
            self._held[position] = self._hold(vector, weight)

    def skip(self, position: int) -> None:
        """Say that no term will come for `position`."""
        if position == self._next:
            self._advance()
        else:
            self._held[position] = None

    def finish(self) -> Tensor:
        """The sum over all offered terms, of shape (size,) in float64 or the vectors' dtype."""
        for position in sorted(self._held):
            self._take(self._held.pop(position))
        self._close()
        return self._block if self._total is None else self._total.add_(self._block)

    def merge(self, other: "OrderedSum") -> None:
        """Take the terms of another part of the same sum, which is used up.

        One of the parts may have begun, at the first place; the others hold all that they have,
        so that the bits are those of one sum in order.

        Raises:
            ValueError: both have begun, so a place was offered twice.
        """
        if other._next and self._next:
            raise ValueError("two parts of one sum both have its first place")
        if other._next:
            self._adopt(other)
        for position in sorted(other._held):
            held = other._held.pop(position)
            self._held[position] = (
                None if held is None else self._hold(other._vector(held), held.weight)
            )
        other._close()
        self._drain()

    def _adopt(self, other: "OrderedSum") -> None:
        """Go on where another part is."""
        self._block, self._total = other._block, other._total
        self._in_block, self._next = other._in_block, other._next

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _advance(self) -> None:
        self._next += 1
        self._drain()

    def _drain(self) -> None:
        while self._next in self._held:
            self._take(self._held.pop(self._next))
            self._next += 1

    def _hold(self, vector: Tensor, weight: float) -> _Held:
        vector = vector.to(self._block.dtype)  # as it will be read back from the file
        need = vector.numel() * vector.element_size()
        if need <= self._room:
            self._room -= need
            return _Held(weight, vector)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="umbel-fold-")  # noqa: SIM115
        offset = self._file.seek(0, 2)
        self._file.write(vector.numpy().data)
        return _Held(weight, None, offset)

    def _take(self, held: _Held | None) -> None:
        if held is None:
            return
        self._add(self._vector(held), held.weight)

    def _vector(self, held: _Held) -> Tensor:
        """A term that was held back."""
        if held.vector is not None:
            self._room += held.vector.numel() * held.vector.element_size()
            return held.vector
        assert self._file is not None
        self._file.seek(held.offset)
        values = np.empty(self._block.numel(), self._block.numpy().dtype)
        self._file.readinto(values.data)  # type: ignore[attr-defined]
        return torch.from_numpy(values)

    def _add(self, vector: Tensor, weight: float) -> None:
        self._block.add_(vector, alpha=weight)
        self._in_block += 1
        if self._in_block == self._most and self._block.dtype == torch.float32:
            if self._total is None:
                self._total = torch.zeros(self._block.numel(), dtype=torch.float64)
            self._total.add_(self._block)
            self._block.zero_()
            self._in_block = 0
