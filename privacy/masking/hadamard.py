"""The randomised Hadamard transform: a rotation that spreads an update evenly.

After random signs and an orthonormal Hadamard matrix no coordinate of an update is much larger
than norm / sqrt(size), whatever the update was, so that a modulus can be chosen tightly (Kairouz,
Liu and Steinke 2021, section 3). The matrix is H_m (x) H_2 (x) ... (x) H_2 with m of 1, 12, 20
or 28 (Paley 1933): sizes 1, 3/2, 5/4 and 7/4 times a power of two, so that filling up with zeros
costs at most a quarter, and not all again as with powers of two alone.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from umbel.privacy.masking.masks import expand

_FACTORS = (12, 20, 28)
_BLOCK = 6
"""Transforms of 2^6 at a time: one small matrix product instead of six passes over memory."""


def padded(size: int) -> int:
    """The smallest size of at least `size` for which there is a matrix here.

    Example:
        >>> [padded(n) for n in (1, 3, 17, 100, 1_000_000)]
        [1, 4, 20, 112, 1048576]
    """
    best: int = 1 << max(0, size - 1).bit_length()
    for factor in _FACTORS:
        rest = -(-size // factor)
        best = min(best, factor << max(0, rest - 1).bit_length())
    return best


def rotate(update: Tensor, seed: bytes) -> Tensor:
    """Signs, filling with zeros, and the orthonormal matrix; shape (padded(size),).

    Args:
        update: shape (size,), floating point.
        seed: 32 bytes that everybody knows; the same for all nodes of a sum.

    Guarantees: lengths are kept up to floating-point error.
    """
    size = padded(len(update))
    values = torch.zeros(size, dtype=update.dtype)
    values[: len(update)] = update
    return _transform(values * _signs(seed, size, update.dtype), transpose=False)


def rotate_back(rotated: Tensor, seed: bytes, size: int) -> Tensor:
    """The inverse of `rotate`, shape (size,)."""
    values = _transform(rotated, transpose=True)
    return (values * _signs(seed, len(rotated), rotated.dtype))[:size]


def _signs(seed: bytes, size: int, dtype: torch.dtype) -> Tensor:
    bits = torch.from_numpy(expand(seed, size, 1).astype("int8"))
    return (1 - 2 * bits).to(dtype)


def _transform(values: Tensor, *, transpose: bool) -> Tensor:
    size = len(values)
    factor = next((m for m in _FACTORS if size % m == 0 and _is_power(size // m)), 1)
    out = values
    if factor > 1:
        matrix = _paley(factor).to(values.dtype)
        out = (matrix.T if transpose else matrix) @ out.reshape(factor, -1)
    left = (size // factor).bit_length() - 1
    done = 1
    while left:
        bits = min(left, _BLOCK)
        matrix = _sylvester(bits).to(values.dtype)
        # The axis of these bits in the middle; what is done already is on the right.
        out = matrix @ out.reshape(-1, 1 << bits, done)
        done <<= bits
        left -= bits
    flat: Tensor = out.reshape(size) / math.sqrt(size)
    return flat


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


@lru_cache(maxsize=8)
def _sylvester(bits: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(matrix, two)
    return matrix


@lru_cache(maxsize=4)
def _paley(order: int) -> Tensor:
    """A Hadamard matrix of order 12 or 20 (Paley's first kind) or 28 (his second)."""
    prime = order - 1 if order in (12, 20) else order // 2 - 1
    residues = {x * x % prime for x in range(1, prime)}

    def character(x: int) -> float:
        return 0.0 if x % prime == 0 else (1.0 if x % prime in residues else -1.0)

    core = torch.tensor(
        [[character(i - j) for j in range(prime)] for i in range(prime)], dtype=torch.float64
    )
    border = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 0] = 1 if prime % 4 == 1 else -1
    border[1:, 1:] = core
    if prime % 4 == 3:
        return border + torch.eye(prime + 1, dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, other) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), zero)
