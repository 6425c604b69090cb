"""Frames on the wire: how contents are cut into chunks and put together again.

A chunk is a `Frame` whose only field is field 1, so it can be written by hand as one tag, one
length and the bytes, and read back as a view: the bytes of a tensor are copied once when a
chunk is cut and once when the content is decoded, and protobuf never sees them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from google.protobuf.message import DecodeError

from umbel.transport.codec import Buffer, size_of
from umbel.transport.link_pb2 import Frame

PROTOCOL = 2
"""Raised when a frame changes its meaning; both sides must have the same."""

SERVICE = "umbel.link.v1.Link"
INLINE = 64 << 10
"""Contents up to this size travel inside of their Begin."""
LARGEST_CHUNK = 4 << 20
SMALLEST_CHUNK = 64 << 10
LARGEST_FRAME = LARGEST_CHUNK + (1 << 20)
"""What gRPC is told to refuse above."""
LARGEST_CONTENT = 8 << 30
OFFERED_ABOVE = 256 << 10
"""Replies above this size wait until the coordinator has room for them."""

_TAG = 0x0A
_FIRST_CHUNK = 1 << 20
_QUICK_S, _SLOW_S = 0.25, 2.0

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", LARGEST_FRAME),
    ("grpc.max_send_message_length", LARGEST_FRAME),
]


class FrameError(Exception):
    """A peer said something that the protocol does not allow; one sentence."""


@dataclass(frozen=True)
class Pieces:
    """The bytes of one chunk, still lying where they were."""

    views: Sequence[memoryview]


Outgoing = Frame | Pieces
Incoming = Frame | memoryview


def to_wire(frame: Outgoing) -> bytes:
    """The bytes of a frame."""
    if isinstance(frame, Pieces):
        size = sum([len(view) for view in frame.views])
        return b"".join([bytes([_TAG]), _varint(size), *frame.views])
    return frame.SerializeToString()


def from_wire(data: bytes) -> Incoming:
    """A frame, or a view of a chunk's bytes.

    Raises:
        FrameError: these bytes are no frame. Never anything else: gRPC would answer an
            exception here with its traceback.
    """
    if data and data[0] == _TAG:
        size, start = _read_varint(data, 1)
        if start + size == len(data):
            return memoryview(data)[start:]
        raise FrameError("a chunk's length is not the length of its frame")
    try:
        return Frame.FromString(data)
    except DecodeError:
        raise FrameError("a frame cannot be read") from None


def cut(parts: Sequence[Buffer], pace: "Pace") -> Iterator[Pieces]:
    """A content in chunks of the size that `pace` holds at the moment."""
    room = pace.chunk
    views: list[memoryview] = []
    for part in parts:
        rest = memoryview(part).cast("B")
        while rest:
            views.append(rest[:room])
            rest, room = rest[room:], room - len(views[-1])
            if not room:
                yield Pieces(views)
                views, room = [], pace.chunk
    if views:
        yield Pieces(views)


@dataclass
class Pace:
    """The size of chunks on one connection: large where they pass quickly.

    On a slow line a heartbeat must not wait for long behind a chunk, and a stalled peer must be
    told from a slow one; on a fast one a large chunk costs least.

    Attributes:
        chunk: bytes of the next chunk.
        largest: never more than this; a coordinator with many nodes keeps it small, because
            gRPC holds one or two chunks of each.
    """

    chunk: int = _FIRST_CHUNK
    largest: int = LARGEST_CHUNK
    _began: float = 0.0

    def begin(self) -> None:
        """A chunk is about to be written."""
        self._began = monotonic()

    def end(self) -> None:
        """It was accepted."""
        took = monotonic() - self._began
        if took > _SLOW_S:
            self.chunk = max(SMALLEST_CHUNK, self.chunk // 2)
        elif took < _QUICK_S:
            self.chunk = min(self.largest, self.chunk * 2)


@dataclass
class Assembly:
    """A content that is arriving in chunks; `keep` is false where nobody wants it."""

    size: int
    parts: list[memoryview] = field(default_factory=list)
    received: int = 0
    keep: bool = True

    def add(self, chunk: memoryview) -> bool:
        """Take a chunk; whether the content is complete.

        Raises:
            FrameError: more has come than was announced.
        """
        self.received += len(chunk)
        if self.received > self.size or not chunk:
            raise FrameError(
                f"a content announced with {self.size} bytes came with {self.received}"
            )
        if self.keep:
            self.parts.append(chunk)
        return self.received == self.size

    def forget(self) -> None:
        """Count the rest, and keep nothing."""
        self.keep = False
        self.parts.clear()


def check_size(size: int, largest: int) -> None:
    """Raise FrameError if a peer announces more than is taken."""
    if size > largest:
        raise FrameError(f"a content of {size} bytes is announced, and {largest} are taken at most")


def begin(frame: Frame, parts: Sequence[Buffer]) -> Frame:
    """Complete a Begin: its size, and its content if that is small."""
    frame.begin.size = size_of(parts)
    if frame.begin.size <= INLINE:
        frame.begin.inline = b"".join(parts)
    return frame


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for position in range(at, min(at + 10, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise FrameError("a chunk has no length")
