"""Scattering features: a fixed, data-independent description of an image.

The transform (Mallat 2012; Bruna and Mallat 2013, section 2) is a convolutional network whose
filters are Morlet wavelets and that learns nothing:

    order 0    x * phi
    order 1    | x * psi(j1, t1) | * phi
    order 2    || x * psi(j1, t1) | * psi(j2, t2) | * phi        j2 > j1

Every node computes its own features, so they cost no privacy; a linear model on top of them is
what makes private learning work with few users (Tramer and Boneh 2021). Filters, sampling and
order of channels are those of Kymatio's `Scattering2D`, so results can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Real = NDArray[np.float64]

_CHUNK = 64
"""Images at a time: the second order's intermediate results then stay in the cache."""


@dataclass(frozen=True)
class Scattering:
    """A scattering transform for images of one size.

    Attributes:
        height: rows of an image, in pixels.
        width: columns of an image, in pixels.
        scales: J; the output is averaged over, and sampled every, 2^J pixels.
        angles: L; orientations of the wavelets over half a turn.
        order: 1 or 2.

    Raises:
        ValueError: a size, a number of scales or angles, or an order that makes no transform.

    Example:
        >>> transform = Scattering(28, 28, scales=2)
        >>> transform.channels, transform(torch.zeros(5, 28, 28)).shape
        (81, torch.Size([5, 81, 7, 7]))
    """

    height: int = 28
    width: int = 28
    scales: int = 2
    angles: int = 8
    order: int = 2

    def __post_init__(self) -> None:
        if self.scales < 1 or self.angles < 1 or self.order not in (1, 2):
            raise ValueError(
                f"a scattering transform has at least one scale and one angle and is of order 1 "
                f"or 2, not scales={self.scales}, angles={self.angles}, order={self.order}"
            )
        if min(self.height, self.width) < 2**self.scales:
            raise ValueError(
                f"images of {self.height} x {self.width} pixels are too small for "
                f"{self.scales} scales; use at most {min(self.height, self.width).bit_length() - 1}"
            )

    @property
    def channels(self) -> int:
        """Channels of the output: 1 + L J + L^2 J (J - 1) / 2 at order 2."""
        j, l = self.scales, self.angles  # noqa: E741
        second = l * l * j * (j - 1) // 2 if self.order == 2 else 0
        return 1 + l * j + second

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of one image's features."""
        step = 2**self.scales
        return self.channels, self.height // step, self.width // step

    @property
    def size(self) -> int:
        """Numbers that describe one image."""
        channels, rows, columns = self.shape
        return channels * rows * columns

    def __call__(self, images: Tensor) -> Tensor:
        """The features of some images.

        Args:
            images: shape (n, height, width), any real dtype; values are used as they are.

        Returns:
            float32, shape (n, channels, height // 2^J, width // 2^J), order by order.

        Raises:
            ValueError: the images have another size.
        """
        if images.shape[1:] != (self.height, self.width):
            raise ValueError(
                f"this transform is for images of {self.height} x {self.width} pixels, but the "
                f"batch has the shape {tuple(images.shape)}"
            )
        out = torch.empty((len(images), *self.shape))
        for start in range(0, len(images), _CHUNK):
            stop = start + _CHUNK
            out[start:stop] = _transform(images[start:stop].float(), self)
        return out


@dataclass(frozen=True)
class _Bank:
    """Filters of one transform; `waves[j][r]` has shape (L, rows, columns, 2) at resolution r."""

    padding: tuple[int, int, int, int]
    waves: tuple[tuple[Tensor, ...], ...]
    lows: tuple[tuple[Tensor, Tensor], ...]


def _transform(images: Tensor, kind: Scattering) -> Tensor:
    bank = _bank(kind)
    padded = torch.nn.functional.pad(images[:, None], bank.padding, mode="reflect")[:, 0]
    spectrum = torch.fft.fft2(padded)[:, None]
    zeroth = _smooth(padded[:, None], bank.lows[0])
    first, second = [], []
    for j1 in range(kind.scales):
        u1 = _propagate(spectrum, bank.waves[j1][0], 2**j1)
        first.append(_smooth(u1, bank.lows[j1]))
        if kind.order == 2 and j1 + 1 < kind.scales:
            second.append(_second(u1, j1, bank, kind))
    return torch.cat([zeroth, *first, *second], 1)


def _second(u1: Tensor, j1: int, bank: _Bank, kind: Scattering) -> Tensor:
    """The second order below one first scale, with (t1, j2, t2) as order of the channels."""
    spectrum = torch.fft.fft2(u1)[:, :, None]
    parts = []
    for j2 in range(j1 + 1, kind.scales):
        u2 = _propagate(spectrum, bank.waves[j2][j1], 2 ** (j2 - j1))
        parts.append(_smooth(u2, bank.lows[j2]))
    joined = torch.stack(parts, 2)
    return joined.reshape(len(u1), -1, *joined.shape[-2:])


