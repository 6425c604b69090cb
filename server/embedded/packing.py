"""Records on their way between the processes of one machine.

Every node must get records of its own, because apps may change what they receive; large arrays
need not be copied for that, because Flower keeps them as immutable bytes. So records are
pickled without their large bytes ("blobs"), which are shared or sent beside them, once.

Pickle is used between a process and its own children only; what comes from other machines goes
through `umbel.transport.codec`.
"""

import io
import pickle
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from umbel.server.embedded.mapped import File, Mapped

LARGE = 4096
"""Bytes from which an array's data travels as a blob."""


@dataclass(frozen=True)
class Packed:
    """A pickled object and the blobs it refers to, by position."""

    text: bytes
    blobs: tuple[bytes | Mapped, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=5)
        self.blobs: list[bytes | Mapped] = []

    def persistent_id(self, obj: Any) -> int | None:
        if (type(obj) is bytes or type(obj) is Mapped) and len(obj) >= LARGE:
            self.blobs.append(obj)
            return len(self.blobs) - 1
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.text))
        self._blobs = packed.blobs

    def persistent_load(self, pid: int) -> bytes | Mapped:
        return self._blobs[pid]


def pack(thing: Any) -> Packed:
    """Pickle without the large bytes."""
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(thing)
    return Packed(out.getvalue(), tuple(pickler.blobs))


def unpack(packed: Packed) -> Any:
    """A new object that shares the blobs."""
    return _Unpickler(packed).load()


_HEAD = struct.Struct("<II?")
_LENGTH = struct.Struct("<q")

BY_FILE = 1 << 16
"""Bytes of a blob from which it lies in a file in memory instead of going through the pipe."""


def by_file(packed: Packed) -> File | None:
    """A file with the blobs that are too large for a pipe; None where there are none."""
    large = [blob for blob in packed.blobs if len(blob) >= BY_FILE]
    if not large:
        return None
    only = large[0] if len(large) == 1 else None
    if isinstance(only, Mapped) and only.origin is not None:
        return only.origin
    file = File()
    file.lay(large)
    return file


def send(pipe: socket.socket, packed: Packed, file: File | None = None) -> None:
    """Write one packed object to a stream socket.

    Args:
        pipe: a Unix socket.
        packed: the object.
        file: with its large blobs, where many are sent the same; one is made here if None.
    """
    there = by_file(packed) if file is None else file
    lengths = b"".join(_LENGTH.pack(len(blob)) for blob in packed.blobs)
    head = _HEAD.pack(len(packed.text), len(packed.blobs), there is not None)
    small = [blob for blob in packed.blobs if len(blob) < BY_FILE]
    pipe.sendall(head + lengths + packed.text)
    for blob in small:
        pipe.sendall(blob)
    if there is not None:
        socket.send_fds(pipe, [b"f"], [there.handle])


def receive(pipe: socket.socket, *, mapped: bool = False) -> Packed:
    """Read one packed object.

    Args:
        pipe: a Unix socket.
        mapped: leave large blobs where they are, and map them; else they become bytes.

    Raises:
        EOFError: the other side has gone.
    """
    size, count, with_file = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    lengths = [_LENGTH.unpack(_exactly(pipe, _LENGTH.size))[0] for _ in range(count)]
    text = _exactly(pipe, size)
    small = iter([_exactly(pipe, length) for length in lengths if length < BY_FILE])
    large: Iterator[bytes | Mapped] = iter(())
    if with_file:
        _, handles, _, _ = socket.recv_fds(pipe, 1, 1)
        if not handles:
            raise EOFError
        maps = File(handles[0]).maps([length for length in lengths if length >= BY_FILE])
        large = iter(maps) if mapped else map(_copied, maps)
    return Packed(text, tuple(next(small if length < BY_FILE else large) for length in lengths))


def _copied(blob: Mapped) -> bytes:
    with blob:
        return blob[:]


def _exactly(pipe: socket.socket, size: int) -> bytes:
    """`size` bytes in one allocation where the kernel allows it."""
    parts: list[bytes] = []
    while size:
        part = pipe.recv(size, socket.MSG_WAITALL)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
