"""Gaussian noise on a lattice: what is released never betrays the value by its low bits.

Adding a floating-point normal to a floating-point value gives a sum whose possible values
depend on the value (Mironov 2012; Jin et al. 2021, 2022): one coordinate can decide which of
two inputs it was. Here the sum that is released is

    round(x + N),   N ~ Normal(0, steps^2),   x the real value in lattice steps

drawn as a whole number and never as a float. It is post-processing of the exact Gaussian
mechanism, so the accountant's numbers apply unchanged, and every output lies on a lattice that
does not depend on the data.

Whole x: the noise is a rounded Gaussian, P(k) = Phi((k+1/2)/steps) - Phi((k-1/2)/steps), drawn
from a table of cumulative probabilities with 64 bits through a guide table (Chen and Asau
1974): sixteen random bits choose a cell, sixteen more decide within it, and the few draws that
these leave open are settled by 32 more bits and a search. Real x = a + r with 0 <= r < 1:
round(x + N) = a + k + [v >= 1/2 - r], where v is the position of N within the cell of k; the
bracket is one comparison of 64 random bits with its exact conditional probability, see
`_add`. All randomness is AES-256-CTR keyed by the operating system, see
`umbel.privacy.noise.entropy`.

The total-variation distance between a draw and its exact law is computed, not guessed, and
returned by `LatticeGaussian.tv_per_sample`: add (number of samples) x that to delta.

Not constant-time: a table look-up may touch memory in an order that depends on the noise. The
process that draws central noise knows the value without noise as well.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.validate import positive

STEPS = 128
"""Standard deviation of central noise in lattice steps."""

MANTISSA = 17
"""Bits between the clipping norm and the grid that updates are rounded to: 32 updates, even twice
as long as the norm, add up in float32 without rounding (`umbel.strategies.ordered_sum` adds as many
at a time as the bound and the grid allow)."""

_CHUNK = 1 << 16
_PIECE = 1 << 16
_ADDED = 1 << 16
_NUMPY = (torch.float32, torch.float64)
_LOW = np.uint32(0xFFFF)
_SHIFT = np.uint32(16)


def grid_step(norm: float) -> float:
    """The grid that clipped updates are rounded to: the power of two near norm / 2**17.

    Every multiple of it up to `norm` is a float32 exactly, and float64 adds up to 2**34 such
    updates without rounding, so their sum does not depend on the order of arrival.

    Raises:
        ValueError: the norm is not positive.
    """
    return math.ldexp(1.0, math.frexp(positive(norm=norm))[1] - 1 - MANTISSA)


def round_to_zero(update: Tensor, step: float, factor: float = 1.0) -> Tensor:
    """Each coordinate to the multiple of `step` between it and zero that is nearest to it.

    Guarantees: no coordinate grows in absolute value, so neither does the L2 norm. With a factor
    each is at most `factor` times what it was, and 2**-22 of that for rounding.

    Args:
        update: shape (size,), floating point and finite; not mutated.
        step: a power of two, as from `grid_step`.
        factor: multiplies the update first.

    Raises:
        ValueError: the step is not a power of two.
    """
    if math.frexp(positive(step=step))[0] != 0.5:
        raise ValueError(f"step must be a power of two to divide exactly, but it is {step!r}")
    if update.dtype not in _NUMPY:
        return torch.trunc(update * (factor / step)) * step
    source = update.detach().contiguous().numpy()
    rounded = np.empty_like(source)
    scale = source.dtype.type(factor / step)
    for start in range(0, source.size, _PIECE):  # by pieces, as memory is slower than arithmetic
        piece = rounded[start : start + _PIECE]
        np.multiply(source[start : start + _PIECE], scale, out=piece)
        np.trunc(piece, out=piece)
        np.multiply(piece, source.dtype.type(step), out=piece)
    return torch.from_numpy(rounded)


def on_grid(update: Tensor, step: float) -> bool:
    """Whether every coordinate is a multiple of `step`, a power of two."""
    if update.dtype not in _NUMPY:
        return bool(torch.equal(update / step, (update / step).round()))
    source = update.detach().contiguous().numpy()
    inverse = source.dtype.type(1 / step)
    scaled, whole = np.empty((2, min(source.size, _PIECE)), source.dtype)
    for start in range(0, source.size, _PIECE):
        piece = source[start : start + _PIECE]
        np.multiply(piece, inverse, out=scaled[: piece.size])
        np.rint(scaled[: piece.size], out=whole[: piece.size])
        if not (scaled[: piece.size] == whole[: piece.size]).all():
            return False
    return True


@dataclass(frozen=True)
class _Table:
    """Cumulative probabilities of a rounded Gaussian, and the guide into them.

    Attributes:
        lowest: the smallest value.
        limits: shape (values - 1,), uint64; value i is lowest + i iff limits[i-1] <= u < limits[i].
        guide: shape (65536,), uint32; high half the index at the start of a cell, low half the
            one limit inside it, if there is one.
        first, last: cells from first up to last hold one limit at most.
        tv: half the sum of absolute differences to the exact probabilities, rounded up.
    """

    lowest: int
    limits: np.ndarray[Any, np.dtype[np.uint64]]
    guide: np.ndarray[Any, np.dtype[np.uint32]]
    first: int
    last: int
    tv: float


@functools.lru_cache(maxsize=8)
def _table(steps: float) -> _Table:
    import mpmath  # only who draws noise needs it

    with mpmath.workprec(160):
        scale = mpmath.mpf(steps) * mpmath.sqrt(2)
        upper: list[Any] = []  # P(X > k) for k = 0, 1, ...
        while not upper or upper[-1] * 2**65 > 1:
            upper.append(mpmath.erfc((len(upper) + mpmath.mpf(0.5)) / scale) / 2)
        below = [*reversed(upper), *(1 - tail for tail in upper)]  # P(X <= k), k = -K-1 .. K
        units = [int(mpmath.nint(mass * 2**64)) for mass in below]
        # The last value takes what is left, so the last limit is not needed.
        units[-1] = 2**64
        exact = [mpmath.mpf(0), *below]
        drawn = [mpmath.mpf(0), *(mpmath.mpf(unit) / 2**64 for unit in units)]
        away = mpmath.fsum(
            abs((drawn[i + 1] - drawn[i]) - (exact[i + 1] - exact[i])) for i in range(len(below))
        )
        tv = float((away + upper[-1]) / 2 * (1 + mpmath.mpf(2) ** -40))
    limits = np.array(units[:-1], dtype=np.uint64)
    starts = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    index = np.searchsorted(limits, starts, side="right")
    held = np.diff(np.append(index, len(limits)))
    inside = np.append(limits, np.uint64(0))[index] >> np.uint64(32)
    low = np.where(held > 0, inside & np.uint64(0xFFFF), np.uint64(0xFFFF))
    guide = (index.astype(np.uint32) << _SHIFT) | low.astype(np.uint32)
    crowded = np.flatnonzero(held > 1)
    middle = 1 << 15
    first = int(crowded[crowded < middle].max(initial=-1)) + 1
    last = int(crowded[crowded >= middle].min(initial=1 << 16))
    return _Table(-len(upper), limits, guide, first, last, tv)


class LatticeGaussian:
    """Draws Gaussian noise of standard deviation `steps` as whole numbers of lattice steps.

    Args:
        steps: standard deviation in lattice steps, between 8 and 2048.
        entropy: where random bits come from; the operating system unless given.

    Raises:
        ValueError: steps is out of range.

    Example:
        >>> noise = LatticeGaussian(128).sample(1000)
        >>> noise.dtype, bool(abs(noise.mean()) < 40)
        (dtype('int32'), True)
    """

    def __init__(self, steps: float = STEPS, entropy: Entropy | None = None) -> None:
        if not 8 <= positive(steps=steps) <= 2048:
            raise ValueError(f"steps must lie between 8 and 2048, but it is {steps!r}")
        self.steps = float(steps)
        self.entropy = entropy or Entropy()
        self._table = _table(self.steps)

    @property
    def tv_per_sample(self) -> float:
        """Total-variation distance of one draw of `sample` or `add` to its exact law."""
        # The carry is wrong by 2**-51 of its tilt's bound, (|k| + 1) / (4 steps^2), at most, which
        # averages to less than a quarter of 2**-51 / steps, and by 2**-64 as an integer.
        return self._table.tv + 2.0**-51 / self.steps

    def sample(self, size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Rounded Gaussians, shape (size,), in lattice steps."""
        out = np.empty(size, dtype=np.int32)
        spare = np.empty((4, min(size, _CHUNK)), dtype=np.uint32)
        for start in range(0, size, _CHUNK):
            piece = out[start : start + _CHUNK]
            self._draw(spare[:, : len(piece)], piece)
        return out

    def _draw(
        self,
        spare: np.ndarray[Any, np.dtype[np.uint32]],
        out: np.ndarray[Any, np.dtype[np.int32]],
    ) -> None:
        table = self._table
        words, cell, entry, low = spare
        self.entropy.fill(words)
        np.right_shift(words, _SHIFT, out=cell)
        np.take(table.guide, cell, out=entry, mode="clip")
        np.bitwise_and(words, _LOW, out=low)
        np.right_shift(entry, _SHIFT, out=out.view(np.uint32))
        np.bitwise_and(entry, _LOW, out=entry)
        np.add(out, low >= entry, out=out)
        np.add(out, table.lowest, out=out)
        np.subtract(cell, np.uint32(table.first), out=cell)
        undecided = np.flatnonzero((low == entry) | (cell >= np.uint32(table.last - table.first)))
        full = (words[undecided].astype(np.uint64) << np.uint64(32)) | self.entropy.words32(
            len(undecided)
        )
        found = np.searchsorted(table.limits, full, side="right")
        out[undecided] = found.astype(np.int32) + np.int32(table.lowest)

    def add(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, Any]:
        """round(values + N) as whole numbers, where N has standard deviation `steps`.

        Args:
            values: shape (size,), float64, in lattice steps, below 2**52 in absolute value.

        Returns:
            Shape (size,), float64 that holds whole numbers.

        Raises:
            ValueError: a value is not finite or too large to have a place on the lattice.
        """
        out = np.empty_like(values)
        spare = _Spare.of(min(len(values), _ADDED))
        near = [
            self._add(values[start : start + _ADDED], out[start : start + _ADDED], spare, start)
            for start in range(0, len(values), _ADDED)
        ]
        if near:
            self._settle(out, _Near(*map(np.concatenate, zip(*near, strict=True))))
        return out

    def _add(
        self, values: np.ndarray[Any, Any], out: np.ndarray[Any, Any], spare: "_Spare", start: int
    ) -> "_Near":
        """`add` for the piece at `start`, but for the few carries that need more bits.

        With v the position of N in the cell k of its noise, there is a carry if v >= 1/2 - rest:
        with the probability rest + tilt(k, rest), where |tilt| is below a bound that few draws
        come near. So 32 bits decide almost every comparison.
        """
        rest, noise, words, limit, wide = spare.cut(len(values))
        np.floor(values, out=out)
        if not max(out.max(), -out.min()) < 2.0**52:  # also true of NaN
            raise ValueError(
                "values to protect must be finite and below 2**52 lattice steps; a sum this far "
                "off holds an update that was never clipped"
            )
        np.subtract(values, out, out=rest)
        # A value just below a whole number leaves 1 - tiny, which rounds to 1: it is that number.
        if rest.max() >= 1:
            up = np.flatnonzero(rest >= 1)
            out[up] += 1
            rest[up] = 0
        self._draw(spare.draw[:, : len(values)], noise)
        self.entropy.fill(words)
        np.multiply(rest, 2.0**32, out=wide)
        limit[...] = wide
        out += noise
        out += words < limit
        # |tilt| <= tanh(|t|/4)/2 < |t|/8 for a density e^(-tv), the wider part; twice that, safely,
        # one unit for the bits that are still to come and one for those that `limit` lost. A gap
        # that wraps around only looks near.
        unit = np.int32(math.ceil(2.0**30 / self.steps**2))
        gap = np.subtract(words, limit, out=limit).view(np.int32)
        np.abs(gap, out=gap)
        bound = np.abs(noise, out=spare.draw[0, : len(values)].view(np.int32))
        bound *= unit
        gap -= bound
        near = np.flatnonzero(gap <= unit + 2)
        near = near[rest[near] > 0]
        return _Near(near + start, rest[near], noise[near], words[near])

    def _settle(self, out: np.ndarray[Any, Any], near: "_Near") -> None:
        """Decide near comparisons with 64 bits, in place of what 32 had decided."""
        tilt = _tilt(near.rest, near.noise.astype(np.float64), self.steps)
        shift = np.abs(tilt * 2.0**64).astype(np.uint64)
        # rest has 53 bits and is below 1: this product and conversion are exact.
        limit = (near.rest * 2.0**64).astype(np.uint64)
        top = np.uint64(2**64 - 1)
        moved = np.where(
            tilt >= 0,
            np.where(limit > top - shift, top, limit + shift),
            np.where(limit < shift, np.uint64(0), limit - shift),
        )
        more = self.entropy.words32(len(tilt))
        carry = ((near.words.astype(np.uint64) << np.uint64(32)) | more) < moved
        before = near.words < (limit >> np.uint64(32))
        out[near.place] += carry.astype(np.float64) - before


