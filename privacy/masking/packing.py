"""Bit packing: integers modulo 2^B on the wire in B bits each.

The vector is cut into W rows of equal length (W = 32 up to B = 32, else 64), and every column of
W integers is packed into B words of W bits. Rows, not neighbours, share a word, so that packing
and unpacking are shifts over long contiguous rows. The last row is filled up with zeros: at
most W - 1 integers more than the vector has.
"""

import numpy as np
from numpy.typing import NDArray

from umbel.privacy.masking.masks import Words, reduce, word

_NARROW = 32
"""Up to this many columns all of it is done in a few operations on single bits: a hundred calls
for rows of a few words take ten times as long."""


def columns(size: int, bits: int) -> int:
    """How many integers stand in a row."""
    return -(-size // (word(bits).itemsize * 8))


def packed_bytes(size: int, bits: int) -> int:
    """The number of bytes on the wire for `size` integers modulo 2^bits."""
    return columns(size, bits) * bits * word(bits).itemsize


def empty_total(size: int, bits: int) -> Words:
    """A zero vector with room for the rows' filling; the first `size` entries are the vector."""
    return np.zeros(columns(size, bits) * word(bits).itemsize * 8, word(bits))


def pack(values: Words, bits: int) -> bytes:
    """Packs integers modulo 2^bits, shape (size,); bits above are cut off.

    Example:
        >>> pack(np.arange(10, dtype="<u4"), 20).__len__()
        80
    """
    kind = word(bits)
    rows = kind.itemsize * 8
    table = values
    if len(values) != columns(len(values), bits) * rows or values.dtype != kind:
        table = empty_total(len(values), bits)
        table[: len(values)] = values
    table = table.reshape(rows, -1)
    if 0 < table.shape[1] <= _NARROW:
        stream = np.unpackbits(_bytes_of_columns(table), axis=2, bitorder="little")[:, :, :bits]
        words = np.packbits(stream.reshape(table.shape[1], -1), axis=1, bitorder="little")
        return words.view(kind).T.tobytes()
    packed = np.zeros((bits, table.shape[1]), kind)
    # Two buffers for all rows: fresh memory can cost ten times the arithmetic.
    entry, shifted = np.empty(table.shape[1], kind), np.empty(table.shape[1], kind)
    for row in range(rows):
        place, shift = divmod(row * bits, rows)
        np.bitwise_and(table[row], kind.type((1 << bits) - 1), out=entry)
        np.left_shift(entry, kind.type(shift), out=shifted)
        packed[place] |= shifted
        if shift + bits > rows:
            np.right_shift(entry, kind.type(rows - shift), out=shifted)
            packed[place + 1] |= shifted
    return packed.tobytes()


def add_packed(total: Words, payload: bytes, bits: int) -> None:
    """Adds a packed vector to `total` in place; `total` comes from `empty_total`.

    Bits above the modulus may enter `total`: they are multiples of 2^bits and vanish when it is
    reduced, so they are not masked here.

    Raises:
        ValueError: if the payload has not exactly the length of such a vector.
    """
    kind = word(bits)
    rows = kind.itemsize * 8
    table = total.reshape(rows, -1)
    if len(payload) != table.shape[1] * bits * kind.itemsize:
        raise ValueError(
            f"A packed vector of {table.size} integers of {bits} bits has "
            f"{table.shape[1] * bits * kind.itemsize} bytes, not {len(payload)}."
        )
    packed = np.frombuffer(payload, kind).reshape(bits, -1)
    if 0 < table.shape[1] <= _NARROW:
        stream = np.unpackbits(_bytes_of_columns(packed), axis=2, bitorder="little")
        entries = np.zeros((table.shape[1], rows, rows), np.uint8)
        entries[:, :, :bits] = stream.reshape(table.shape[1], rows, bits)
        table += np.packbits(entries, axis=2, bitorder="little").view(kind)[:, :, 0].T
        return
    shifted = np.empty(table.shape[1], kind)
    for row in range(rows):
        place, shift = divmod(row * bits, rows)
        np.right_shift(packed[place], kind.type(shift), out=shifted)
        table[row] += shifted
        if shift + bits > rows:
            np.left_shift(packed[place + 1], kind.type(rows - shift), out=shifted)
            table[row] += shifted


def _bytes_of_columns(table: Words) -> NDArray[np.uint8]:
    """The bytes of each entry, column by column, shape (columns, rows, bytes)."""
    by_column = np.ascontiguousarray(table.T)
    return by_column.view(np.uint8).reshape(*by_column.shape, table.itemsize)


def unpack(payload: bytes, size: int, bits: int) -> Words:
    """The integers 0 .. 2^bits - 1, shape (size,), that `pack` was given."""
    total = empty_total(size, bits)
    add_packed(total, payload, bits)
    return reduce(total, bits)[:size]
