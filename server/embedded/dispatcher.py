"""Groups on their way to a pool and back."""

import threading
from collections import deque
from collections.abc import Container, Sequence
from concurrent.futures import Future

from umbel.core.errors import RunError, UmbelError, described
from umbel.core.flower import CRASHED
from umbel.server.embedded.executor import Done, Task
from umbel.server.pools.base import Group, Pool, Results, WorkerLostError


class Dispatcher:
    """Hands groups to a pool and takes back what came of them; one thread at a time.

    Args:
        pool: where they run; started already.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._running: dict[Future[Results], Group] = {}
        self._finished: deque[Future[Results]] = deque()
        self._news = threading.Event()

    @property
    def free(self) -> bool:
        """Whether the pool takes another group, and nothing waits to be read first."""
        return not self._finished and len(self._running) < self._pool.slots

    def give(self, group: Group) -> None:
        """Hand a group over."""
        future = self._pool.submit(group)
        self._running[future] = group
        if future.done():  # nobody has to be woken: who gives is who waits
            self._finished.append(future)
        else:
            future.add_done_callback(self._heard)

    def _heard(self, future: Future[Results]) -> None:
        """A group is done; this is called in whatever thread the pool has."""
        self._finished.append(future)
        self._news.set()

    def wait(self, timeout: float | None) -> list[tuple[Task, Done | None]]:
        """Wait until something is done, `wake` is called or the time is over; finished tasks.

        None comes with tasks of a group that should be given each by itself.

        Raises:
            UmbelError: the pool cannot go on.
        """
        if not self._finished:
            self._pool.wait(self._news, None if timeout is None else min(timeout, LONGEST_WAIT))
        if self._news.is_set():
            self._news.clear()
        found: list[tuple[Task, Done | None]] = []
        while self._finished:
            future = self._finished.popleft()
            group = self._running.pop(future, None)
            if group is not None:  # else it was abandoned
                found += self._results(future, group)
        return found

    def _results(self, future: Future[Results], group: Group) -> list[tuple[Task, Done | None]]:
        if future.cancelled():
            raise RunError(f"the pool {self._name} dropped what it was to do; {GO_ON}")
        error = future.exception()
        if isinstance(error, WorkerLostError):
            # Of a group, nobody knows which node it was: each is to be tried by itself. A single
            # task becomes an error reply, and the node's state stays.
            if len(group) > 1:
                return [(task, None) for task in group]
            reply = group[0].envelope.error(CRASHED, str(error))
            return [(group[0], Done(reply, group[0].state))]
        if isinstance(error, UmbelError):
            raise error
        if error is not None:
            raise RunError(f"the pool {self._name} failed: {described(error)}; {GO_ON}") from error
        results: Sequence[Done | None] = future.result() or [None] * len(group)
        return list(zip(group, results, strict=True))

    @property
    def _name(self) -> str:
        return type(self._pool).__name__

    def wake(self) -> None:
        """End a `wait` in another thread."""
        self._news.set()
        self._pool.wake()

    def abandon(self, wanted: Container[str]) -> list[Task]:
        """Give up the groups none of whose messages is wanted; their tasks."""
        given_up: list[Task] = []
        for future, group in list(self._running.items()):
            if not any(task.envelope.message_id in wanted for task in group):
                del self._running[future]  # first, because it may be reported at once
                self._pool.abandon(future)
                given_up += group
        return given_up


LONGEST_WAIT = 86400.0
"""Seconds; systems refuse to wait for more than some weeks at a time, and who waits looks again."""

GO_ON = "mend it, and go on with: umbel run --resume RUN"
