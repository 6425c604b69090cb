"""The node process: one connection, kept up through everything; the app runs in a child.

    connect    hello -> welcome
    receive    an instruction, in chunks, into memory that the child shares
    work       the child answers; heartbeats go on
    reply      offered if it is large, sent when it is wanted, kept until it has arrived

A reply that could not be delivered is delivered after reconnecting, if it is still wanted.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from umbel.clients.process.app_process import Answer, AppProcess
from umbel.clients.process.instruction import Receiving, Task, key
from umbel.clients.process.membership import (
    ExpiredError,
    Membership,
    NodeSettings,
    RefusedError,
    ignored_proxies,
    open_channel,
    refusal,
)
from umbel.core.errors import ConfigError, RunError
from umbel.core.flower import CRASHED
from umbel.core.text import plain
from umbel.transport.allocator import LARGE, give_back
from umbel.transport.certificates import Identity
from umbel.transport.codec import size_of
from umbel.transport.frames import (
    INLINE,
    LARGEST_CONTENT,
    OFFERED_ABOVE,
    PROTOCOL,
    SERVICE,
    FrameError,
    Pace,
    check_size,
    cut,
    from_wire,
    to_wire,
)
from umbel.transport.link_pb2 import Beat, Begin, Frame, Hello, Offer, Welcome

log = logging.getLogger("umbel.node")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_WELCOME_S = 20.0
_SILENT_BEATS, _SHORTEST_SILENCE_S = 4.5, 15.0
_DUPLICATE_NODE_S = 90.0
_DAY_S = 86400.0
_SLOW_WAIT_S = 300.0
"""How long a node that was refused waits before it asks again."""
_LATE = 0.1
"""Share of an instruction's time that the app is given beyond it before it is stopped."""
_GRACE_S = 10.0
"""An app at work on what nobody wants may finish, for as long again as it has had, or this."""


@dataclass
class _Stream:
    """What lives as long as one connection."""

    call: Any
    welcome: Welcome
    outgoing: "asyncio.Queue[Frame | Task]" = field(default_factory=asyncio.Queue)
    heard: float = field(default_factory=time.monotonic)
    pace: Pace = field(default_factory=Pace)
    receiving: Receiving | None = None


