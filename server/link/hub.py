"""The coordinator's end of the link: one stream a node, no polling, no thread a node.

    instruct   an instruction waits in its node's line until the node is free and connected
    offer      a large reply waits until there is room for it (`room.py`)
    tick       once a second: silent peers, nodes that get nowhere (`advance.py`), revocations

Everything here runs on one event loop in one thread; `Hub.submit`, `Hub.cancel` and
`Hub.members` are the only doors for other threads. What a peer sends is never trusted: who it is
says its certificate, what it may send is what was asked of it, and how much, is limited.
"""

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from umbel.server.link.advance import TRIES, Advance
from umbel.server.link.enrolment import EnrolledNode
from umbel.server.link.room import Room
from umbel.transport.codec import Buffer
from umbel.transport.frames import LARGEST_CHUNK, Pace
from umbel.transport.link_pb2 import Begin, Cancel, Done, Frame, Hello

log = logging.getLogger("umbel.link")

BEAT_S = 12.0
"""How often a node says that it is alive, at least."""
SILENT_S = 45.0
"""A peer that has said nothing for this long is gone, at the latest."""
STALLED_S = 60.0
"""A peer that takes or sends no chunk for this long is gone."""
SHORT_PATIENCE_S = 15.0
"""A node that got nowhere with one instruction is waited for less in the next, down to this."""
_SHARED_CHUNKS = 8 << 20


