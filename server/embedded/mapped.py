"""Large bytes in files in memory, which processes map instead of copying.

    engine -> workers   the model of a round lies in one file; every worker maps it
    worker -> engine    a large reply lies in a file of its own; the engine maps it, and its memory
                        is free when the reply has been added up and let go

A file has no name, and vanishes with the last process that holds or maps it.
"""

import ctypes
import itertools
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

PAGE = mmap.ALLOCATIONGRANULARITY

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_REUSE = 1 << 25


@dataclass(frozen=True)
class Mapped:
    """Bytes of a file, to be read; whoever writes to them changes a copy of its own.

    Attributes:
        view: the bytes.
        file: where they lie, as long as they may be sent on without a copy.
        at: where they begin in it.
    """

    view: memoryview
    file: "File | None" = None
    at: int = 0

    def __len__(self) -> int:
        return len(self.view)

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(self.view),)


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
            at = to_page(self._write(blob, at))
        os.ftruncate(self.handle, at)

    def fill(self, parts: Sequence[Any]) -> Mapped:
        """Write one blob, which is in parts, into an empty file; the blob."""
        size = 0
        for part in parts:
            size = self._write(part, size)
        return Mapped(self._map(size), self)

    def _write(self, blob: Any, at: int) -> int:
        """Where the blob ends that begins there."""
        view = memoryview(blob)
        while view:
            written = os.pwrite(self.handle, view[: 1 << 30], at)
            at, view = at + written, view[written:]
        return at

    def maps(self, lengths: Sequence[int], *, keep: bool = False) -> list[Mapped]:
        """The blobs, mapped; they outlive this object.

        Args:
            lengths: of the blobs, in order.
            keep: hold the file open with them, so that they can be sent on without a copy.
        """
        starts = [0, *itertools.accumulate(to_page(length) for length in lengths)]
        view = self._map(starts[-2] + lengths[-1])
        file = self if keep else None
        return [
            Mapped(view[at : at + length], file, at)
            for at, length in zip(starts, lengths, strict=False)
        ]

    def _map(self, length: int) -> memoryview:
        """Its first bytes. Unlike `mmap`, this leaves no file open: a round may have thousands."""
        try:
            name = f"/dev/fd/{self.handle}"
            whole = torch.from_file(name, shared=False, size=length, dtype=torch.uint8)
        except RuntimeError:  # there is no such folder
            return memoryview(mmap.mmap(self.handle, length, access=mmap.ACCESS_COPY))
        return memoryview(whole.numpy())  # type: ignore[arg-type]  # every array is a buffer


def to_page(at: int) -> int:
    """The beginning of the first page from there."""
    return -(-at // PAGE) * PAGE


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
