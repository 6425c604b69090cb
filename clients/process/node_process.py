"""The process that runs a node's app: warm between messages, and stopped when it hangs.

The connection lives in the parent, so heartbeats go on while the app computes, holds the GIL or
hangs; the app lives in this child, so a trainer that hangs can be killed, and a crash of its
native code costs one reply.

    parent -> child   start: the app's folder, the node's configuration
    child  -> parent  ready, or the sentence that says why not
    parent -> child   do: an instruction; its content beside it, or in the shared file if large;
                      the run's options where they are not those of the last one
    child  -> parent  done: the reply, likewise, and behind it the session of a secure sum that the
                      app has begun; or the error

How they are framed says `pipe.py`; contents are bytes of `umbel.transport.codec`.
"""

import ctypes
import json
import mmap
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from umbel.clients.gate import guarded
from umbel.clients.process.memory import Memory
from umbel.clients.process.pipe import BESIDE, HEAD_BYTES, lengths, pack
from umbel.core.app_folder import open_app
from umbel.core.contents import take_record
from umbel.core.errors import ConfigError, described
from umbel.core.flower import Envelope
from umbel.core.streams import seed_all
from umbel.strategies.secure.node import EXTERNAL_SESSION, SPENT
from umbel.strategies.secure.wire import SECURE
from umbel.transport.codec import Buffer, decode, encode, encode_values, size_of


def shared_file() -> int:
    """A file in memory that a child inherits; it has no name and vanishes with its users."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("umbel")
    handle, name = tempfile.mkstemp()
    Path(name).unlink()
    return handle


def write_shared(file: int, parts: Sequence[Buffer]) -> int:
    """Write buffers to the beginning of a shared file; how many bytes."""
    at = 0
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            written = os.pwrite(file, view[: 1 << 30], at)
            at, view = at + written, view[written:]
    return at


def wipe_shared(file: int, start: int, size: int) -> None:
    """Overwrite a part of a shared file."""
    for at in range(start, start + size, 1 << 20):
        os.pwrite(file, bytes(min(1 << 20, start + size - at)), at)


def read_shared(file: int, size: int) -> memoryview:
    """A view of the beginning of a shared file. Files only grow, so the view stays valid."""
    return memoryview(mmap.mmap(file, size, prot=mmap.PROT_READ))[:size]


class Worker:
    """The child's side: one app, one message at a time."""

    def __init__(self, pipe: socket.socket, outbound: int, inbound: Sequence[int]) -> None:
        self._pipe, self._out, self._in = pipe, outbound, inbound
        self._app: Any = None
        self._digest = ""
        self._config: dict[str, Any] = {}
        self._run_config: dict[str, Any] = {}
        self._memory: Memory | None = None

    def serve(self) -> None:
        """Until the parent hangs up."""
        while True:
            head = self._receive(HEAD_BYTES)
            if head is None:
                return
            text, beside = lengths(head)
            body = self._receive(text + beside) or b""
            header = json.loads(body[:text])
            if header["op"] == "start":
                self._start(header)
            else:
                self._do(header, body[text:])

    def _receive(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            got = self._pipe.recv(size - len(data))
            if not got:
                return None
            data += got
        return bytes(data)

    def _start(self, header: dict[str, Any]) -> None:
        error = None
        try:
            self._memory = Memory(Path(header["memory"]))
            folder = open_app(Path(header["app"]))
            self._app, self._digest = folder.client_app(), folder.digest()
            self._config = header["node_config"]
            _take_threads(header["threads"])
        except ConfigError as problem:
            error = str(problem)
        self._pipe.sendall(pack({"op": "ready", "error": error, "device": _device()}))

    def _do(self, header: dict[str, Any], beside: bytes) -> None:
        assert self._memory is not None
        session: Sequence[Buffer] = ()
        try:
            data: Buffer = beside
            if header["size"] > BESIDE:
                data = read_shared(self._in[header["file"]], header["size"])
            content = decode(data, checksum=True)
            del data  # while the app trains, the file that it came in is not mapped
            context = self._context(header)
            with self._memory.step(header["run_id"], header["id"]) as state:
                if header["handover"] and SECURE in content:
                    state[EXTERNAL_SESSION] = ConfigRecord()
                    state[SPENT] = ConfigRecord({"round": header["spent"]})
                context.state = state
                message = _message(header, content)
                reply = guarded(self._app, message, context, digest=self._digest, alone=True)
                if not isinstance(reply, Message):
                    raise TypeError(f"the app returned a {type(reply).__name__}, not a Message")
                handed = state.pop(EXTERNAL_SESSION, None)  # before anything is written to disk
                state.pop(SPENT, None)
                if handed:
                    session = encode_values(EXTERNAL_SESSION, handed)
        except Exception as problem:
            traceback.print_exc()
            reason = described(problem)[:2000]
            self._pipe.sendall(pack({"op": "failed", "id": header["id"], "reason": reason}))
            return
        self._send(header["id"], reply, session)

    def _context(self, header: dict[str, Any]) -> Context:
        if "run_config" in header:
            raw = bytes.fromhex(header["run_config"])
            self._run_config = dict(take_record(decode(raw), "c", ConfigRecord)) if raw else {}
        return Context(
            run_id=header["run_id"],
            node_id=header["node_id"],
            node_config=dict(self._config),
            state=RecordDict(),
            run_config=dict(self._run_config),
        )

    def _send(self, message_id: str, reply: Message, session: Sequence[Buffer]) -> None:
        if reply.has_error():
            code, reason = reply.error.code, str(reply.error.reason)
            said = {"op": "failed", "id": message_id, "reason": reason[:2000], "code": code}
            self._pipe.sendall(pack(said))
            return
        parts = [*encode(reply.content), *session]
        size, handed = size_of(parts), size_of(session)
        header = {"op": "done", "id": message_id, "size": size, "session": handed}
        if size <= BESIDE:
            self._pipe.sendall(pack(header, b"".join(parts)))
            return
        write_shared(self._out, parts)
        self._pipe.sendall(pack(header))


def _message(header: Mapping[str, Any], content: RecordDict) -> Message:
    envelope = Envelope(
        run_id=header["run_id"],
        message_id=header["id"],
        node_id=header["node_id"],
        group_id=header["group_id"],
        created_at=time.time(),  # of this clock: the coordinator's may be another
        ttl=header["ttl"],
        message_type=header["message_type"],
    )
    return envelope.message(content)


def _take_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if threads and torch is not None:
        torch.set_num_threads(threads)


def _device() -> str:
    """What the app will probably train on, for people."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return "cpu"


def _die_with_parent() -> None:
    """An orphan would train on for nobody, and write the node's memory beside its successor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Entry point of the child: the numbers of its socket and of its shared files."""
    _die_with_parent()
    pipe, outbound, *inbound = (int(each) for each in sys.argv[1:])
    # What an app prints must not reach the parent's standard output, which may be JSON.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # PyTorch's generator begins with the same number in every process of every machine. What a
    # node draws may be noise that hides it from the coordinator, so it comes of no option.
    seed_all(secrets.randbits(63))
    Worker(socket.socket(fileno=pipe), outbound, inbound).serve()


if __name__ == "__main__":
    main()
