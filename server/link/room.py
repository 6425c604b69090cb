"""Room for large replies, so that memory grows neither with nodes nor with what one of them says.

    offer    a node has a large reply; its size is bounded by what it was asked (`largest`)
    grant    it may send it now, and has so long for it while others wait
    free     its bytes have been read, or nobody wants them any more

Whoever holds room and does not use it while others wait is cut off, and comes after them from
then on; each time it is given four times as long, so that an honest node on a slow line gets
through in the end. Where nobody waits, nobody is hurried.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from umbel.transport.link_pb2 import Frame, Grant

if TYPE_CHECKING:
    from umbel.server.link.hub import Instruction, Session

log = logging.getLogger("umbel.link")

SMALLEST_ROOM = 64 << 20
"""Bytes of replies that may always be on their way or unread at once."""
MARGIN = 16 << 20
"""Bytes that a reply may have beyond the multiple of what was asked."""
TIMES = 4
"""A reply may be this many times the largest content that the run has sent: a masked sum takes
twice the model, a layer may lengthen an update twice."""
GRANT_S = 20.0
"""Seconds that a granted reply has while others wait, and those for its size."""
SLOWEST = 1 << 20
"""Bytes a second that a granted reply comes with, while others wait."""
STANDSTILL_S = 10.0
"""Nothing of a granted reply has come for this long, while others wait."""
_MOST_CUTS = 6


def largest_reply(asked: int, margin: int = MARGIN) -> int:
    """Bytes of the largest reply that is taken, where the largest content sent has `asked`."""
    return TIMES * asked + margin


@dataclass
class _Offer:
    session: "Session"
    instruction: "Instruction"
    size: int


@dataclass
class Room:
    """Bytes of replies that are granted or unread; see the module's docstring.

    Attributes:
        size: bytes; 0 lets it grow to two replies of the size of what was asked.
        used: of them.
        cuts: how often a node has been cut off, by its id.
    """

    size: int = 0
    used: int = 0
    cuts: dict[int, int] = field(default_factory=dict)
    _offers: list[_Offer] = field(default_factory=list)
    _granted: dict["Instruction", tuple["Session", float]] = field(default_factory=dict)
    _room: int = SMALLEST_ROOM
    _usual: int = 0

    def __post_init__(self) -> None:
        self._room = self.size or SMALLEST_ROOM

    def expect(self, asked: int) -> None:
        """A content of so many bytes has been sent; replies of about its size are usual."""
        self._usual = max(self._usual, asked + asked // 4 + MARGIN)

    def offer(self, session: "Session", instruction: "Instruction", size: int) -> None:
        """A node has a large reply; it is let in when there is room."""
        self._offers = [each for each in self._offers if each.instruction is not instruction]
        self._offers.append(_Offer(session, instruction, size))
        if not self.size and size <= self._usual:
            self._room = max(self._room, 2 * size)
        self._grant()

    def waits(self, instruction: "Instruction") -> bool:
        """Whether a reply to it is offered and waits for room."""
        return any(each.instruction is instruction for each in self._offers)

    def free(self, instruction: "Instruction") -> None:
        """The bytes of a reply have been read, or will not come."""
        self._granted.pop(instruction, None)
        if instruction.room or self._offers:
            self.used -= instruction.room
            instruction.room = 0
            self._offers = [each for each in self._offers if each.instruction is not instruction]
            self._grant()

    def arrived(self, instruction: "Instruction") -> None:
        """All of a reply is here; its room is used until it has been read."""
        self._granted.pop(instruction, None)

    def tick(self, now: float) -> None:
        """Once a second: whoever holds up others is cut off."""
        self._grant()
        if not self._offers:
            return
        for instruction, (session, since) in list(self._granted.items()):
            cuts = self.cuts.get(session.node.node_id, 0)
            longer = 4.0 ** min(cuts, _MOST_CUTS)
            whole = (GRANT_S + instruction.room / SLOWEST) * longer
            still = STANDSTILL_S * longer
            if now - since < whole and now - max(since, session.last_chunk) < still:
                continue
            self.cuts[session.node.node_id] = cuts + 1
            del self._granted[instruction]
            log.warning(
                "node %s holds room for a reply of %d bytes and sends too slowly, and others "
                "wait; it is cut off and comes after them",
                session.node.name,
                instruction.room,
            )
            session.end("DEADLINE_EXCEEDED", "the reply came too slowly while others waited")

    def _grant(self) -> None:
        self._offers = [each for each in self._offers if _stands(each)]
        self._offers.sort(key=self._rank)  # stable: in order of arrival among equals
        while self._offers:
            first = self._offers[0]
            if self.used and self.used + first.size > self._room:
                return
            self._offers.pop(0)
            now = time.monotonic()
            first.instruction.room = first.size
            self.used += first.size
            self._granted[first.instruction] = (first.session, now)
            first.session.granted = first.instruction
            first.session.heard = now
            first.session.send(Frame(grant=Grant(id=first.instruction.message_id)))

    def _rank(self, offer: _Offer) -> tuple[int, bool]:
        return self.cuts.get(offer.session.node.node_id, 0), offer.size > self._usual


def _stands(offer: _Offer) -> bool:
    return not offer.session.ended.done() and not offer.instruction.over


__all__ = ["Room", "largest_reply"]
