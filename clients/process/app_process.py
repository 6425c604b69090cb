"""The parent's handle on the process that runs a node's app."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.clients.process.fence import check_leaving
from umbel.clients.process.node_process import read_shared, shared_file, wipe_shared
from umbel.clients.process.pipe import BESIDE, Pipe, pack
from umbel.clients.process.sessions import SecureSessions
from umbel.clients.process.spent import SpentRounds
from umbel.core.errors import ConfigError, RunError
from umbel.core.flower import CRASHED, RAISED
from umbel.strategies.policy.node_policy import PolicyError
from umbel.strategies.policy.reading import policy_of
from umbel.strategies.secure.policy import RefusalError
from umbel.transport.codec import Buffer, CodecError
from umbel.transport.link_pb2 import Begin

log = logging.getLogger("umbel.node")
_LOADING_S = 600.0


@dataclass(frozen=True)
class Answer:
    """What came of an instruction: a content's bytes, or an error."""

    message_id: str
    parts: Sequence[Buffer] = ()
    error: tuple[int, str] | None = None


@dataclass(frozen=True)
class AppSettings:
    """What a node runs.

    Attributes:
        app: the app's folder.
        memory: the folder for what the app keeps.
        node_config: of the node.
        threads: of tensor operations; 0 leaves it to the libraries.
        environment: variables for the process, such as CUDA_VISIBLE_DEVICES.
        spent: the file of the rounds that are spent; None keeps them in memory only.
    """

    app: Path
    memory: Path
    node_config: Mapping[str, Any]
    threads: int = 0
    environment: Mapping[str, str] | None = None
    spent: Path | None = None


