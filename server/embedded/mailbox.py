"""The embedded engine's mailbox: whoever waits for replies does the work."""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from flwr.app import Message

from umbel.server.base_grid import in_time
from umbel.server.embedded.task_runner import TaskRunner
from umbel.server.mailbox import Mailbox


class EmbeddedMailbox(Mailbox):
    """Messages to virtual nodes, and their replies as they are done.

    After `timeout` seconds the replies end; workers that are still busy with one of these messages
    are replaced, so that a hung node costs its own reply only.

    Args:
        push: queues messages and gives their ids, None for those to nobody.
        runner: does the work.
        busy_processors: how many of this machine's the workers use.
        timeout: seconds from now; None is no end.
    """

    def __init__(
        self,
        push: Callable[[list[Message]], list[str | None]],
        runner: TaskRunner,
        busy_processors: int,
        timeout: float | None,
    ) -> None:
        self._push, self._runner, self._busy_processors = push, runner, busy_processors
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._wanted: set[str] = set()

    def send(self, messages: Iterable[Message]) -> None:
        self.expect(self._push(list(messages)))

    def expect(self, ids: Iterable[str | None]) -> None:
        """Wait for the replies to these messages, too."""
        self._wanted.update(message_id for message_id in ids if message_id is not None)

    def __iter__(self) -> Iterator[Message]:
        if not self._busy_processors:
            yield from self._replies()
            return
        # While workers use the cores, what is done with their replies runs on those left over.
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before - self._busy_processors))
        try:
            yield from self._replies()
        finally:
            torch.set_num_threads(before)

    def _replies(self) -> Iterator[Message]:
        while self._wanted:
            while (reply := self._runner.take(self._wanted)) is not None:
                yield in_time(reply)
                del reply  # while the next is awaited, this one must not take room
            if not self._wanted:
                return
            if time.monotonic() >= self._deadline:
                self.cancel()
                return
            self._runner.work(self._wanted, self._deadline)
            self._runner.drop_taken(self._wanted)

    def cancel(self) -> None:
        wanted, self._wanted = self._wanted, set()
        if wanted:
            self._runner.give_up(wanted)
