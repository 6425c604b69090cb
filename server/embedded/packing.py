"""Records on their way between the processes of one machine.

Every node must get records of its own, because apps may change what they receive; large arrays
need not be copied for that, because Flower keeps them as immutable bytes. So records are
pickled without their large bytes ("blobs"), which are shared or sent beside them, once.

Pickle is used between a process and its own children only; what comes from other machines goes
through `umbel.transport.codec`.
"""

import copyreg
import io
import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flwr.app import Array

from umbel.core.held import Held, HeldArray, array_of
from umbel.server.embedded.mapped import File, Mapped, to_page

LARGE = 4096
"""Bytes from which an array's data travels as a blob."""

Blob: TypeAlias = bytes | Mapped


@dataclass(frozen=True)
class Packed:
    """A pickled object and the blobs it refers to, by position."""

    text: bytes
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class _Values:
    """The bytes of an array, wherever they lie."""

    blob: bytes | Held


def _parts_of(array: Array) -> tuple[Any, ...]:
    blob = array.held if type(array) is HeldArray else array.data
    data = _Values(blob) if len(blob) >= LARGE else blob
    return _array, (array.dtype, array.shape, array.stype, data)


def _array(dtype: str, shape: tuple[int, ...], stype: str, blob: Blob) -> Array:
    if isinstance(blob, Mapped):
        return HeldArray(dtype, shape, stype, blob)
    return array_of(dtype, shape, stype, blob)


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {Array: _parts_of, HeldArray: _parts_of}

    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=5)
        self.blobs: list[Blob] = []

    def persistent_id(self, obj: Any) -> tuple[int, bool] | None:
        """The position of a blob, and whether it must be bytes again."""
        if type(obj) is _Values:
            self.blobs.append(_known(obj.blob))
            return len(self.blobs) - 1, False
        if type(obj) is bytes and len(obj) >= LARGE:
            self.blobs.append(obj)
            return len(self.blobs) - 1, True
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.text))
        self._blobs = packed.blobs

    def persistent_load(self, pid: tuple[int, bool]) -> Blob:
        position, to_bytes = pid
        blob = self._blobs[position]
        return bytes(blob.view) if to_bytes and isinstance(blob, Mapped) else blob


def _known(blob: bytes | Held) -> Blob:
    """What somebody else than this engine holds is copied."""
    return blob if isinstance(blob, bytes | Mapped) else bytes(blob.view)


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
    there = _lie_in(large)
    if there is not None:
        return there
    file = File()
    file.lay([blob.view if isinstance(blob, Mapped) else blob for blob in large])
    return file


def _lie_in(blobs: Sequence[Blob]) -> File | None:
    """The file that has these blobs where `lay` would put them; None if there is none."""
    file, at = blobs[0].file if isinstance(blobs[0], Mapped) else None, 0
    for blob in blobs:
        if not isinstance(blob, Mapped) or blob.file is not file or blob.at != at:
            return None
        at += to_page(len(blob))
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
        pipe.sendall(blob.view if isinstance(blob, Mapped) else blob)
    if there is not None:
        socket.send_fds(pipe, [b"f"], [there.handle])


def receive(pipe: socket.socket, *, keep: bool = False) -> Packed:
    """Read one packed object; large blobs are mapped where they lie.

    Args:
        pipe: a Unix socket.
        keep: hold the file open that they lie in, so that they can be sent on without a copy.

    Raises:
        EOFError: the other side has gone.
    """
    size, count, with_file = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    lengths = [_LENGTH.unpack(_exactly(pipe, _LENGTH.size))[0] for _ in range(count)]
    text = _exactly(pipe, size)
    small: Iterator[Blob] = iter([_exactly(pipe, length) for length in lengths if length < BY_FILE])
    large: Iterator[Blob] = iter(())
    if with_file:
        _, handles, _, _ = socket.recv_fds(pipe, 1, 1)
        if not handles:
            raise EOFError
        over = [length for length in lengths if length >= BY_FILE]
        large = iter(File(handles[0]).maps(over, keep=keep))
    return Packed(text, tuple(next(small if length < BY_FILE else large) for length in lengths))


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
