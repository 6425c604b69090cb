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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umbel.server.embedded.shelf import Shelf

LARGE = 4096
"""Bytes from which an array's data travels as a blob."""


@dataclass(frozen=True)
class Packed:
    """A pickled object and the blobs it refers to, by position."""

    text: bytes
    blobs: tuple[bytes, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=5)
        self.blobs: list[bytes] = []

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is bytes and len(obj) >= LARGE:
            self.blobs.append(obj)
            return len(self.blobs) - 1
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.text))
        self._blobs = packed.blobs

    def persistent_load(self, pid: int) -> bytes:
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
_LENGTH = struct.Struct("<Q")


SHELVED = 1 << 17
"""Bytes of all blobs together from which they go by the shelf."""


def send(pipe: socket.socket, packed: Packed, shelf: Shelf | None = None) -> None:
    """Write one packed object to a stream socket, large blobs to the shelf."""
    sizes = [len(blob) for blob in packed.blobs]
    by_shelf = shelf is not None and sum(sizes) >= SHELVED
    if shelf is not None and by_shelf:
        shelf.lay(packed.blobs)
    lengths = b"".join(_LENGTH.pack(size) for size in sizes)
    head = _HEAD.pack(len(packed.text), len(sizes), by_shelf)
    pipe.sendall(head + lengths + packed.text)
    if not by_shelf:
        for blob in packed.blobs:
            pipe.sendall(blob)


def receive(pipe: socket.socket, shelf: Shelf | None = None) -> Packed:
    """Read one packed object.

    Raises:
        EOFError: the other side has gone.
    """
    size, count, by_shelf = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    lengths = [_LENGTH.unpack(_exactly(pipe, _LENGTH.size))[0] for _ in range(count)]
    text = _exactly(pipe, size)
    if by_shelf:
        if shelf is None:
            raise EOFError
        return Packed(text, shelf.take(lengths))
    return Packed(text, tuple(_exactly(pipe, length) for length in lengths))


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


class BlobCache:
    """Which blobs the other side of a pipe still has: both sides run the same rule.

    The rule: the blobs of the last `keep` tasks are kept. A sender names a kept blob by its
    number instead of sending it again, so a model goes to a worker once a round and not once a
    node.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._tasks: list[dict[int, bytes]] = []
        self._next = 0

    def split(self, blobs: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
        """Sender: the number of every blob, and those that must be sent."""
        known = {id(blob): number for task in self._tasks for number, blob in task.items()}
        numbers, new, used = [], [], {}
        for blob in blobs:
            number = known.get(id(blob))
            if number is None:
                number = self._next
                self._next += 1
                known[id(blob)] = number
                new.append(blob)
            numbers.append(number)
            used[number] = blob
        self._remember(used)
        return numbers, new

    def join(self, numbers: Sequence[int], new: Sequence[bytes]) -> list[bytes]:
        """Receiver: all blobs, from their numbers and those that came along."""
        known = {number: blob for task in self._tasks for number, blob in task.items()}
        fresh = iter(new)
        for number in numbers:
            if number not in known:
                known[number] = next(fresh)
        self._remember({number: known[number] for number in numbers})
        return [known[number] for number in numbers]

    def _remember(self, used: dict[int, bytes]) -> None:
        self._tasks.append(used)
        del self._tasks[: -self._keep]