@dataclass(frozen=True)
class Reply:
    """What came of an instruction: the bytes of a content, or why there is none.

    Whoever reads the content takes the list of its parts apart.
    """

    instruction: "Instruction"
    parts: list[memoryview] = field(default_factory=list)
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
        sent: it is on its way on the node's present connection, or the node holds it.
        room: bytes that are kept for its reply.
        over: it is answered, or nobody waits for the answer.
        advance: how far the node has come with it.
    """

    message_id: str
    node_id: int
    begin: Begin
    parts: Sequence[Buffer]
    deadline: float | None
    inbox: "queue.SimpleQueue[Reply]"
    sent: bool = False
    room: int = 0
    over: bool = False
    advance: Advance = field(default_factory=Advance)


class Session:
    """One connection of one node."""

    def __init__(self, node: EnrolledNode, hello: Hello) -> None:
        self.node = node
        self.hello = hello
        self.began = self.heard = self.last_chunk = time.monotonic()
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
class NodeState:
    """A node as the hub sees it, over all of its connections."""

    node: EnrolledNode
    waiting: deque[Instruction] = field(default_factory=deque)
    current: Instruction | None = None
    session: Session | None = None
    hello: Hello = field(default_factory=Hello)
    seen: float = 0.0  # seconds since 1970
    left: float = 0.0  # monotonic
    lost: bool = False
    idled: int = 0  # instructions in a row with which the node got nowhere


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
            answered with an error, and it is no member until it comes back. One that is there
            and gets nowhere with an instruction for as long is given up for that instruction.
        lost_code: Flower's code for such errors.
        room: bytes of replies that may be on their way or unread at once; 0 chooses.
    """

    def __init__(self, *, lost_after: float = 120.0, lost_code: int = 0, room: int = 0) -> None:
        self.lines: dict[int, NodeState] = {}
        self.traffic = Traffic()
        self.lost_after = lost_after
        self.on_change: Callable[[], None] = lambda: None
        self._lost_code = lost_code
        self._by_id: dict[str, Instruction] = {}
        self.room = Room(room)
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def beat_s(self) -> float:
        """How often nodes are asked to say that they are alive: four times in `lost_after`."""
        return min(BEAT_S, max(0.25, self.lost_after / 4))

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
            self._call(self.room.free, reply.instruction)

    def members(self) -> list[NodeState]:
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
            self.room.expect(instruction.begin.size)
            line.waiting.append(instruction)
            self._advance(line)

    def _advance(self, line: NodeState) -> None:
        if line.current is None and line.waiting:
            line.current = line.waiting.popleft()
            line.current.advance.step(time.monotonic())
        if line.current is not None and not line.current.sent and line.session is not None:
            line.current.sent = True
            line.current.advance.sends += 1
            line.session.taken = ""  # what comes next says that the reply before has arrived
            line.session.send(line.current)

    def _cancel(self, message_ids: Sequence[str]) -> None:
        for message_id in message_ids:
            instruction = self._by_id.pop(message_id, None)
            if instruction is None:
                continue
            self._finish(instruction)
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
        self._finish(instruction)
        instruction.inbox.put(Reply(instruction, error=(self._lost_code, reason)))

    def _finish(self, instruction: Instruction) -> None:
        instruction.over = True
        self.room.free(instruction)

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
        instruction.over = True
        self.room.arrived(instruction)
        self.traffic.replies += 1
        self.traffic.failures += reply.error is not None
        line = self.lines[instruction.node_id]
        line.current, line.idled = None, 0
        session.taken = instruction.message_id
        instruction.inbox.put(reply)
        self._advance(line)

    # ---- what a node says on the way

    def offer(self, session: Session, instruction: Instruction, size: int) -> None:
        """A node has a large reply; one that is larger than what is taken is an error."""
        largest = instruction.begin.largest
        if largest and size > largest:
            reason = (
                f"its reply of {size} bytes is larger than the {largest} that are taken; "
                "--largest-reply allows more"
            )
            log.warning("node %s: %s", session.node.name, reason)
            self.answered(session, instruction, Reply(instruction, error=(self._lost_code, reason)))
        else:
            self.room.offer(session, instruction, size)

    def beat(self, session: Session, message_id: str, received: int, *, working: bool) -> None:
        """A heartbeat, with what the node says of its instruction."""
        instruction = self.wanted(session, message_id) if message_id else None
        if instruction is not None:
            received = min(received, instruction.begin.size)
            instruction.advance.heard(received, working=working, now=time.monotonic())

    # ---- connections

    def join(self, session: Session) -> None:
        """A node is connected; refusals were said before."""
        line = self.lines.setdefault(session.node.node_id, NodeState(session.node))
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
            said = unanswered(line, held)
            if said:
                log.warning("%s", said)
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
            line.left = session.heard
            self._share_chunks()
            self.on_change()

    def _left(self, line: NodeState, session: Session) -> None:
        line.seen = time.time()
        if session.granted is not None:
            self.room.free(session.granted)
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
        self.room.tick(now)
        for line in list(self.lines.values()):
            self._look_after(line, now)

    def _look_after(self, line: NodeState, now: float) -> None:
        session = line.session
        if session is None:
            if not line.lost and now - line.left > self.lost_after:
                self._lose(line, f"node {line.node.name} has been away for too long")
        else:
            if session.taken:  # nothing followed
                session.send(Frame(done=Done(id=session.taken)))
                session.taken = ""
            stalled = session.sending_since is not None and now - session.sending_since > STALLED_S
            if now - session.heard > min(SILENT_S, self.lost_after) or stalled:
                what = "takes nothing" if stalled else "says nothing"
                log.warning("node %s %s; its connection is closed", line.node.name, what)
                session.end("DEADLINE_EXCEEDED", "nothing was heard for too long")
        current = line.current
        if current is None:
            return
        if self.room.waits(current):
            current.advance.step(now)  # it waits for us
        patience = self._patience(line)
        if now - current.advance.since > patience:
            self._pass_over(line, current, patience)

    def _patience(self, line: NodeState) -> float:
        """Seconds without a step forward that a node is given."""
        shorter = self.lost_after * 0.5 ** min(line.idled, 10)
        return max(shorter, min(self.lost_after, SHORT_PATIENCE_S))

    def _pass_over(self, line: NodeState, instruction: Instruction, patience: float) -> None:
        """The node is there, or comes and goes, and gets nowhere: the round goes on without it."""
        how = instruction.advance.describe(instruction.begin.size)
        reason = (
            f"node {line.node.name} got nowhere with its instruction for {patience:.0f} s: {how}"
        )
        log.warning("%s", reason)
        line.idled += 1
        line.current = None
        if instruction.sent and line.session is not None:
            line.session.send(Frame(cancel=Cancel(id=instruction.message_id)))
        self._fail(instruction, reason)
        self._advance(line)

    def _shut_out(self, line: NodeState) -> None:
        if line.session is not None:
            line.session.end("PERMISSION_DENIED", f"node {line.node.name} was revoked")
        if not line.lost:
            self._lose(line, f"node {line.node.name} was revoked")

    def _lose(self, line: NodeState, reason: str) -> None:
        log.warning("%s", reason)
        line.lost = True
        pending = list(line.waiting) + ([line.current] if line.current else [])
        line.waiting.clear()
        line.current = None
        for instruction in pending:
            self._fail(instruction, reason)
        self.on_change()


def unanswered(line: NodeState, held: Collection[str]) -> str:
    """What both sides say of an instruction that was sent again and again; empty if none was.

    Args:
        line: of the node, which connects again.
        held: ids of the instructions that it says to have.
    """
    current = line.current
    if current is None or current.advance.sends < TRIES or current.message_id in held:
        return ""
    how = current.advance.describe(current.begin.size)
    return (
        f"the {current.begin.message_type} instruction of {current.begin.size:,} bytes to node "
        f"{line.node.name} is not answered: {how}; if the connection breaks each time, its path "
        "may swallow large packets (try a smaller MTU), or the node's process may die"
    )


def frames_of(instruction: Instruction) -> Frame:
    """The head of an instruction as a frame, with the seconds that are left for it."""
    frame = Frame(begin=instruction.begin)
    if instruction.deadline is not None:
        frame.begin.deadline_s = max(0.001, instruction.deadline - time.monotonic())
    return frame


__all__ = ["Hub", "Instruction", "NodeState", "Reply", "Session"]
