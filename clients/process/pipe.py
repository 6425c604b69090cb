"""The socket between a node's connection and the process of its app: one request, one reply.

head    8 + 4 bytes   the lengths of the two parts that follow
header  JSON
beside  a content that is small
"""

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, cast

from umbel.transport.codec import CodecError

_HEAD = struct.Struct("<IQ")
HEAD_BYTES = _HEAD.size
_LONGEST_HEADER = 1 << 20
BESIDE = 64 << 10
"""Contents up to this size travel beside their header, larger ones in a shared file."""


def pack(header: Mapping[str, Any], beside: bytes = b"") -> bytes:
    """A header and the bytes beside it."""
    text = json.dumps(header).encode()
    return _HEAD.pack(len(text), len(beside)) + text + beside


def lengths(head: bytes) -> tuple[int, int]:
    """The lengths of a header and of what is beside it.

    Raises:
        CodecError: they are beyond what can be.
    """
    text, beside = _HEAD.unpack(head)
    if text > _LONGEST_HEADER or beside > BESIDE:
        raise CodecError(f"a header of {text} bytes and {beside} beside it cannot be")
    return text, beside


class Pipe(asyncio.Protocol):
    """The connection's end. Not a pair of streams: they take three steps of the loop a reply."""

    def __init__(self) -> None:
        self._got = bytearray()
        self._lost = False
        self._waiting: asyncio.Future[tuple[dict[str, Any], bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._got += data
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._lost = True
        self._look()

    def write(self, message: bytes) -> None:
        """Send something that `pack` has made."""
        assert self._transport is not None
        self._transport.write(message)

    async def hear(self) -> tuple[dict[str, Any], bytes]:
        """The next header, and what is beside it.

        Raises:
            EOFError: the process has hung up.
            CodecError: what it sent has no such form.
        """
        self._waiting = asyncio.get_running_loop().create_future()
        self._look()
        return await self._waiting

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _look(self) -> None:
        """Hand over what has come, once all of it has."""
        waiting, got = self._waiting, self._got
        if waiting is None or waiting.done():
            return
        try:
            if len(got) >= HEAD_BYTES:
                text, beside = lengths(bytes(got[:HEAD_BYTES]))
                start, end = HEAD_BYTES + text, HEAD_BYTES + text + beside
                if len(got) >= end:
                    header, content = json.loads(got[HEAD_BYTES:start]), bytes(got[start:end])
                    del got[:end]
                    waiting.set_result((header, content))
                    return
            if self._lost:
                raise EOFError("the process has hung up")
        except (CodecError, EOFError, ValueError) as problem:
            waiting.set_exception(problem)
