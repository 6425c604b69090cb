"""The link engine as a Flower `Grid`: real nodes, in streams, with nothing that polls."""

import logging
import math
import queue
import signal
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict

from umbel.core.errors import ConfigError
from umbel.core.flower import (
    CRASHED,
    TOO_LATE,
    UNAVAILABLE,
    UNKNOWN,
    NodeInfo,
    give_id,
    is_over,
    no_such_message,
    seconds_left,
    take_identity,
)
from umbel.server.base_grid import BaseGrid, check_ttl, in_time, not_here
from umbel.server.link.hub import Hub, Instruction, Reply
from umbel.server.link.room import MARGIN, largest_reply
from umbel.server.mailbox import Mailbox
from umbel.server.roster import NodeRef
from umbel.server.round_recorder import RoundRecorder
from umbel.transport.allocator import LARGE, give_back
from umbel.transport.codec import Buffer, CodecError, Limits, decode, encode, size_of
from umbel.transport.frames import INLINE, LARGEST_CONTENT
from umbel.transport.link_pb2 import Begin

log = logging.getLogger("umbel.link")
_LOOK_UP_S = 0.5  # a waiting thread wakes up this often, so that a signal can interrupt it


class StoppedError(KeyboardInterrupt):
    """The server was told to end; like Ctrl-C, no app should take it for a failure.

    Attributes:
        number: of the signal.
        idle: it had no unfinished run.
    """

    number = int(signal.SIGTERM)
    idle = False