class AppProcess:
    """Starts the app's process, gives it instructions, and replaces it when it hangs or dies.

    Attributes:
        inbound: two shared files for large contents, so that one can arrive while the app is
            busy with the other.
        device: what the app trains on, for people.
    """

    def __init__(self, settings: AppSettings) -> None:
        self._settings = settings
        self.inbound = (shared_file(), shared_file())
        self._outbound = shared_file()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._starting: asyncio.Task[None] | None = None
        self._told: bytes | None = None  # the run's options that the process surely has
        self._sessions = SecureSessions(settings.node_config, SpentRounds(settings.spent))
        self.device = ""

    @property
    def pid(self) -> int | None:
        """The app's process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process and load the app.

        Raises:
            ConfigError: the app does not load.
            RunError: the process died.
        """
        ours, theirs = socket.socketpair()
        numbers = (theirs.fileno(), self._outbound, *self.inbound)
        command = [
            sys.executable,
            "-P",
            "-m",
            "umbel.clients.process.node_process",
            *map(str, numbers),
        ]
        self._process = subprocess.Popen(
            command,
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(self._settings.environment or {}),
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        theirs.close()
        connecting = asyncio.get_running_loop().create_connection(Pipe, sock=ours)
        _, self._pipe = await connecting
        self._told = None
        start = {
            "op": "start",
            "app": str(self._settings.app),
            "memory": str(self._settings.memory),
            "node_config": dict(self._settings.node_config),
            "threads": self._settings.threads,
        }
        self._pipe.write(pack(start))
        try:
            said, _ = await asyncio.wait_for(self._pipe.hear(), _LOADING_S)
        except (EOFError, OSError) as problem:
            how = self._end()
            raise RunError(f"the app's process ended while it loaded the app ({how})") from problem
        if said["error"] is not None:
            raise ConfigError(said["error"])
        self.device = said["device"]

    async def run(
        self, begin: Begin, node_id: int, limit_s: float | None, *, file: int = 0
    ) -> Answer:
        """Answer an instruction, whose content is inside, or in `inbound[file]`.

        The app does, except in the later trips of a secure sum. A process that does not answer
        within `limit_s` is stopped, and replaced, like one that died; the answer says so.
        """
        try:
            stage = self._sessions.stage(begin.run_id, begin.message_type)
            if stage is not None:
                content = self._content(begin, file)
                return Answer(begin.id, await self._sessions.answer(stage, content))
            if begin.message_type == "train":
                self._sessions.forget()
            return await self._ask(begin, node_id, limit_s, file)
        except (ConfigError, CodecError, RefusalError) as problem:
            reason = f"{type(problem).__name__}: {problem}"
            return Answer(begin.id, error=(RAISED, reason))

    async def _ask(self, begin: Begin, node_id: int, limit_s: float | None, file: int) -> Answer:
        """Let the app's process answer."""
        ready = False
        try:
            async with asyncio.timeout(limit_s):
                await self._ready()
                ready = True
                assert self._pipe is not None
                self._pipe.write(self._instruction(begin, node_id, file))
                said, beside = await self._pipe.hear()
        except TimeoutError:
            if not ready:
                return self._crashed(begin, "the app was not ready in time")
            self.stop()
            return self._crashed(begin, f"it was not done after {limit_s:.0f} s and was stopped")
        except (EOFError, OSError):
            return self._crashed(begin, f"the app's process died ({self._end()})")
        except (ConfigError, RunError) as problem:
            self.stop()
            return Answer(begin.id, error=(CRASHED, str(problem)))
        if said["op"] == "failed":
            self._told = None  # perhaps it could not read them
            return Answer(begin.id, error=(said.get("code", RAISED), said["reason"]))
        content, session = self._reply(said["size"], said["session"], beside)
        try:
            check_leaving(policy_of(self._settings.node_config), content)
        except PolicyError as refusal:
            log.warning("a reply does not leave: policy, %s: %s", refusal.key, refusal)
            reason = f"this node's policy ({refusal.key}) refuses: {refusal}"
            return Answer(begin.id, error=(RAISED, reason))
        if session:
            content = self._sessions.take_over(begin.run_id, node_id, session) or content
        return Answer(begin.id, content)

    def _content(self, begin: Begin, file: int) -> Buffer:
        if begin.size <= BESIDE:
            return begin.inline
        return read_shared(self.inbound[file], begin.size)

    def _instruction(self, begin: Begin, node_id: int, file: int) -> bytes:
        """An instruction as the app's process reads it."""
        header = {
            "op": "do",
            "id": begin.id,
            "size": begin.size,
            "file": file,
            "run_id": begin.run_id,
            "node_id": node_id,
            "group_id": begin.group_id,
            "message_type": begin.message_type,
            "ttl": begin.ttl,
            "handover": self._sessions.wanted,
            "spent": self._sessions.spent(begin.run_id),
        }
        if self._told != begin.run_config:
            header["run_config"] = begin.run_config.hex()
            self._told = begin.run_config
        return pack(header, begin.inline if begin.size <= BESIDE else b"")

    def _reply(self, size: int, handed: int, beside: bytes) -> tuple[Sequence[Buffer], bytes]:
        """The bytes of a reply, and of the session that the app hands over behind it."""
        whole: Buffer = beside if size <= BESIDE else read_shared(self._outbound, size)
        if not handed:
            return [whole], b""
        end = size - handed
        content, session = whole[:end], bytes(whole[end:])
        if size > BESIDE:
            wipe_shared(self._outbound, end, handed)
        return [content], session

    async def _ready(self) -> None:
        """Wait until a process has loaded the app; one that is starting is left alone."""
        if self._pipe is None and self._starting is None:
            self._starting = asyncio.create_task(self.start())
        if self._starting is not None:
            try:
                await asyncio.shield(self._starting)
            finally:
                if self._starting.done():
                    self._starting = None

    def stop(self) -> None:
        """Kill the process."""
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._end()

    def _crashed(self, begin: Begin, reason: str) -> Answer:
        """Say so, and start the next process at once: it takes seconds."""
        log.warning("%s", reason)
        if self._starting is None:
            self._starting = asyncio.create_task(self.start())
            self._starting.add_done_callback(_look_at)
        return Answer(begin.id, error=(CRASHED, reason))

    def _end(self) -> str:
        """How the process ended."""
        status = None
        if self._process is not None:
            try:
                status = self._process.wait(timeout=1)  # one that is dying says why
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
        if status is None:
            return "it was not there"
        if status == -9:
            return "killed, perhaps for lack of memory"
        return f"signal {-status}" if status < 0 else f"exit status {status}"


def _look_at(starting: "asyncio.Task[None]") -> None:
    """The failure of a start is reported by whoever needs the process next."""
    if not starting.cancelled():
        starting.exception()