class NodeLink:
    """A node: see the module's docstring.

    Args:
        membership: the node's state folder.
        settings: of the node.
        trainee: runs the app.
        version: of Umbel.
        app_digest: of the app's files.
        any_app: work for a coordinator whose copy of the app differs.
        once: end when the coordinator says that its run is over.
        give_up: end when the coordinator refuses this node, in place of asking again slowly.
        on_event: told what happens, for tests and for people.
    """

    def __init__(
        self,
        membership: Membership,
        settings: NodeSettings,
        trainee: AppProcess,
        *,
        version: str,
        app_digest: str,
        any_app: bool = False,
        once: bool = False,
        give_up: bool = False,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._membership, self._settings, self._trainee = membership, settings, trainee
        self._version, self._app_digest = version, app_digest
        self._any_app, self._once, self._on_event = any_app, once, on_event
        self._give_up = give_up
        self._instance = secrets.token_hex(16)
        self._task: Task | None = None  # at work, or answered and not yet taken
        self._next: Task | None = None  # waits until an unwanted one is done
        self._work: asyncio.Task[None] | None = None
        self._stream: _Stream | None = None
        self._over = False
        self._node_id = 0
        self._said = ""

    async def run(self) -> None:
        """Until the coordinator ends it, or for ever.

        Raises:
            ConfigError: the coordinator refuses this node, and it was told to give up then.
        """
        self._tell_of_proxies()
        wait, twin_since = _FIRST_WAIT_S, None
        try:
            while not self._over:
                began, refused = time.monotonic(), False
                try:
                    await self._connect()
                    twin_since = None
                except (RefusedError, ExpiredError) as problem:
                    refused = self._was_refused(problem)
                except grpc.aio.AioRpcError as problem:
                    if self._over:
                        return
                    said = refusal(self._settings.address, problem)
                    twin = problem.code() == grpc.StatusCode.ALREADY_EXISTS
                    twin_since = (twin_since or began) if twin else None
                    if twin_since is not None and began - twin_since > _DUPLICATE_NODE_S:
                        raise RunError(str(said)) from None
                    if isinstance(said, RefusedError):
                        refused = self._was_refused(said)
                    else:
                        self._say(str(said))
                except (RunError, FrameError, TimeoutError, EOFError) as problem:
                    self._say(f"connection lost: {problem or type(problem).__name__}")
                if self._over:
                    return
                if time.monotonic() - began > 2:  # it was connected, and for a while
                    wait = _FIRST_WAIT_S
                pause = _SLOW_WAIT_S if refused else wait
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                wait = min(_LONGEST_WAIT_S, wait * 1.6)
        finally:
            if self._work is not None:
                self._work.cancel()
            self._trainee.stop()

    def _was_refused(self, problem: ConfigError) -> bool:
        """Give up, or say that it is asked again; True."""
        if self._give_up:
            raise problem
        self._say(f"{problem}; asking again about every {_SLOW_WAIT_S / 60:.0f} minutes")
        self._on_event("refused")
        return True

    def _tell_of_proxies(self) -> None:
        if self._settings.proxy or not (names := ignored_proxies()):
            return
        log.info("%s is set; the link does not go through a proxy unless --proxy says so", names)

    def _say(self, text: str) -> None:
        """Log once what is so for hours while the coordinator is away."""
        log.log(logging.DEBUG if text == self._said else logging.WARNING, "%s", text)
        self._said = text

    # ---- one connection

    async def _connect(self) -> None:
        identity = self._membership.identity(self._settings)
        if identity is None:
            raise ConfigError("this node has not enrolled; start it with --join FILE")
        with contextlib.suppress(RunError):
            if await self._membership.renew_if_due(self._settings, identity):
                log.info("the certificate was renewed")
                identity = self._membership.identity(self._settings) or identity
        proxy = self._settings.proxy
        async with open_channel(self._settings.address, identity, proxy=proxy) as channel:
            call = channel.stream_stream(
                f"/{SERVICE}/Connect", request_serializer=to_wire, response_deserializer=from_wire
            )()
            stream = _Stream(call, await self._greet(call))
            self._stream = stream
            self._said = ""
            self._on_event("connected")
            log.info("connected to %s as %s", self._settings.address, stream.welcome.name)
            if stream.welcome.note:
                log.warning("the coordinator says: %s", plain(stream.welcome.note))
            try:
                await self._converse(stream, identity)
            finally:
                self._stream = None
                call.cancel()
                self._on_event("disconnected")

    async def _greet(self, call: Any) -> Welcome:
        config = self._settings.node_config
        hello = Hello(
            protocol=PROTOCOL,
            version=self._version,
            instance=self._instance,
            app_digest=self._app_digest,
            partition=int(config.get("partition-id", 0)),
            partitions=int(config.get("num-partitions", 1)),
            device=self._trainee.device,
            held=[self._task.begin.id] if self._task is not None and self._task.wanted else [],
        )
        try:
            await asyncio.wait_for(call.write(Frame(hello=hello)), _WELCOME_S)
            frame = await asyncio.wait_for(call.read(), _WELCOME_S)
        except asyncio.InvalidStateError:
            frame = grpc.aio.EOF
        if not isinstance(frame, Frame) or not frame.HasField("welcome"):
            await _raise_status(call)
            raise FrameError("the coordinator did not say welcome")
        welcome = frame.welcome
        self._node_id = welcome.node_id
        if welcome.app_digest != self._app_digest and not self._any_app:
            raise ConfigError(
                f"the coordinator's app {welcome.app_digest[:12]} differs from this node's "
                f"{self._app_digest[:12]}; install the same files on both, or use --any-app"
            )
        return welcome

    async def _converse(self, stream: _Stream, identity: Identity) -> None:
        if self._task is not None and self._task.answer is not None and self._task.wanted:
            self._deliver(self._task)
        tasks = [
            asyncio.ensure_future(each)
            for each in (
                self._read(stream),
                self._write(stream),
                self._beat(stream),
                self._renew(identity),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except asyncio.InvalidStateError:
            await _raise_status(stream.call)
            raise EOFError("the connection is closed") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat(self, stream: _Stream) -> None:
        interval = min(60.0, max(0.05, stream.welcome.beat_s))
        silent = max(_SHORTEST_SILENCE_S, _SILENT_BEATS * interval)
        while True:
            await asyncio.sleep(interval * random.uniform(0.9, 1.0))
            if time.monotonic() - stream.heard > silent:
                raise RunError("the coordinator says nothing")
            stream.outgoing.put_nowait(Frame(beat=self._pulse(stream)))

    def _pulse(self, stream: _Stream) -> Beat:
        """That this node is here, and how far it is with what it was asked."""
        coming, task = stream.receiving, self._next or self._task
        if coming is not None:
            return Beat(phase="receiving", id=coming.begin.id, received=coming.at)
        if task is None:
            return Beat(phase="idle")
        return Beat(
            phase=self._phase(),
            id=task.begin.id,
            received=task.begin.size,
            working=task.answer is None,
        )

    async def _renew(self, identity: Identity) -> None:
        while True:
            await asyncio.sleep(_DAY_S / 4)
            with contextlib.suppress(RunError, ConfigError):
                await self._membership.renew_if_due(self._settings, identity)

    def _phase(self) -> str:
        assert self._task is not None
        return self._task.begin.message_type if self._task.answer is None else "replying"

    async def _read(self, stream: _Stream) -> None:
        while True:
            receiving = stream.receiving
            frame = await stream.call.read()
            if frame is grpc.aio.EOF:
                await _raise_status(stream.call)
                raise EOFError("the coordinator has closed the connection")
            stream.heard = time.monotonic()
            if isinstance(frame, memoryview):
                if receiving is None:
                    raise FrameError("a chunk came that belongs to nothing")
                if receiving.add(frame):
                    stream.receiving = None
                    del frame
                    if receiving.begin.size > LARGE:  # from here on the app needs the memory
                        give_back()
                    self._take(receiving.begin, receiving.file)
                    stream.outgoing.put_nowait(Frame(beat=self._pulse(stream)))
                continue
            kind = frame.WhichOneof("kind")
            if kind == "begin":
                stream.receiving = self._begin(frame.begin)
            elif kind == "grant":
                task = self._task
                if task is not None and task.begin.id == frame.grant.id:
                    stream.outgoing.put_nowait(task)
            elif kind == "done":
                self._forget(frame.done.id)
            elif kind == "cancel":
                self._unwanted(frame.cancel.id)
            elif kind == "drain":
                self._over = self._once and frame.drain.for_good
                self._on_event("drained")

    async def _write(self, stream: _Stream) -> None:
        while True:
            item = await stream.outgoing.get()
            if isinstance(item, Frame):
                await stream.call.write(item)
            elif item is self._task and item.answer is not None:
                await self._send(stream, item.begin.id, item.answer)

    async def _send(self, stream: _Stream, message_id: str, answer: Answer) -> None:
        head = Begin(id=message_id, size=size_of(answer.parts))
        if answer.error is not None:
            head.failed, head.size = True, 0
            head.error_code, head.error_reason = answer.error
        elif head.size <= INLINE:
            head.inline = b"".join(answer.parts)
        await stream.call.write(Frame(begin=head))
        if head.failed or head.inline:
            return
        for chunk in cut(answer.parts, stream.pace):
            stream.pace.begin()
            await stream.call.write(chunk)
            stream.pace.end()

    # ---- instructions

    def _begin(self, begin: Begin) -> Receiving | None:
        check_size(begin.size, LARGEST_CONTENT)
        if len(begin.inline) == begin.size:
            self._take(begin)
            return None
        if begin.inline or begin.size <= INLINE:
            raise FrameError("the content inside of a begin is not what was announced")
        # While the app reads one content, the next goes to a file of its own.
        held = self._task
        return Receiving(begin, 1 - held.file if held is not None else 0, self._trainee.inbound)

    def _take(self, begin: Begin, file: int = 0) -> None:
        due = time.monotonic() + begin.deadline_s * (1 + _LATE) if begin.deadline_s else None
        task = Task(begin, due, file)
        held = self._task
        if held is not None and key(held.begin) == key(begin):
            held.wanted = True
            if held.answer is not None:
                self._deliver(held)
            return
        if self._work is not None and not self._work.done():
            assert held is not None
            held.wanted = False  # the coordinator has moved on
            self._next = task
            wait = max(_GRACE_S, task.began - held.began)
            if task.due is not None:
                wait = min(wait, max(0.0, task.due - task.began))
            asyncio.get_running_loop().call_later(wait, self._kill_overdue, task)
            return
        self._launch(task)

    def _launch(self, task: Task) -> None:
        self._task = task
        self._work = asyncio.create_task(self._answer(task))

    def _kill_overdue(self, task: Task) -> None:
        """An instruction waits, and the app still hangs in one that nobody wants."""
        if self._next is task:
            log.warning("what nobody waits for any longer took too long; it was stopped")
            self._trainee.stop()

    async def _answer(self, task: Task) -> None:
        left = None if task.due is None else max(0.01, task.due - time.monotonic())
        try:
            task.answer = await self._trainee.run(task.begin, self._node_id, left, file=task.file)
        except Exception:
            log.exception("unexpected")
            task.answer = Answer(task.begin.id, error=(CRASHED, "the node had a fault"))
        following = self._next
        if following is not None:
            self._next = None
            self._launch(following)
        elif task.wanted:
            self._deliver(task)
        else:
            self._task = None

    def _deliver(self, task: Task) -> None:
        """Send a reply, or offer it if it is large; without a connection, later."""
        stream, answer = self._stream, task.answer
        if stream is None or answer is None:
            return
        size = size_of(answer.parts)
        if size > stream.welcome.largest:
            reason = f"its reply of {size} bytes is larger than the coordinator takes"
            task.answer = Answer(task.begin.id, error=(CRASHED, reason))
            size = 0
        if size > OFFERED_ABOVE:
            stream.outgoing.put_nowait(Frame(offer=Offer(id=task.begin.id, size=size)))
        else:
            stream.outgoing.put_nowait(task)

    def _forget(self, message_id: str) -> None:
        if self._task is not None and self._task.begin.id == message_id:
            self._unwanted(message_id)

    def _unwanted(self, message_id: str) -> None:
        if self._next is not None and self._next.begin.id == message_id:
            self._next = None
        if self._task is not None and self._task.begin.id == message_id:
            self._task.wanted = False
            if self._work is None or self._work.done():
                self._task = None


async def _raise_status(call: Any) -> None:
    """Raise the status that the coordinator has ended a call with, if it was not OK."""
    status = await call.code()
    if status != grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            status,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )
