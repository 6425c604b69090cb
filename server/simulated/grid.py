"""The embedded engine on a virtual clock."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message

from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.mailbox import Mailbox
from umbel.server.simulated.devices import Device
from umbel.server.simulated.mailbox import Clock, SimulatedMailbox

SAID = "simulated_s"
"""The virtual time, in the lines of a run."""


class SimulatedGrid(EmbeddedGrid):
    """Virtual nodes that answer when devices of theirs would.

    Args:
        devices: of each partition.

    The other arguments are those of `EmbeddedGrid`.
    """

    simulates = True

    def __init__(self, *args: Any, devices: Sequence[Device], **more: Any) -> None:
        super().__init__(*args, **more)
        self.clock = Clock()
        self._devices = {FIRST_NODE + place: device for place, device in enumerate(devices)}

    def open(self, timeout: float | None = None) -> Mailbox:
        return SimulatedMailbox(super().open(None), self.clock, self._devices, timeout)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        messages = list(messages)
        found = {
            reply.metadata.reply_to_message_id: reply for reply in self.stream(messages, timeout)
        }
        ids = [message.metadata.message_id for message in messages]
        return [found[message_id] for message_id in ids if message_id in found]

    def told(self) -> Mapping[str, float]:
        return {SAID: self.clock.now}

    def go_on(self, line: Mapping[str, Any]) -> None:
        self.clock.now = float(line.get(SAID, 0.0))
