"""Messages and their contents as bytes, without pickle.

    encode(content, *, checksum=True) -> list[bytes | memoryview]
    decode(data, *, limits=Limits(), checksum=False) -> RecordDict
    encode_values(name, values) -> list[bytes | memoryview]
    decode_values(data, name) -> dict
    encode_message(message, *, body=None, checksum=True) -> list[bytes | memoryview]
    decode_message(data, *, limits=Limits(), checksum=False) -> Message

`encode` copies no tensor: it gives one small head and then the arrays' own buffers, to be
written one after the other (`b"".join(parts)`, `socket.sendmsg(parts)`, ...). `decode` takes
those bytes as one buffer, or as any sequence of buffers cut anywhere, and copies each tensor
once, because `flwr.app.Array.data` must be `bytes`.

    prefix  24 bytes   magic, version, kind, flags, crc32, length of table, length of payload
    table              names, shapes, scalars: everything but the large buffers
    payload            the large buffers, one after the other, in the table's order

Hostile bytes give `CodecError` and nothing else. Every count and length is compared with the
bytes that are really there before anything is made of it, so what a decoder allocates is
bounded by a small multiple of what it was handed; `Limits` bounds that. Data that says it is a
`.npy` file must be one, of exactly the announced dtype, shape and size, because whoever opens
it later allocates what its header claims. Which shapes and values an update may have is not
decided here: a collect rejects those by name.

The checksum (CRC-32, 3 GB/s where BLAKE2b gives 0.9) finds accidents on the way: a cut file, a
faulty buffer. Against people there is TLS underneath.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from zlib import crc32

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict

from umbel.transport.table import Buffer, CodecError, Reader, Source, Writer

_PREFIX = struct.Struct("<4sBBHIIQ")
_SHAPE = struct.Struct("<BHIQ")
_METADATA = struct.Struct("<Qqqdd")
_MAGIC = b"UMBL"
_VERSION = 1
_CONTENT, _MESSAGE = 1, 2
_CHECKED = 1
_ARRAYS, _METRICS, _CONFIG = 1, 2, 3
_KINDS: dict[type[Any], int] = {
    ArrayRecord: _ARRAYS,
    MetricRecord: _METRICS,
    ConfigRecord: _CONFIG,
}

_RECORDS = {kind: record for record, kind in _KINDS.items()}

__all__ = [
    "Buffer",
    "CodecError",
    "Limits",
    "decode",
    "decode_message",
    "decode_values",
    "encode",
    "encode_message",
    "encode_values",
    "size_of",
]


@dataclass(frozen=True)
class Limits:
    """What a peer can make a decoder allocate.

    Attributes:
        total: bytes of a whole encoding.
        table: bytes of the part that holds names and scalars; the Python objects made of it
            take about ten times as much.
    """

    total: int = 16 << 30
    table: int = 64 << 20


DEFAULT_LIMITS = Limits()


def encode(content: RecordDict, *, checksum: bool = True) -> list[Buffer]:
    """The bytes of a content: a head, then the arrays' own buffers, uncopied.

    Raises:
        CodecError: a name or a value has no encoding (text that is not Unicode, for example).
    """
    writer = Writer()
    _write_content(writer, content)
    return _seal(_CONTENT, writer, checksum)


def decode(
    data: Buffer | Sequence[Buffer],
    *,
    limits: Limits = DEFAULT_LIMITS,
    checksum: bool = False,
    consume: bool = False,
) -> RecordDict:
    """The content that `encode` was given.

    Args:
        data: the bytes, in one buffer or in several that were cut anywhere.
        limits: on what is allocated.
        checksum: insist that there is one.
        consume: empty `data`, a list, and let go of its buffers as they are copied, so that a
            content does not take its room twice.

    Raises:
        CodecError: these bytes are not an encoding.
    """
    source = Source(data, consume=consume)
    if consume and isinstance(data, list):
        data.clear()
    return _content(source, limits, checksum)


def encode_values(name: str, values: Mapping[str, Any]) -> list[Buffer]:
    """What `encode` makes of a content with one ConfigRecord, without Flower's objects.

    Those look at each entry's type twice, which is most of the time of a small message.
    """
    writer = Writer()
    writer.count(1)
    _write_entries(writer, name, _CONFIG, values)
    return _seal(_CONTENT, writer, checksum=True)


def decode_values(data: Buffer, name: str) -> dict[str, Any]:
    """The entries of a content's only record, a ConfigRecord of that name.

    Raises:
        CodecError: these bytes are not an encoding of such a content.
    """
    source = Source(data)
    reader = _open(_CONTENT, source, DEFAULT_LIMITS, checksum=True)
    if reader.count(least=7) != 1 or reader.name() != name or reader.byte() != _CONFIG:
        raise CodecError(f"a content that has not {name!r} for its only record")
    values = _read_values(reader)
    _finish(reader, source)
    return values


def encode_message(
    message: Message, *, body: Sequence[Buffer] | None = None, checksum: bool = True
) -> list[Buffer]:
    """The bytes of a message: its metadata, and its content or its error.

    Args:
        message: to be encoded.
        body: what `encode(message.content)` gave, where many messages share one content: it is
            encoded and summed up once.
        checksum: over metadata and content; a `body` has its own.
    """
    writer = Writer()
    metadata = message.metadata
    writer.raw(
        _METADATA,
        metadata.run_id,
        metadata.src_node_id,
        metadata.dst_node_id,
        metadata.created_at,
        metadata.ttl,
    )
    writer.name(metadata.message_id)
    writer.name(metadata.reply_to_message_id)
    writer.name(metadata.group_id)
    writer.name(metadata.message_type)
    failed = message.has_error()
    writer.byte(failed)
    if failed:
        writer.value(message.error.code)
        writer.value(message.error.reason or "")
        return _seal(_MESSAGE, writer, checksum)
    parts = body if body is not None else encode(message.content, checksum=checksum)
    return [*_seal(_MESSAGE, writer, checksum), *parts]


def decode_message(
    data: Buffer | Sequence[Buffer], *, limits: Limits = DEFAULT_LIMITS, checksum: bool = False
) -> Message:
    """The message that `encode_message` was given.

    Raises:
        CodecError: these bytes are not an encoding.
    """
    source = Source(data)
    reader = _open(_MESSAGE, source, limits, checksum)
    run_id, sender, target, created_at, ttl = reader.raw(_METADATA)
    message_id, reply_to, group_id, message_type = [reader.name() for _ in range(4)]
    failed = reader.byte()
    error = _error(reader) if failed else None
    reader.finish()
    if failed and source.left:
        raise CodecError(f"{source.left} bytes follow the end of an error reply")
    content = None if failed else _content(source, limits, checksum)
    try:
        metadata = Metadata(
            run_id=run_id,
            message_id=message_id,
            src_node_id=sender,
            dst_node_id=target,
            reply_to_message_id=reply_to,
            group_id=group_id,
            created_at=created_at,
            ttl=ttl,
            message_type=message_type,
        )
    except ValueError as problem:
        raise CodecError(f"{message_type!r:.80} is not a message type") from problem
    # The typed signatures are those for apps; an engine passes the metadata.
    return cast(Message, cast(Any, Message)(metadata=metadata, content=content, error=error))


def size_of(parts: Iterable[Buffer]) -> int:
    """How many bytes these buffers are together."""
    return sum([len(part) for part in parts])


def _content(source: Source, limits: Limits, checksum: bool) -> RecordDict:
    reader = _open(_CONTENT, source, limits, checksum)
    content = _read_content(reader)
    _finish(reader, source)
    return content


def _finish(reader: Reader, source: Source) -> None:
    reader.finish()
    if source.left:
        raise CodecError(f"{source.left} bytes follow the end of a message")


def _error(reader: Reader) -> Error:
    code, reason = reader.value(), reader.value()
    if type(code) is not int or type(reason) is not str:
        raise CodecError("an error reply needs a number and a sentence")
    return Error(code, reason or None)


def _write_content(writer: Writer, content: RecordDict) -> None:
    writer.count(len(content))
    for name, record in content.items():
        kind = _KINDS.get(type(record))
        if kind is None:
            raise CodecError(f"record {name!r} is a {type(record).__name__}, which has no encoding")
        _write_entries(writer, name, kind, record)


def _write_entries(writer: Writer, name: str, kind: int, record: Mapping[str, Any]) -> None:
    writer.name(name)
    writer.byte(kind)
    writer.count(len(record))
    write: Callable[[Any], None] = writer.array if kind == _ARRAYS else writer.value
    for key, value in record.items():
        writer.name(key)
        write(value)


def _read_content(reader: Reader) -> RecordDict:
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for _ in range(reader.count(least=7)):
        name = reader.name()
        if name in records:
            raise CodecError(f"record {name!r:.80} is there twice")
        records[name] = _read_record(reader)
    content = RecordDict()
    _fill(content, records)
    return content


def _read_record(reader: Reader) -> ArrayRecord | MetricRecord | ConfigRecord:
    kind = reader.byte()
    if kind not in _RECORDS:
        raise CodecError(f"there is no record of kind {kind}")
    # Filled entry by entry: the constructors of Flower's records would copy every array's object.
    record: Any = _RECORDS[kind]()
    if kind == _CONFIG:
        _fill(record, _read_values(reader))
        return cast(ConfigRecord, record)
    many = reader.count(least=3)
    read = reader.array if kind == _ARRAYS else reader.value
    for _ in range(many):
        key, value = reader.name(), read()
        try:
            record[key] = value
        except TypeError as problem:
            raise CodecError("a metric is a number or a list of numbers") from problem
    if len(record) != many:
        raise CodecError("a record has two entries of one name")
    return cast(ArrayRecord | MetricRecord | ConfigRecord, record)


def _read_values(reader: Reader) -> dict[str, Any]:
    many = reader.count(least=3)
    values = {reader.name(): reader.value() for _ in range(many)}
    if len(values) != many:
        raise CodecError("a record has two entries of one name")
    return values


def _fill(record: ConfigRecord | RecordDict, values: Mapping[str, Any]) -> None:
    """Put values of a reader, which gives no other types than Flower's, into a record at once.

    Flower looks at each one's type again, in two microseconds: a third of the time of decoding.
    """
    entries = vars(record).get("_data")
    if type(entries) is dict:
        entries.update(values)
    else:  # a Flower that keeps them elsewhere
        record.update(values)


def _seal(kind: int, writer: Writer, checksum: bool) -> list[Buffer]:
    table, payload = writer.table(), writer.payload
    flags = _CHECKED if checksum else 0
    size = size_of(payload)
    if len(table) > 0xFFFF_FFFF:
        raise CodecError(f"{len(table)} bytes of names and scalars have no encoding")
    total = 0
    if checksum:
        total = crc32(table, crc32(_SHAPE.pack(kind, flags, len(table), size)))
        for part in payload:
            total = crc32(part, total)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, kind, flags, total, len(table), size)
    return [prefix + table, *payload]


def _open(kind: int, source: Source, limits: Limits, checksum: bool) -> Reader:
    magic, version, found, flags, total, table, payload = _PREFIX.unpack(source.take(_PREFIX.size))
    if magic != _MAGIC:
        raise CodecError("these bytes are not an Umbel message")
    if version != _VERSION:
        raise CodecError(f"encoding version {version} is not the version {_VERSION} spoken here")
    if found != kind or flags > _CHECKED:
        raise CodecError(f"kind {found} with flags {flags} is not what was expected here")
    if table > limits.table or table + payload > limits.total:
        raise CodecError(
            f"a message of {table + payload} bytes, {table} of them names and scalars, is over "
            f"the limits of {limits.total} and {limits.table} bytes"
        )
    if table + payload > source.left:
        raise CodecError(f"{table + payload} bytes are announced and {source.left} are there")
    if flags & _CHECKED:
        start = crc32(_SHAPE.pack(kind, flags, table, payload))
        if source.crc(table + payload, start) != total:
            raise CodecError("the checksum does not match: the bytes were changed on the way")
    elif checksum:
        raise CodecError("a message without a checksum is not accepted here")
    return Reader(source.take(table), source, payload)
