"""How far a node has come with an instruction, over all of its connections.

A heartbeat says that a node is there, not that it gets anywhere: behind a path that swallows
large packets a node reconnects every few seconds, and a node that only sends heartbeats would
be waited for until the round's time is over. So steps forward are measured: bytes of the
instruction that the node says it has, work on it, bytes of the reply that have come. What was
reached once is no step the next time.
"""

from dataclasses import dataclass

TRIES = 3
"""An instruction that was sent this often without an answer is spoken of, and after that
work on it that begins anew is no step forward any more."""


@dataclass
class Advance:
    """Steps forward of one instruction.

    Attributes:
        since: of the last one, on the monotonic clock.
        sends: how often it was sent.
        received: most bytes of it that the node has said to have.
        returned: most bytes of the reply that have come.
        done: the node has said that it works on it.
    """

    since: float = 0.0
    sends: int = 0
    received: int = 0
    returned: int = 0
    done: bool = False

    def step(self, now: float) -> None:
        """A step forward, whichever."""
        self.since = max(self.since, now)

    def heard(self, received: int, *, working: bool, now: float) -> None:
        """What a heartbeat says of it."""
        if received > self.received:
            self.received = received
            self.step(now)
        if working and (self.sends <= TRIES or not self.done):
            self.step(now)
        self.done = self.done or working

    def arrived(self, returned: int, now: float) -> None:
        """So many bytes of the reply have come on this connection."""
        if returned > self.returned:
            self.returned = returned
            self.step(now)

    def describe(self, size: int) -> str:
        """Where it stands, for people."""
        times = "once" if self.sends == 1 else f"{self.sends} times"
        if not self.sends:
            return "it could not be sent"
        if self.done:
            return f"the node has it (sent {times}), and no reply comes"
        told = f"{self.received:,} of {size:,} bytes have arrived as far as the node says"
        return f"it was sent {times}, and {told}"


__all__ = ["TRIES", "Advance"]