class LinkGrid(BaseGrid):
    """A grid whose nodes are processes elsewhere.

    Message ids are made of the run, the round, the kind of message, the node, and a count: a
    server that was killed and repeats a round asks under the same ids, so a node that has the
    answer already sends it again in place of training twice.

    Args:
        hub: of connections.
        run_id: of the run.
        run_config: the run's options, for the nodes' `Context.run_config`.
        enough: the share of a round's training replies that is waited for; the rest are
            stragglers, whose cohort was chosen larger for them.
        largest: bytes of the largest reply that is taken; 0 is four times the largest content
            that the run has sent, and `margin`.
        margin: bytes; large where the first reply may bring a model that nobody has sent.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        run_id: int = 1,
        run_config: Mapping[str, Any] | None = None,
        enough: float = 1.0,
        largest: int = 0,
        margin: int = MARGIN,
    ) -> None:
        if not 0 < enough <= 1:
            raise ConfigError(f"enough is {enough}; it is a share of replies, above 0, at most 1")
        take_identity(run_id)
        self.hub = hub
        super().__init__(run_id, enough)
        self._config = b"".join(encode(RecordDict({"c": ConfigRecord(dict(run_config or {}))})))
        self._largest, self._margin = largest, margin
        self._limits = Limits(total=largest or LARGEST_CONTENT)
        self._sent = 0  # bytes of the largest content
        self._late: set[int] = set()  # nodes that have let a round's time run out
        self._asked: Counter[str] = Counter()
        self._open: dict[str, Message] = {}
        self._pushed: set[str] = set()
        self._inbox: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._ready: dict[str, Message] = {}
        self.stopping = False
        self.phase = "waiting"

    # ---- what Flower asks of a grid

    # An app that waits for nodes or replies asks again and again, and is stopped there.

    def get_node_ids(self) -> list[int]:
        self._go_on()
        return super().get_node_ids()

    def get_nodes(self) -> list[NodeInfo]:
        self._go_on()
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send.

        Returns:
            Ids to pull replies by; as Flower's grid has it, None in the place of a message to a
            node that is not in this federation.
        """
        self._go_on()
        ids = self._push(messages, self._inbox, None)
        self._pushed.update(message_id for message_id in ids if message_id is not None)
        return ids  # type: ignore[return-value]  # None is Flower's own answer, against its types

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are here; it does not wait.

        An error stands in the place of a reply that was pulled before, of a message that is
        unknown, and of one whose ttl is over.
        """
        self._go_on()
        while not self._inbox.empty():
            reply = self._message(self._inbox.get())
            if reply is not None:
                self._ready[reply.metadata.reply_to_message_id] = reply
        found = []
        for message_id in dict.fromkeys(message_ids):
            asked = self._open.get(message_id) if message_id in self._pushed else None
            if message_id in self._ready:
                found.append(in_time(self._ready.pop(message_id)))
            elif asked is None:
                found.append(no_such_message(message_id or "", self._run.run_id))
            elif is_over(asked):
                found += self._expire([message_id])
            else:
                continue
            self._pushed.discard(message_id)
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies, in the order of the messages they answer."""
        messages = list(messages)
        replies = {r.metadata.reply_to_message_id: r for r in self.stream(messages, timeout)}
        ids = [message.metadata.message_id for message in messages]
        return [replies[message_id] for message_id in ids if message_id in replies]

    def _go_on(self) -> None:
        if self.stopping:
            raise StoppedError

    # ---- what only engines of Umbel have

    def roster(self) -> list[NodeRef]:
        """The members of the federation, by partition and name."""
        nodes = [
            NodeRef(line.node.node_id, line.node.name, line.hello.partition)
            for line in self.hub.members()
        ]
        return sorted(nodes, key=lambda node: (node.partition, node.name))

    def open(self, timeout: float | None = None) -> "LinkMailbox":
        """A mailbox whose replies end after `timeout` seconds; see `LinkMailbox`."""
        return LinkMailbox(self, timeout)

    def _next(self, inbox: "queue.SimpleQueue[Reply]", until: float) -> Reply | None:
        """The next reply; None when the time is over."""
        while True:
            self._go_on()
            left = until - time.monotonic()
            try:
                return inbox.get(timeout=min(_LOOK_UP_S, max(0.0, left)))
            except queue.Empty:
                if left <= 0:
                    return None

    def _expire(self, message_ids: Sequence[str]) -> list[Message]:
        """Errors in the place of replies to messages whose ttl is over; their nodes are told."""
        if not message_ids:
            return []
        self.hub.cancel(message_ids)
        replies = []
        for message_id in message_ids:
            reply = Message(Error(UNKNOWN, TOO_LATE), reply_to=self._open.pop(message_id))
            give_id(reply, f"{message_id}/reply")
            replies.append(reply)
        return replies

    def _nobody(self, message: Message) -> Message:
        """The reply in the place of a node that is not in this federation."""
        reason = not_here(message.metadata.dst_node_id)
        return Message(Error(UNAVAILABLE, reason), reply_to=message)

    def _push(
        self,
        messages: Iterable[Message],
        inbox: "queue.SimpleQueue[Reply]",
        deadline: float | None,
    ) -> list[str | None]:
        """Give messages to the hub; their ids, None for those to nobody."""
        encoded: dict[int, tuple[RecordDict, list[Buffer], int]] = {}
        instructions = []
        ids: list[str | None] = []
        messages = list(messages)
        for message in messages:
            check_ttl(message)
            content = message.content
            if id(content) not in encoded:  # one content for many nodes is encoded once
                parts = encode(content)
                encoded[id(content)] = (content, parts, zlib.crc32(parts[0]))
                self._sent = max(self._sent, size_of(parts))
        largest = self._largest or min(LARGEST_CONTENT, largest_reply(self._sent, self._margin))
        for message in messages:
            data = message.metadata
            line = self.hub.lines.get(data.dst_node_id)
            if line is None or line.node.revoked is not None:
                log.error("%s", not_here(data.dst_node_id))
                self._identify(message)  # its error reply needs one
                ids.append(None)
                continue
            _, parts, digest = encoded[id(message.content)]
            message_id = self._identify(message)
            begin = Begin(
                id=message_id,
                size=size_of(parts),
                inline=b"".join(parts) if size_of(parts) <= INLINE else b"",
                run_id=self._run.run_id,
                group_id=data.group_id,
                message_type=data.message_type,
                ttl=data.ttl,
                run_config=self._config,
                digest=digest,
                largest=largest,
            )
            over = time.monotonic() + seconds_left(message)
            due = over if deadline is None else min(over, deadline)
            instructions.append(Instruction(message_id, data.dst_node_id, begin, parts, due, inbox))
            self._open[message_id] = message
            ids.append(message_id)
        self.hub.submit(instructions)
        return ids

    def _identify(self, message: Message) -> str:
        data = message.metadata
        key = f"{self._run.run_id}/{data.group_id}/{data.message_type}/{data.dst_node_id}"
        self._asked[key] += 1
        message_id = f"{key}/{self._asked[key]}"
        give_id(message, message_id)
        return message_id

    def _message(self, reply: Reply) -> Message | None:
        """The reply as Flower's message; None if it is no longer waited for."""
        asked = self._open.pop(reply.instruction.message_id, None)
        if asked is None:
            self.hub.release(reply)
            return None
        if reply.error is not None:
            message = Message(Error(*reply.error), reply_to=asked)
        else:
            try:
                content = decode(reply.parts, limits=self._limits, checksum=True, consume=True)
                message = Message(content, reply_to=asked)
            except CodecError as problem:
                reason = f"its reply cannot be read: {problem}"
                log.warning("node %s: %s", self.name_of(asked.metadata.dst_node_id), reason)
                message = Message(Error(CRASHED, reason), reply_to=asked)
        self.hub.release(reply)
        give_id(message, f"{reply.instruction.message_id}/reply")
        return message

    def _note_late(self, message_ids: set[str]) -> None:
        """The round's time has run out for these: the next is not held up by them as long."""
        for node_id in map(_node_of, message_ids):
            line = self.hub.lines.get(node_id)
            if node_id not in self._late and line is not None and line.session is not None:
                self._late.add(node_id)
                log.warning(
                    "node %s was there and let the time run out; until it answers in time, it is "
                    "waited for at most %.0f s after the others",
                    self.name_of(node_id),
                    self.hub.lost_after,
                )

    def _name_stragglers(self, message_ids: set[str]) -> None:
        names = sorted(self.name_of(_node_of(each)) for each in message_ids)
        log.warning("not waited for any longer: %s", ", ".join(names))

    def gone(self) -> set[int]:
        """Ids of the nodes that were revoked since the run began, or before."""
        lines = list(self.hub.lines.values())
        return {line.node.node_id for line in lines if line.node.revoked is not None}

    def name_of(self, node_id: int) -> str:
        """A node's name, for people."""
        line = self.hub.lines.get(node_id)
        return line.node.name if line is not None else str(node_id)


