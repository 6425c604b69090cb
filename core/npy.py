"""Plain numbers in NumPy's file format, which is how Flower's arrays are serialised.

What other machines send has been held to its announcement before (`umbel.transport.npy`).
"""

import io
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.lib import format as npy

STYPE = "numpy.ndarray"
"""Flower's name of this serialisation."""

_PLAIN = frozenset(np.dtype(code) for code in "fde?BHILQbhilq")
"""What torch holds too, in this machine's byte order."""


@lru_cache(maxsize=256)
def header_of(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the values."""
    out = io.BytesIO()
    npy.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def values_in(data: bytes | memoryview, stype: str) -> np.ndarray[Any, Any]:
    """The array over these bytes: no copy.

    Raises:
        ValueError: they are not those of a plain numeric array in C order.
    """
    if stype != STYPE:
        raise ValueError(f"an array is serialised as {stype!r}, not as {STYPE!r}")
    dtype, shape, start = _read_header(bytes(data[: _header_length(data)]))
    if len(data) - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} came with {len(data)} bytes")
    if prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _header_length(data: bytes | memoryview) -> int:
    if data[:6] != npy.MAGIC_PREFIX or len(data) < 12:
        raise ValueError("an array's bytes do not begin like a saved numpy array")
    if data[6] == 1:
        return 10 + int.from_bytes(data[8:10], "little")
    return 12 + min(int.from_bytes(data[8:12], "little"), len(data))


@lru_cache(maxsize=256)
def _read_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    file = io.BytesIO(header)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"the format has no version {version}")
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # numpy's parser lets several kinds through on damaged text
        raise ValueError(f"an array's header cannot be read: {error}") from error
    if dtype not in _PLAIN or (fortran_order and len(shape) > 1):
        raise ValueError(f"an array has the dtype {dtype}, which is not plain numbers in C order")
    return dtype, shape, len(header)
