"""How the coordinator talks to nodes: messages out at any time, replies in as they come.

    with engine.open(timeout) as box:
        box.send(requests)
        for reply in box:               # in order of arrival, until none is open
            box.send([next_request()])  # also meanwhile

Umbel's own engines have mailboxes of their own. A plain Flower `Grid` is asked again and again,
because it cannot wait.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_LOOK_S, LAST_LOOK_S = 0.02, 1.0
"""How long is waited between two looks at a plain grid: the longer, the longer nothing came."""


class Mailbox(ABC):
    """Sends messages to nodes and yields their replies; a context, which cancels at its end."""

    @abstractmethod
    def send(self, messages: Iterable[Message]) -> None:
        """Send; allowed at any time, also between two replies."""

    @abstractmethod
    def __iter__(self) -> Iterator[Message]:
        """Replies as they arrive, until none is open or the time is over.

        A node that is not there, is lost on the way or fails answers with an error.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Replies that have not come are not waited for any longer; their nodes are told so."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class GridMailbox(Mailbox):
    """A mailbox over any Flower `Grid`.

    Args:
        grid: where messages are pushed and replies pulled.
        timeout: seconds from now for which replies are waited for; None is no end.
        sleep: waits between two looks.
    """

    def __init__(
        self, grid: Grid, timeout: float | None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._grid, self._sleep = grid, sleep
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._open: set[str] = set()

    def send(self, messages: Iterable[Message]) -> None:
        ids: Iterable[str | None] = self._grid.push_messages(messages)
        self._open.update(message_id for message_id in ids if message_id)

    def __iter__(self) -> Iterator[Message]:
        wait = FIRST_LOOK_S
        while self._open:
            replies = list(self._grid.pull_messages(sorted(self._open)))
            for reply in replies:
                self._open.discard(reply.metadata.reply_to_message_id)
            yield from replies
            if replies:
                wait = FIRST_LOOK_S
                continue
            if not self._open or time.monotonic() >= self._deadline:
                return
            self._sleep(min(wait, max(0.0, self._deadline - time.monotonic())))
            wait = min(2 * wait, LAST_LOOK_S)

    def cancel(self) -> None:
        """A plain grid cannot be told; late replies stay where they are."""
        self._open.clear()
