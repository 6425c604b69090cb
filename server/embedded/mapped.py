"""Large bytes in files in memory, which processes map instead of copying.

    engine -> workers   the model of a round lies in one file; every worker maps it
    worker -> engine    a large reply lies in a file of its own; the engine maps it, and its memory
                        is free when the reply has been added up and let go

A file has no name, and vanishes with the last process that holds or maps it.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

PAGE = mmap.ALLOCATIONGRANULARITY

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_REUSE = 1 << 25


class Mapped(mmap.mmap):
    """Bytes of a file, as an `Array` may hold them: they can be read, cut and copied like bytes.

    Whoever writes to them changes a copy of its own. Pickled, they are bytes.

    Attributes:
        origin: the file, where that holds nothing else and can be given to other processes.
    """

    origin: "File | None" = None

    def __new__(cls, handle: int, length: int, offset: int = 0) -> "Mapped":
        return super().__new__(cls, handle, length, access=mmap.ACCESS_COPY, offset=offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self[:],)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes | Mapped):
            return NotImplemented
        return self[:] == other[:]

    __hash__ = None  # type: ignore[assignment]


class File:
    """A file in memory that holds blobs, each at the beginning of a page.

    Args:
        handle: of a file that another process has filled; a new one if None. It is closed when
            nobody has this object any longer; what is mapped stays.
    """

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _new_file() if handle is None else handle

    def __del__(self) -> None:
        os.close(self.handle)

    def lay(self, blobs: Sequence[Any]) -> None:
        """Write blobs into an empty file."""
        at = 0
        for blob in blobs:
            at = -(-self._write(blob, at) // PAGE) * PAGE
        os.ftruncate(self.handle, at)

    def fill(self, parts: Sequence[Any]) -> Mapped:
        """Write one blob, which is in parts, into an empty file; the blob."""
        size = 0
        for part in parts:
            size = self._write(part, size)
        blob = Mapped(self.handle, size)
        blob.origin = self
        return blob

    def _write(self, blob: Any, at: int) -> int:
        """Where the blob ends that begins there."""
        view = memoryview(blob)
        while view:
            written = os.pwrite(self.handle, view[: 1 << 30], at)
            at, view = at + written, view[written:]
        return at

    def maps(self, lengths: Sequence[int]) -> tuple[Mapped, ...]:
        """The blobs, mapped; they outlive this object."""
        blobs, at = [], 0
        for length in lengths:
            blobs.append(Mapped(self.handle, length, at))
            at += -(-length // PAGE) * PAGE
        return tuple(blobs)


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("umbel")
    with tempfile.TemporaryFile(prefix="umbel-") as file:
        return os.dup(file.fileno())


def reuse_memory() -> None:
    """Let this process keep what it frees, up to 32 MiB a piece, instead of returning it.

    A model that is copied into new memory costs several times the copy itself, because the
    kernel hands the memory out page by page. What is larger is returned at once: kept, it would
    be torn to pieces by what is allocated meanwhile, and take several times its size. Does
    nothing with other C libraries.
    """
    with suppress(AttributeError, OSError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(_MMAP_THRESHOLD, _REUSE)
        adjust(_TRIM_THRESHOLD, 2 * _REUSE - 1)
