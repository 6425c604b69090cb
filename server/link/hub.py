"""The coordinator's end of the link: one stream a node, no polling, no thread a node.

    instruct   an instruction waits in its node's line until the node is free and connected
    offer      a large reply waits until there is room for it, so memory does not grow with nodes
    tick       once a second: silent peers, lost nodes, revocations

Everything here runs on one event loop in one thread; `Hub.submit`, `Hub.cancel` and
`Hub.members` are the only doors for other threads. What a peer sends is never trusted: who it is
says its certificate, what it may send is what was asked of it, and how much, is limited.
"""

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from umbel.server.link.enrolment import EnrolledNode
from umbel.transport.codec import Buffer
from umbel.transport.frames import LARGEST_CHUNK, Pace
from umbel.transport.link_pb2 import Begin, Cancel, Done, Frame, Grant, Hello

log = logging.getLogger("umbel.link")

BEAT_S = 12.0
"""How often a node says that it is alive."""
SILENT_S = 45.0
"""A peer that has said nothing for this long is gone."""
STALLED_S = 60.0
"""A peer that takes or sends no chunk for this long is gone."""
_SHARED_CHUNKS = 8 << 20
_ROOM = 64 << 20


@dataclass(frozen=True)
class Reply:
    """What came of an instruction: the bytes of a content, or why there is none."""

    instruction: "Instruction"
    parts: Sequence[memoryview | bytes] = ()
    error: tuple[int, str] | None = None


@dataclass(eq=False)
class Instruction:
    """A message to a node, on its way.

    Attributes:
        message_id: the same whenever the same step of the same run is asked again.
        node_id: who shall answer.
        begin: head of the message.
        parts: its encoded content, shared among instructions.
        deadline: on the monotonic clock, or None.
        inbox: where the reply goes.
    """

    message_id: str
    node_id: int
    begin: Begin
    parts: Sequence[Buffer]
    deadline: float | None
    inbox: "queue.SimpleQueue[Reply]"
    sent: bool = False
    room: int = 0


class Session:
    """One connection of one node."""

    def __init__(self, node: EnrolledNode, hello: Hello) -> None:
        self.node = node
        self.hello = hello
        self.began = self.heard = time.monotonic()
        self.phase = "idle"
        self.outgoing: asyncio.Queue[Frame | Instruction] = asyncio.Queue()
        self.ended: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self.pace = Pace()
        self.sending_since: float | None = None
        self.granted: Instruction | None = None
        self.taken = ""

    def send(self, item: Frame | Instruction) -> None:
        """Put something into the queue of what is written."""
        self.outgoing.put_nowait(item)

    def end(self, status: str, sentence: str) -> None:
        """Close the connection, with a sentence for the peer."""
        if not self.ended.done():
            self.ended.set_result((status, sentence))


@dataclass
class Line:
    """A node as the hub sees it, over all of its connections."""

    node: EnrolledNode
    waiting: deque[Instruction] = field(default_factory=deque)
    current: Instruction | None = None
    session: Session | None = None
    hello: Hello = field(default_factory=Hello)
    seen: float = 0.0  # seconds since 1970
    left: float = 0.0  # monotonic
    lost: bool = False


@dataclass
class Traffic:
    """Counters, for metrics and status."""

    bytes_down: int = 0
    bytes_up: int = 0
    replies: int = 0
    failures: int = 0
    refused: int = 0
    reconnects: int = 0


