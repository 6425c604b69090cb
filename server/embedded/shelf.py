"""Memory that two processes share for the large bytes of their messages.

A pipe's buffer is small, so the two sides of a pipe take turns for every large array. A shelf
holds it whole: the sender lays it down, the receiver takes it up, one copy each. The receiver
takes everything before it says anything, and the sender lays nothing new before it has heard
that, so one shelf a direction is enough.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

KEEPS = 1 << 28
"""Bytes beyond which a shelf is emptied after use."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_REUSE = 1 << 28


class Shelf:
    """One direction of one pipe.

    Args:
        handle: of the file in memory; a new one if None. It is closed with the shelf.

    Raises:
        OSError: the system has no such files.
    """

    def __init__(self, handle: int | None = None) -> None:
        if handle is None and not hasattr(os, "memfd_create"):
            raise OSError("no files in memory here")
        self.handle = os.memfd_create("umbel-shelf") if handle is None else handle
        self._memory: mmap.mmap | None = None

    def lay(self, blobs: Sequence[bytes]) -> None:
        """Put these bytes there, one after the other."""
        size = sum(map(len, blobs))
        if os.fstat(self.handle).st_size < size:
            os.ftruncate(self.handle, size)
        memory = self._mapped(size)
        place = 0
        for blob in blobs:
            memory[place : place + len(blob)] = blob
            place += len(blob)
        self._forget(size)

    def take(self, lengths: Sequence[int]) -> tuple[bytes, ...]:
        """What lies there, cut into these lengths."""
        size = sum(lengths)
        memory = self._mapped(size)
        blobs, place = [], 0
        for length in lengths:
            blobs.append(memory[place : place + length])
            place += length
        if size > KEEPS:
            self._forget(size)
            os.ftruncate(self.handle, 0)
        return tuple(blobs)

    def close(self) -> None:
        """Let go of the memory."""
        if self._memory is not None:
            self._memory.close()
        os.close(self.handle)

    def _mapped(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            if self._memory is not None:
                self._memory.close()
            self._memory = mmap.mmap(self.handle, size)
        return self._memory

    def _forget(self, size: int) -> None:
        """The other side empties the file, so this side's view of it must go."""
        if size > KEEPS and self._memory is not None:
            self._memory.close()
            self._memory = None


def reuse_memory() -> None:
    """Let this process keep what it frees, up to 256 MiB a piece, instead of returning it.

    A model that is copied into new memory costs several times the copy itself, because the
    kernel hands the memory out page by page; glibc asks for new memory above 32 MiB. Does
    nothing with other C libraries.
    """
    with suppress(AttributeError, OSError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(_MMAP_THRESHOLD, _REUSE)
        adjust(_TRIM_THRESHOLD, 2 * _REUSE - 1)
