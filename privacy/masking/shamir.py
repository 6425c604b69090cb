"""Shamir's secret sharing over the prime field of 2^256 + 297 elements.

A secret of 32 bytes is the constant term of a random polynomial of degree threshold - 1; a share
is the polynomial's value at the holder's point. Any `threshold` shares give the secret, fewer
say nothing about it (Shamir 1979). Integers of Python are not constant-time: a node that runs
beside its attacker on one processor is outside the threat model.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_DRAW_BYTES = 48
"""A coefficient is reduced from 384 bits: its bias is below 2^-127."""


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Shares of a secret, one for each point, in the points' order.

    Args:
        secret: 32 bytes.
        threshold: how many shares give the secret back; from 1 to the number of points.
        points: distinct, small and positive; zero would be the secret itself.

    Returns:
        Shares of 33 bytes.

    Raises:
        ValueError: if any of that does not hold.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"A secret has {SECRET_BYTES} bytes, not {len(secret)}.")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"A threshold of {threshold} needs that many points, not {len(points)}.")
    _check_points(points)
    drawn = os.urandom(_DRAW_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[start : start + _DRAW_BYTES]) % PRIME
        for start in range(0, len(drawn), _DRAW_BYTES)
    ]
    constant = int.from_bytes(secret)
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            # Not reduced in the loop: a point has few bits, so the number stays short.
            value = (value + coefficient) * point
        shares.append(((value + constant) % PRIME).to_bytes(SHARE_BYTES))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret that goes with shares by point; exactly as many as the threshold are enough.

    Returns:
        32 bytes, or None if the value at zero is no 32-byte number, which only forged or
        inconsistent shares can give.

    Raises:
        ValueError: for no share, a share that is no element of the field, or a bad point.
    """
    points = tuple(sorted(shares))
    value = 0
    for point, weight in zip(points, _weights(points), strict=True):
        share = int.from_bytes(shares[point])
        if len(shares[point]) != SHARE_BYTES or share >= PRIME:
            raise ValueError(f"The share at point {point} is no element of the field.")
        value += weight * share
    value %= PRIME
    return value.to_bytes(SECRET_BYTES) if value >> 256 == 0 else None


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at zero; kept, because a server uses one subset for many secrets."""
    if not points:
        raise ValueError("A secret cannot be found from no share.")
    _check_points(points)
    weights = []
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _check_points(points: Iterable[int]) -> None:
    seen = list(points)
    if min(seen) < 1 or max(seen) >= 1 << 32 or len(set(seen)) < len(seen):
        raise ValueError("Points must be distinct and between 1 and 2^32 - 1.")
