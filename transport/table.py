"""The table of an encoding: names, shapes and scalars, little-endian, every length checked.

    name    u16 length, UTF-8
    count   u32
    value   tag, then:  i s64 | I u16 length, two's complement | d f64 | t, f | s, b u32 length
            B u64 length (bytes in the payload) | L tag of the items, count, items
    array   dtype (name), stype (name), u8 dimensions, s64 each, u64 length (bytes in the payload)

`Writer` and `Reader` mirror each other line by line.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from flwr.app import Array

from umbel.transport.npy import NpyError, check_npy

Buffer = bytes | bytearray | memoryview

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_S64, _F64 = struct.Struct("<q"), struct.Struct("<d")
_IN_PAYLOAD = 4096  # bytes values of this length or more travel uncopied, like arrays
_NUMPY = "numpy.ndarray"
_GATHERED = 1 << 20  # smaller values are not worth the detour
_NOTHING = memoryview(b"")


class CodecError(Exception):
    """Bytes that are no encoding, or a value that has none. The only error of the codec."""


class Source:
    """Bytes to read, in one buffer or in several that were cut anywhere.

    Args:
        data: the bytes.
        consume: let go of each buffer as soon as it has been copied.
    """

    def __init__(self, data: Buffer | Sequence[Buffer], *, consume: bool = False) -> None:
        parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        self._views = [memoryview(part).cast("B") for part in parts if len(part)]
        self._index = 0
        self._offset = 0
        self._consume = consume
        self.left = sum([len(view) for view in self._views])

    def take(self, size: int) -> bytes:
        """The next `size` bytes, copied once."""
        if size > self.left:
            raise CodecError(f"{size} bytes are announced and {self.left} are there")
        if not size:
            return b""
        if self._consume and size > _GATHERED:
            return self._gather(size)
        pieces = self._pieces(size)
        self.left -= size
        last, end = self._index + len(pieces) - 1, len(pieces[-1])
        self._offset = end if len(pieces) > 1 else self._offset + end
        self._index = last
        if self._offset == len(self._views[last]):
            self._index, self._offset = last + 1, 0
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def _gather(self, size: int) -> bytes:
        """Like `take`, and each buffer is let go before the next is copied."""
        gathered = BytesIO()
        self.left -= size
        while size:
            piece = self._views[self._index][self._offset : self._offset + size]
            size -= gathered.write(piece)
            self._offset += len(piece)
            del piece
            if self._offset == len(self._views[self._index]):
                self._views[self._index] = _NOTHING
                self._index, self._offset = self._index + 1, 0
        return gathered.getvalue()  # its own bytes, not a copy of them

    def crc(self, size: int, start: int) -> int:
        """The CRC-32 of the next `size` bytes, after `start`; nothing is taken."""
        for piece in self._pieces(size):
            start = zlib.crc32(piece, start)
        return start

    def _pieces(self, size: int) -> list[memoryview]:
        pieces: list[memoryview] = []
        index, offset = self._index, self._offset
        while size:
            piece = self._views[index][offset : offset + size]
            pieces.append(piece)
            size -= len(piece)
            index, offset = index + 1, 0
        return pieces


class Writer:
    """Collects the table, and the large buffers beside it."""

    def __init__(self) -> None:
        self.payload: list[bytes] = []
        self._table: list[bytes] = []

    def table(self) -> bytes:
        """The table so far."""
        return b"".join(self._table)

    def raw(self, layout: struct.Struct, *values: float) -> None:
        """Numbers in a fixed layout."""
        try:
            self._table.append(layout.pack(*values))
        except struct.error as problem:
            raise CodecError(f"{values} do not fit their fields") from problem

    def byte(self, value: int) -> None:
        """A small number."""
        self._table.append(bytes((value,)))

    def count(self, value: int) -> None:
        """How many follow."""
        self.raw(_U32, value)

    def name(self, text: str) -> None:
        """A short text."""
        data = _utf8(text)
        if len(data) > 0xFFFF:
            raise CodecError(f"the name {text[:40]!r}... is longer than 65535 bytes")
        self._table.append(_U16.pack(len(data)) + data)

    def array(self, array: Array) -> None:
        """Dtype, shape and size; the data goes to the payload."""
        if len(array.shape) > 255:
            raise CodecError(f"an array of {len(array.shape)} dimensions has no encoding")
        self.name(array.dtype)
        self.name(array.stype)
        self.byte(len(array.shape))
        for length in array.shape:
            self.raw(_S64, length)
        self._large(array.data)

    def value(self, value: Any) -> None:
        """A scalar, or a list of scalars of one type."""
        if isinstance(value, list):
            self._list(value)
            return
        tag = _tag(value)
        if tag == b"b" and len(value) >= _IN_PAYLOAD:
            self._table.append(b"B")
            self._large(value)
            return
        self._table.append(tag)
        _WRITE[tag](self, value)

    def _list(self, values: list[Any]) -> None:
        # A list holds one type; booleans among them are told apart by two tags.
        tag = _tag(values[0]) if values else b"t"
        if tag == b"f":
            tag = b"t"
        elif tag in (b"i", b"I"):
            tag = b"i" if all(-(1 << 63) <= value < 1 << 63 for value in values) else b"I"
        self._table.append(b"L" + tag)
        self.count(len(values))
        try:
            if tag == b"t":
                self._table.append(bytes(bytearray(values)))
            elif tag in (b"i", b"d"):
                letter = "q" if tag == b"i" else "d"
                self._table.append(struct.pack(f"<{len(values)}{letter}", *values))
            else:
                for value in values:
                    _WRITE[tag](self, value)
        except (struct.error, TypeError, AttributeError, ValueError) as problem:
            raise CodecError("a list with items of several types has no encoding") from problem

    def _large(self, data: bytes) -> None:
        self.raw(_U64, len(data))
        self.payload.append(data)

    def integer(self, value: int) -> None:
        """An integer of any size up to 65535 bytes."""
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 0xFFFF:
            raise CodecError("an integer of more than 65535 bytes has no encoding")
        self._table.append(_U16.pack(len(data)) + data)

    def sized(self, data: bytes) -> None:
        """Bytes after their length."""
        self.count(len(data))
        self._table.append(data)


class Reader:
    """Reads a table; the large buffers come from the source that follows it."""

    def __init__(self, table: bytes, source: Source, payload: int) -> None:
        self._table = table
        self._at = 0
        self._source = source
        self._payload = payload

    def finish(self) -> None:
        """Everything that was announced has been read."""
        if self._at != len(self._table) or self._payload:
            left = len(self._table) - self._at + self._payload
            raise CodecError(f"{left} bytes are left over at the end of a message")

    def raw(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Numbers in a fixed layout."""
        return layout.unpack(self._cut(layout.size))

    def byte(self) -> int:
        """A small number."""
        return self._cut(1)[0]

    def count(self, *, least: int) -> int:
        """How many follow, where each takes at least `least` bytes."""
        many: int = _U32.unpack(self._cut(4))[0]
        self._room(many * least)
        return many

    def name(self) -> str:
        """A short text."""
        return _text(self._cut(_U16.unpack(self._cut(2))[0]))

    def array(self) -> Array:
        """An array whose data is what its dtype and shape say."""
        dtype, stype = self.name(), self.name()
        shape = tuple([_S64.unpack(self._cut(8))[0] for _ in range(self.byte())])
        data = self._large()
        if stype == _NUMPY:
            try:
                check_npy(data, dtype, shape)
            except NpyError as problem:
                raise CodecError(str(problem)) from problem
        return Array(dtype, shape, stype, data)

    def value(self) -> Any:
        """A scalar, or a list of scalars of one type."""
        tag = self._cut(1)
        if tag == b"L":
            return self._list()
        if tag == b"B":
            return self._large()
        return self._read(tag)

    def _list(self) -> list[Any]:
        tag = self._cut(1)
        if tag == b"t":
            return [bool(item) for item in self._cut(self.count(least=1))]
        if tag in (b"i", b"d"):
            many = self.count(least=8)
            letter = "q" if tag == b"i" else "d"
            return list(struct.unpack(f"<{many}{letter}", self._cut(8 * many)))
        many = self.count(least=2)
        return [self._read(tag) for _ in range(many)]

    def _read(self, tag: bytes) -> Any:
        read = _READ.get(tag)
        if read is None:
            raise CodecError(f"there is no value of type {tag!r}")
        return read(self)

    def _large(self) -> bytes:
        size: int = _U64.unpack(self._cut(8))[0]
        if size > self._payload:
            raise CodecError(f"a buffer of {size} bytes is announced, {self._payload} are there")
        self._payload -= size
        return self._source.take(size)

    def integer(self) -> int:
        """An integer of any size."""
        return int.from_bytes(self._cut(_U16.unpack(self._cut(2))[0]), "little", signed=True)

    def sized(self) -> bytes:
        """Bytes after their length."""
        return self._cut(self.count(least=1))

    def small(self) -> int:
        """An integer of 64 bits."""
        number: int = _S64.unpack(self._cut(8))[0]
        return number

    def real(self) -> float:
        """A floating-point number."""
        number: float = _F64.unpack(self._cut(8))[0]
        return number

    def _room(self, size: int) -> None:
        if size > len(self._table) - self._at:
            raise CodecError(
                f"{size} bytes are announced and {len(self._table) - self._at} are there"
            )

    def _cut(self, size: int) -> bytes:
        start = self._at
        end = start + size
        if end > len(self._table):
            self._room(size)
        self._at = end
        return self._table[start:end]


def _tag(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int):
        return b"i" if -(1 << 63) <= value < 1 << 63 else b"I"
    if isinstance(value, float):
        return b"d"
    if isinstance(value, str):
        return b"s"
    if isinstance(value, bytes):
        return b"b"
    raise CodecError(f"a {type(value).__name__} has no encoding")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as problem:
        raise CodecError(f"the text {text!r:.80} is not Unicode") from problem


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise CodecError("a text is not UTF-8") from problem


_WRITE: dict[bytes, Callable[[Writer, Any], None]] = {
    b"t": lambda _writer, _value: None,
    b"f": lambda _writer, _value: None,
    b"i": lambda writer, value: writer.raw(_S64, value),
    b"I": Writer.integer,
    b"d": lambda writer, value: writer.raw(_F64, value),
    b"s": lambda writer, value: writer.sized(_utf8(value)),
    b"b": Writer.sized,
}

_READ: dict[bytes, Callable[[Reader], Any]] = {
    b"t": lambda _reader: True,
    b"f": lambda _reader: False,
    b"i": Reader.small,
    b"I": Reader.integer,
    b"d": Reader.real,
    b"s": lambda reader: _text(reader.sized()),
    b"b": Reader.sized,
}
