"""Whether data that says it is a `.npy` file is one, of exactly this dtype and shape.

`numpy.load` allocates what a file's header claims before it looks for the data, so a few bytes
could ask for all memory. Here the header is compared with what was announced, and the size with
what is there; a header as NumPy itself writes it is recognised by comparison, not parsed.

Apps of Flower's older interface (`client_fn`, `NumPyClient`) announce neither: their arrays say
dtype "" and shape (). There the header speaks for itself, and is held to the bytes behind it.
"""

import ast
import math
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy

_LONGEST_HEADER = 10_000
_DIMENSIONS = 64


class NpyError(Exception):
    """Data that is not the array it was announced to be."""


def check_npy(data: bytes, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise NpyError unless `data` is a `.npy` file of an array of this dtype and shape.

    An empty `dtype` announces nothing; the header then says what the bytes behind it must be.
    """
    if not dtype and not shape:
        start, found, kind = _parse(data)
        _headers(kind.str if kind.names is None else str(kind), found)
        _check_size(len(data) - start, kind.itemsize, str(kind), found)
        return
    expected, fortran, item = _headers(dtype, shape)
    header = expected if data.startswith(expected) else fortran
    start = len(header) if data.startswith(header) else _differently(data, dtype, shape)
    _check_size(len(data) - start, item, dtype, shape)


def _check_size(there: int, item: int, dtype: str, shape: tuple[int, ...]) -> None:
    size = item * math.prod(shape)
    if there != size:
        raise NpyError(
            f"an array of dtype {dtype:.80} and shape {shape} takes {size} bytes, and "
            f"{there} are there"
        )


@lru_cache(maxsize=4096)
def _headers(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes, int]:
    """The header that NumPy writes in C and in Fortran order, and the size of an item."""
    kind = _dtype(dtype)
    if len(shape) > _DIMENSIONS or any(length < 0 for length in shape):
        raise NpyError(f"{shape!r:.80} is not a shape")
    if math.prod(shape) * max(kind.itemsize, 1) >= 1 << 63:
        raise NpyError(f"no memory holds an array of shape {shape!r:.80}")
    headers = []
    for fortran in (False, True):
        file = BytesIO()
        fields = {"descr": npy.dtype_to_descr(kind), "fortran_order": fortran, "shape": shape}
        npy.write_array_header_1_0(file, fields)
        headers.append(file.getvalue())
    return headers[0], headers[1], kind.itemsize


def _dtype(name: str) -> np.dtype[np.generic]:
    try:
        # A structured dtype is written as the list or the dict that it is made of.
        kind = np.dtype(_literal(name) if name[:1] in ("[", "{") else name)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as problem:
        raise NpyError(f"{name!r:.80} is not a dtype") from problem
    if kind.hasobject or kind.subdtype is not None:
        raise NpyError(
            f"arrays of dtype {name!r:.80} do not travel: numbers, text and records of them do"
        )
    return kind


def _literal(name: str) -> Any:
    if len(name) > _LONGEST_HEADER:
        raise ValueError("too long")
    return ast.literal_eval(name)


def _differently(data: bytes, dtype: str, shape: tuple[int, ...]) -> int:
    """Where the data begins after a header that NumPy of today would write differently."""
    start, found, kind = _parse(data)
    if found != shape or kind != _dtype(dtype):
        raise NpyError(
            f"an array announced as {dtype:.80} of shape {shape} has a header that says {kind} "
            f"of shape {found}"
        )
    return start


def _parse(data: bytes) -> tuple[int, tuple[int, ...], np.dtype[np.generic]]:
    """Where the data begins after a header, and the shape and the dtype that it says."""
    file = BytesIO(data[: _LONGEST_HEADER + 16])
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        found, _, kind = read(file, max_header_size=_LONGEST_HEADER)
    except Exception as problem:  # its parser raises whatever Python's own parser does
        raise NpyError("an array does not begin with a NumPy header") from problem
    return file.tell(), found, kind