class Hub:
    """Lines of nodes and instructions; see the module's docstring.

    Args:
        lost_after: seconds after which a node that left is given up: its instructions are
            answered with an error, and it is no member until it comes back.
        lost_code: Flower's code for such errors.
        room: bytes of replies that may be on their way or unread at once; 0 chooses.
    """

    def __init__(self, *, lost_after: float = 120.0, lost_code: int = 0, room: int = 0) -> None:
        self.lines: dict[int, Line] = {}
        self.traffic = Traffic()
        self.lost_after = lost_after
        self.on_change: Callable[[], None] = lambda: None
        self._lost_code = lost_code
        self._by_id: dict[str, Instruction] = {}
        self._room, self._fixed_room = room or _ROOM, bool(room)
        self._used = 0
        self._offers: deque[tuple[Session, Instruction, int]] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None

    # ---- doors for other threads

    def submit(self, instructions: Sequence[Instruction]) -> None:
        """Send instructions."""
        self._call(self._submit, instructions)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        self._call(self._cancel, list(message_ids))

    def release(self, reply: Reply) -> None:
        """The bytes of a reply have been read."""
        if reply.instruction.room:
            self._call(self._free, reply.instruction)

    def members(self) -> list[Line]:
        """The nodes that are here, or have left so lately that they are waited for."""
        return [
            line
            for line in list(self.lines.values())
            if line.node.revoked is None and not line.lost
        ]

    def connected(self) -> int:
        """How many nodes are connected."""
        return sum(line.session is not None for line in list(self.lines.values()))

    def _call(self, function: Callable[..., Any], *values: Any) -> None:
        if self.loop is None or self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(function, *values)

    # ---- instructions

    def _submit(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            line = self.lines.get(instruction.node_id)
            if line is None or line.lost or line.node.revoked is not None:
                self._fail(instruction, "the node is not connected")
                continue
            self._by_id[instruction.message_id] = instruction
            line.waiting.append(instruction)
            self._advance(line)

    def _advance(self, line: Line) -> None:
        if line.current is None and line.waiting:
            line.current = line.waiting.popleft()
        if line.current is not None and not line.current.sent and line.session is not None:
            line.current.sent = True
            line.session.taken = ""  # what comes next says that the reply before has arrived
            line.session.send(line.current)

    def _cancel(self, message_ids: Sequence[str]) -> None:
        for message_id in message_ids:
            instruction = self._by_id.pop(message_id, None)
            if instruction is None:
                continue
            self._free(instruction)
            line = self.lines[instruction.node_id]
            if line.current is instruction:
                line.current = None
                if instruction.sent and line.session is not None:
                    line.session.send(Frame(cancel=Cancel(id=message_id)))
                self._advance(line)
            else:
                line.waiting.remove(instruction)

    def _fail(self, instruction: Instruction, reason: str) -> None:
        self.traffic.failures += 1
        self._by_id.pop(instruction.message_id, None)
        self._free(instruction)
        instruction.inbox.put(Reply(instruction, error=(self._lost_code, reason)))

    def wanted(self, session: Session, message_id: str) -> Instruction | None:
        """The instruction that a reply of this node may answer, if it is still wanted."""
        instruction = self._by_id.get(message_id)
        if instruction is None:
            return None
        if instruction.node_id != session.node.node_id:
            log.warning(
                "node %s answered an instruction of another node; ignored", session.node.name
            )
            return None
        line = self.lines[instruction.node_id]
        return instruction if line.current is instruction and instruction.sent else None

    def answered(self, session: Session, instruction: Instruction, reply: Reply) -> None:
        """A whole reply is here."""
        session.granted = None
        self._by_id.pop(instruction.message_id, None)
        self.traffic.replies += 1
        self.traffic.failures += reply.error is not None
        line = self.lines[instruction.node_id]
        line.current = None
        session.taken = instruction.message_id
        instruction.inbox.put(reply)
        self._advance(line)

    # ---- room for replies

    def offer(self, session: Session, instruction: Instruction, size: int) -> None:
        """A node has a large reply; it is let in when there is room."""
        if not self._fixed_room:
            self._room = max(self._room, 2 * size)
        self._offers.append((session, instruction, size))
        self._grant()

    def _grant(self) -> None:
        while self._offers:
            session, instruction, size = self._offers[0]
            if session.ended.done() or self.wanted(session, instruction.message_id) is None:
                self._offers.popleft()
                continue
            if self._used and self._used + size > self._room:
                return
            self._offers.popleft()
            instruction.room = size
            self._used += size
            session.granted = instruction
            session.heard = time.monotonic()
            session.send(Frame(grant=Grant(id=instruction.message_id)))

    def _free(self, instruction: Instruction) -> None:
        self._used -= instruction.room
        instruction.room = 0
        self._grant()

    # ---- connections

    def join(self, session: Session) -> None:
        """A node is connected; refusals were said before."""
        line = self.lines.setdefault(session.node.node_id, Line(session.node))
        if line.session is not None:
            line.session.end("ABORTED", "the node has connected again")
            self._left(line, line.session)
        self.traffic.reconnects += bool(line.seen)
        line.node, line.hello, line.session = session.node, session.hello, session
        line.seen, line.lost = time.time(), False
        held = set(session.hello.held)
        for message_id in held - self._by_id.keys():
            session.send(Frame(done=Done(id=message_id)))
        if line.current is not None and line.current.message_id not in held:
            line.current.sent = False  # it never came, or the node was restarted: send it again
        self._share_chunks()
        self._advance(line)
        self.on_change()

    def leave(self, session: Session) -> None:
        """A connection is over."""
        line = self.lines.get(session.node.node_id)
        if line is not None and line.session is session:
            self._left(line, session)
            line.session = None
            line.left = time.monotonic()
            self._share_chunks()
            self.on_change()

    def _left(self, line: Line, session: Session) -> None:
        line.seen = time.time()
        if session.granted is not None:
            self._free(session.granted)
            session.granted = None

    def _share_chunks(self) -> None:
        """gRPC holds a chunk or two of every connection: with many, chunks are small."""
        largest = min(LARGEST_CHUNK, max(256 << 10, _SHARED_CHUNKS // max(1, self.connected())))
        for line in self.lines.values():
            if line.session is not None:
                line.session.pace.largest = largest
                line.session.pace.chunk = min(line.session.pace.chunk, largest)

    def tick(self, nodes: Sequence[EnrolledNode] | None) -> None:
        """Once a second; `nodes` if the enrolment has changed."""
        now = time.monotonic()
        for node in nodes or ():
            line = self.lines.get(node.node_id)
            if line is not None:
                line.node = node
                if node.revoked is not None:
                    self._shut_out(line)
        for line in list(self.lines.values()):
            session = line.session
            if session is None:
                if not line.lost and now - line.left > self.lost_after:
                    self._lose(line, f"node {line.node.name} has been away for too long")
                continue
            if session.taken:  # nothing followed
                session.send(Frame(done=Done(id=session.taken)))
                session.taken = ""
            stalled = session.sending_since is not None and now - session.sending_since > STALLED_S
            if now - session.heard > SILENT_S or stalled:
                what = "takes nothing" if stalled else "says nothing"
                log.warning("node %s %s; its connection is closed", line.node.name, what)
                session.end("DEADLINE_EXCEEDED", "nothing was heard for too long")

    def _shut_out(self, line: Line) -> None:
        if line.session is not None:
            line.session.end("PERMISSION_DENIED", f"node {line.node.name} was revoked")
        if not line.lost:
            self._lose(line, f"node {line.node.name} was revoked")

    def _lose(self, line: Line, reason: str) -> None:
        log.warning("%s", reason)
        line.lost = True
        pending = list(line.waiting) + ([line.current] if line.current else [])
        line.waiting.clear()
        line.current = None
        for instruction in pending:
            self._fail(instruction, reason)
        self.on_change()


def frames_of(instruction: Instruction) -> Frame:
    """The head of an instruction as a frame, with the seconds that are left for it."""
    frame = Frame(begin=instruction.begin)
    if instruction.deadline is not None:
        frame.begin.deadline_s = max(0.001, instruction.deadline - time.monotonic())
    return frame


__all__ = ["BEAT_S", "Hub", "Instruction", "Line", "Reply", "Session"]