class LinkMailbox(Mailbox):
    """Messages to real nodes, and their replies as they arrive.

    After `timeout` seconds the replies end, and the nodes stop what they were doing for it. Of a
    trip of training messages the grid's share `enough` is waited for. A node that is lost on the
    way answers with an error.

    Args:
        grid: whose nodes are asked.
        timeout: seconds from now; None is no end.
    """

    def __init__(self, grid: LinkGrid, timeout: float | None) -> None:
        self._grid = grid
        self._until = None if timeout is None else time.monotonic() + timeout
        self._deadline = math.inf if self._until is None else self._until
        self._inbox: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._nobodies: deque[Message] = deque()
        self._waiting: set[str] = set()
        self._wanted = 0
        """How many good replies are still waited for."""
        self._soonest = math.inf
        self._patience = _Patience(grid._late, grid.hub.lost_after)

    def send(self, messages: Iterable[Message]) -> None:
        """Send; allowed at any time, also between two replies.

        Raises:
            StoppedError: the server is being stopped.
        """
        messages = list(messages)
        if not messages:
            return
        grid = self._grid
        grid.phase = messages[0].metadata.message_type
        ids = grid._push(messages, self._inbox, self._until)
        for message, message_id in zip(messages, ids, strict=True):
            if message_id is None:
                self._nobodies.append(grid._nobody(message))
        new = {message_id for message_id in ids if message_id is not None}
        training = all(m.metadata.message_type == "train" for m in messages)
        self._waiting |= new
        self._wanted += ceil(grid.enough * len(new)) if training else len(new)
        self._patience.expect(new)
        self._soonest = min(self._soonest, time.monotonic() + min(map(seconds_left, messages)))

    def __iter__(self) -> Iterator[Message]:
        """Replies as they arrive.

        Raises:
            StoppedError: the server is being stopped.
        """
        grid = self._grid
        while True:
            while self._nobodies:
                yield self._nobodies.popleft()
            if not self._waiting or self._wanted <= 0:
                return
            until = self._patience.until(self._waiting, self._deadline)
            reply = grid._next(self._inbox, min(until, self._soonest))
            if reply is None:
                if time.monotonic() >= until:
                    grid._note_late(self._waiting)
                    return
                yield from self._expired()
                continue
            self._waiting.discard(reply.instruction.message_id)
            self._patience.answered(reply.instruction.node_id)
            message = grid._message(reply)
            del reply
            if message is not None:
                message = in_time(message)
                # An error is no reply that one could do with: whoever fails at once must
                # not end the round for those who train.
                self._wanted -= not message.has_error()
                yield message
            del message  # while the next is decoded, this one must not take room

    def _expired(self) -> list[Message]:
        """Errors in the place of replies to messages whose ttl is over."""
        grid = self._grid
        over = [each for each in self._waiting if is_over(grid._open[each])]
        self._waiting.difference_update(over)
        replies = grid._expire(over)
        left = [seconds_left(grid._open[each]) for each in self._waiting]
        self._soonest = time.monotonic() + min(left) if left else math.inf
        return replies

    def cancel(self) -> None:
        grid = self._grid
        if grid._sent > LARGE:
            give_back()
        waiting, self._waiting = self._waiting, set()
        for message_id in waiting:
            grid._open.pop(message_id, None)
        if waiting:
            grid._name_stragglers(waiting)
            grid.hub.cancel(waiting)


class _Patience:
    """How long late nodes are waited for, once all others have answered.

    Args:
        late: ids of the nodes that have let the time of their last instruction run out; one
            that answers is taken out.
        longest: seconds after the others' last reply, or four times as long as they took.
    """

    def __init__(self, late: set[int], longest: float) -> None:
        self._late, self._longest = late, longest
        self._began = self._last = time.monotonic()
        self._others: set[int] = set()
        self._others_asked = self._late_asked = False

    def expect(self, message_ids: Iterable[str]) -> None:
        """Nodes have been sent these messages."""
        nodes = set(map(_node_of, message_ids))
        self._others |= nodes - self._late
        self._others_asked |= bool(nodes - self._late)
        self._late_asked |= bool(nodes & self._late)

    def answered(self, node_id: int) -> None:
        """A reply has come."""
        self._late.discard(node_id)
        if node_id in self._others:
            self._others.discard(node_id)
            self._last = time.monotonic()

    def until(self, waiting: set[str], deadline: float) -> float:
        """When the wait ends, on the monotonic clock."""
        matters = self._others_asked and self._late_asked
        if not matters or self._others or not waiting:
            return deadline
        mine = self._last + max(self._longest, 4 * (self._last - self._began))
        return min(mine, deadline)


def _node_of(message_id: str) -> int:
    return int(message_id.rsplit("/", 2)[1])


class ObservedLinkGrid(RoundRecorder, LinkGrid):
    """A link grid that takes notes, for apps that keep their own rounds."""