def _propagate(spectrum: Tensor, wave: Tensor, step: int) -> Tensor:
    """The modulus of a filtered signal, sampled every `step` pixels.

    Args:
        spectrum: complex, shape (..., 1, rows, columns).
        wave: real, shape (L, rows, columns, 2): the filter, once for each part of a number.
        step: sampling is the mean over the aliases in the Fourier domain.

    Returns:
        shape (..., L, rows // step, columns // step).
    """
    rows, columns = spectrum.shape[-2] // step, spectrum.shape[-1] // step
    parts = torch.view_as_real(spectrum)
    total: Tensor | None = None
    for a, b in _aliases(step):
        window = (..., slice(a * rows, (a + 1) * rows), slice(b * columns, (b + 1) * columns))
        left, right = parts[(*window, slice(None))], wave[(*window, slice(None))]
        total = left * right if total is None else total.addcmul_(left, right)
    assert total is not None  # step is at least 1
    signal = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(total)))
    real, imaginary = signal[..., 0], signal[..., 1]
    return (real * real).addcmul_(imaginary, imaginary).sqrt_()  # `abs` is nine times slower


def _aliases(step: int) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(step) for b in range(step))


def _smooth(signal: Tensor, low: tuple[Tensor, Tensor]) -> Tensor:
    """Blur, sample and cut the padding off: phi is separable, so these are two matrices."""
    return low[0] @ signal @ low[1].T


@lru_cache(maxsize=8)
def _bank(kind: Scattering) -> _Bank:
    sides = [_padded(length, kind.scales) for length in (kind.height, kind.width)]
    top, left = (sides[0] - kind.height) // 2, (sides[1] - kind.width) // 2
    padding = (left, sides[1] - kind.width - left, top, sides[0] - kind.height - top)
    waves = []
    for j in range(kind.scales):
        turns = [(kind.angles - kind.angles // 2 - 1 - t) * pi / kind.angles
                 for t in range(kind.angles)]  # fmt: skip
        full = [_morlet(sides, 0.8 * 2**j, turn, 0.75 * pi / 2**j, 4 / kind.angles)
                for turn in turns]  # fmt: skip
        waves.append(tuple(_doubled([_coarser(f, r) for f in full], 4 ** (r - j))
                           for r in range(j + 1)))  # fmt: skip
    lows = [
        (_low(sides[0], r, kind.scales), _low(sides[1], r, kind.scales)) for r in range(kind.scales)
    ]
    return _Bank(padding, tuple(waves), tuple(lows))


def _padded(length: int, scales: int) -> int:
    """The next multiple of 2^J that leaves one output sample of margin on either side."""
    step = 1 << scales
    return ((length + step) // step + 1) * step


def _doubled(filters: list[Real], scale: float) -> Tensor:
    """Filters as a tensor; `scale` makes the sum over aliases their mean."""
    stacked = torch.from_numpy(np.stack(filters) * scale).float()
    return torch.stack([stacked, stacked], -1)


def _morlet(sides: list[int], sigma: float, turn: float, frequency: float, slant: float) -> Real:
    """The Fourier transform of a periodic Morlet wavelet of mean zero, shape `sides`."""
    rows, columns = (np.arange(-2 * side, 3 * side, dtype=np.float64) for side in sides)
    y, x = rows[:, None], columns[None, :]
    along, across = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    gabor = _wrapped(envelope * np.exp(1j * frequency * along), sides)
    window = _wrapped(envelope.astype(np.complex128), sides)
    wavelet = gabor - gabor.sum() / window.sum() * window
    result: Real = np.fft.fft2(wavelet).real * slant / (2 * pi * sigma**2)
    return result


def _wrapped(signal: NDArray[np.complex128], sides: list[int]) -> NDArray[np.complex128]:
    """The sum of the five copies of a signal in either direction: its periodic version."""
    folded: NDArray[np.complex128] = signal.reshape(5, sides[0], 5, sides[1]).sum((0, 2))
    return folded


def _coarser(spectrum: Real, resolution: int) -> Real:
    """A filter's spectrum for a signal that is sampled every 2^resolution pixels."""
    for axis in range(spectrum.ndim):
        length = spectrum.shape[axis]
        kept = length >> resolution
        index = np.arange(length)
        start = length >> (resolution + 1)
        blocked = (index >= start) & (index < start + length - kept) & (resolution > 0)
        shape = [-1 if a == axis else 1 for a in range(spectrum.ndim)]
        masked = np.where(blocked.reshape(shape), 0.0, spectrum)
        folded = (*masked.shape[:axis], 1 << resolution, kept, *masked.shape[axis + 1 :])
        spectrum = masked.reshape(folded).sum(axis)
    return spectrum


def _low(side: int, resolution: int, scales: int) -> Tensor:
    """phi along one axis as a matrix from a padded signal at `resolution` to the output."""
    sigma = 0.8 * 2 ** (scales - 1)
    points = np.arange(-2 * side, 3 * side, dtype=np.float64)
    bell = np.exp(-(points**2) / (2 * sigma**2)).reshape(5, side).sum(0)
    spectrum = np.fft.fft(bell).real / np.sqrt(2 * pi * sigma**2)
    kernel = np.fft.ifft(_coarser(spectrum, resolution)).real
    length, step = side >> resolution, 2 ** (scales - resolution)
    outputs = np.arange(step, length - step, step)
    matrix = kernel[(outputs[:, None] - np.arange(length)[None, :]) % length]
    return torch.from_numpy(matrix).float()