class _Near(NamedTuple):
    """Draws whose carry is open, each of shape (n,).

    Attributes:
        place: where they are.
        rest: the fraction of the value.
        noise: the cell that was drawn.
        words: the first 32 bits.
    """

    place: np.ndarray[Any, Any]
    rest: np.ndarray[Any, Any]
    noise: np.ndarray[Any, Any]
    words: np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Spare:
    """Memory for a piece of `LatticeGaussian.add`, used for every piece in turn."""

    real: np.ndarray[Any, np.dtype[np.float64]]
    whole: np.ndarray[Any, np.dtype[np.uint32]]
    draw: np.ndarray[Any, np.dtype[np.uint32]]

    @classmethod
    def of(cls, size: int) -> "_Spare":
        return cls(
            np.empty((2, size)),
            np.empty((3, size), dtype=np.uint32),
            np.empty((4, size), dtype=np.uint32),
        )

    def cut(self, size: int) -> tuple[np.ndarray[Any, Any], ...]:
        """For `size` values: the rest, the noise, words, limit, and room for another rest."""
        rest, wide = self.real[:, :size]
        noise, words, limit = self.whole[:, :size]
        return rest, noise.view(np.int32), words, limit, wide


def _tilt(
    rest: np.ndarray[Any, Any], noise: np.ndarray[Any, Any], steps: float
) -> np.ndarray[Any, Any]:
    """P(v >= 1/2 - rest | the cell of `noise`) - rest, to about 2**-60.

    The density of v in [-1/2, 1/2] is proportional to exp(-t v - b v^2 / 2) with t = noise/steps^2
    and b = 1/steps^2. Its Taylor polynomial in v is integrated term by term; the constant term,
    which gives `rest`, is left out before anything is rounded.
    """
    t, b = noise / steps**2, 1.0 / steps**2
    # Coefficients of exp(-t v - b v^2/2): c[n+1] = -(t c[n] + b c[n-1]) / (n+1).
    before, now = np.zeros_like(t), np.ones_like(t)
    edge = 0.5 - rest
    power = edge.copy()
    upper, whole = np.zeros_like(t), np.zeros_like(t)
    for n in range(1, 25):
        before, now = now, -(t * now + b * before) / n
        # The integral of v^n over the upper part, and over the whole cell.
        power *= edge
        upper += now * (0.5 ** (n + 1) - power) / (n + 1)
        if n % 2 == 0:
            whole += now * 0.5**n / (n + 1)
            if np.abs(now).max(initial=0.0) * 0.5**n < 2.0**-70:
                break
    return (upper - rest * whole) / (1 + whole)
