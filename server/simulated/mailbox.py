"""A mailbox whose replies come in the order in which simulated devices would send them.

The nodes really train, wherever the engine runs them; when their replies are here is not when they
are handed out. A reply is handed out as soon as no other can be earlier on the virtual clock, so
that the order depends on the devices alone: not on the machine, the number of workers or its load.
Until then it is held, so a cohort takes as much memory as its replies do.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message

from umbel.core.flower import expired
from umbel.core.held import bytes_in
from umbel.server.drive import ROUND_TTL
from umbel.server.mailbox import Mailbox
from umbel.server.simulated.devices import Device


@dataclass
class Clock:
    """The virtual time of a run.

    Attributes:
        now: seconds since it began.
    """

    now: float = 0.0


@dataclass(frozen=True)
class _Trip:
    """A message that has no reply yet.

    Attributes:
        number: of the message, in the order of sending.
        device: of its node.
        trained: when the node could begin to answer.
        until: when the message's ttl is over.
    """

    number: int
    device: Device
    trained: float
    until: float


class SimulatedMailbox(Mailbox):
    """Puts a mailbox's replies in the order of a virtual clock.

    Args:
        inner: sends messages and has the replies as they are made.
        clock: goes on to when each reply is there.
        devices: by node id.
        timeout: virtual seconds from now; None is no end.
    """

    def __init__(
        self,
        inner: Mailbox,
        clock: Clock,
        devices: dict[int, Device],
        timeout: float | None,
    ) -> None:
        self._inner, self._clock, self._devices = inner, clock, devices
        self._deadline = math.inf if timeout is None else clock.now + timeout
        self._sent = 0
        self._open: dict[str, _Trip] = {}
        self._earliest: list[tuple[float, int, str]] = []
        """When replies that are not here could come at the earliest; some are here by now."""
        self._here: list[tuple[float, int, Message]] = []
        """Replies that are here, by when they come."""

    def send(self, messages: Iterable[Message]) -> None:
        messages = list(messages)
        lasting = [message.metadata.ttl for message in messages]
        for message in messages:
            message.metadata.ttl = ROUND_TTL  # the machine's own time ends nothing
        self._inner.send(messages)
        for message, ttl in zip(messages, lasting, strict=True):
            data = message.metadata
            device = self._devices.get(data.dst_node_id)
            if device is None:
                continue  # to nobody
            trains = data.message_type.partition(".")[0] == "train"
            trained = self._clock.now + device.until_trained(bytes_in(message), trains=trains)
            self._sent += 1
            self._open[data.message_id] = _Trip(self._sent, device, trained, self._clock.now + ttl)
            heapq.heappush(self._earliest, (trained, self._sent, data.message_id))

    def __iter__(self) -> Iterator[Message]:
        replies = iter(self._inner)
        while self._open or self._here:
            while self._open and not self._is_next():
                reply = next(replies, None)
                if reply is None:  # nothing was under way: ask for what was sent since
                    replies = iter(self._inner)
                    reply = next(replies, None)
                if reply is None:
                    self._open.clear()
                    break
                self._arrive(reply)
            if not self._here:
                return
            at, _, reply = heapq.heappop(self._here)
            if at > self._deadline:
                self._clock.now = self._deadline
                self.cancel()
                return
            self._clock.now = max(self._clock.now, at)
            yield reply
            del reply  # while the next is awaited, this one must not take room

    def _is_next(self) -> bool:
        """Whether no reply that is not here could come before the first one that is."""
        while self._earliest and self._earliest[0][2] not in self._open:
            heapq.heappop(self._earliest)
        return bool(self._here) and (
            not self._earliest or self._here[0][:2] < self._earliest[0][:2]
        )

    def _arrive(self, reply: Message) -> None:
        trip = self._open.pop(reply.metadata.reply_to_message_id)
        at = trip.trained + trip.device.to_send(bytes_in(reply))
        if at > trip.until:
            at, reply = trip.until, expired(reply)
        heapq.heappush(self._here, (at, trip.number, reply))

    def cancel(self) -> None:
        self._inner.cancel()
        self._open.clear()
        self._earliest.clear()
        self._here.clear()
