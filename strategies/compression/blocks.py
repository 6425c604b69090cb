"""Vectors in blocks of 1,024 coordinates, each with a scale of its own."""

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Coordinates of a block."""
PIECE = 32
"""Blocks that are worked on at once: with what is made of them they stay in the cache."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def blocks_of(size: int) -> int:
    """How many blocks `size` coordinates are; the last may be short."""
    return -(-size // BLOCK)


def padded(vector: Floats, start: int, count: int, room: Floats) -> Floats:
    """Blocks `start` to `start + count` of a vector, zeros behind its end.

    Args:
        vector: shape (size,).
        start: the first block.
        count: of blocks.
        room: memory of shape (PIECE, BLOCK) for a piece that is not whole.

    Returns:
        Shape (count, BLOCK); a view of the vector where that has so many.
    """
    values = vector[start * BLOCK : (start + count) * BLOCK]
    if values.size == count * BLOCK:
        return values.reshape(count, BLOCK)
    flat = room[:count].reshape(-1)
    flat[: values.size] = values
    flat[values.size :] = 0
    return room[:count]
