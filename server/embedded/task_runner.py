"""From a message to its reply: tasks on a pool, pumped by whoever waits.

One thread at a time does the work: it gives groups to the pool and takes back what came of them.
Others that wait for replies sleep until it has news.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from flwr.app import Message

from umbel.core.flower import TOO_LATE, UNKNOWN, Envelope, give_id
from umbel.server.embedded.attendant import Attendant
from umbel.server.embedded.dispatcher import Dispatcher
from umbel.server.embedded.executor import FIRST_NODE, Done, Task
from umbel.server.embedded.packing import Packed
from umbel.server.embedded.seeds import MessageSeeds
from umbel.server.embedded.task_queue import TaskQueue
from umbel.server.node_states import NodeStates
from umbel.server.pools.base import Pool


@dataclass(frozen=True)
class Post:
    """A message on its way to a virtual node.

    Attributes:
        envelope: the message without its content.
        content: packed once for all nodes that get the same.
        seconds: left of its ttl.
    """

    envelope: Envelope
    content: Packed
    seconds: float


@dataclass(frozen=True)
class _Open:
    """What is known of a message while it has no reply."""

    envelope: Envelope
    until: float
    """When its ttl is over, on the monotonic clock."""


class TaskRunner:
    """Runs the tasks of messages and keeps the replies until they are taken.

    Args:
        pool: where tasks run; started already, and closed with this.
        states: the nodes' states.
        seeds: the messages' seeds.
        group_size: how many training messages form a group.
        log: for the tracebacks of nodes.
    """

    def __init__(
        self,
        pool: Pool,
        states: NodeStates,
        seeds: MessageSeeds,
        group_size: int,
        log: IO[str] | None,
    ) -> None:
        self._pool, self._states, self._seeds, self._log = pool, states, seeds, log
        self._queue = TaskQueue(states, group_size)
        self._dispatcher = Dispatcher(pool)
        self._ready: dict[str, Message] = {}
        self._open: dict[str, _Open] = {}
        self._soonest = math.inf
        """No open message's ttl is over before."""
        self._lock = threading.RLock()
        """Guards all of this; held for moments, never while work is done."""
        self._news = threading.Condition(self._lock)
        """Replies have come, or the work is free to be taken up."""
        self._working = False
        """Whether a thread is doing the work: running tasks, or listening to workers."""
        self._closed = False
        self.attendant = Attendant(self._news, self._open.__contains__, self.work)

    def post(self, posts: Sequence[Post]) -> None:
        """Queue messages; those that are sent together may be run together."""
        with self._lock:
            groups = self._queue.grouped([post.envelope for post in posts])
            for post, group in zip(posts, groups, strict=True):
                until = time.monotonic() + post.seconds
                self._soonest = min(self._soonest, until)
                self._open[post.envelope.message_id] = _Open(post.envelope, until)
                seed = self._seeds.of(post.envelope)
                self._queue.put(Task(post.envelope, post.content, None, seed), group)
        self._dispatcher.wake()

    def take(self, wanted: set[str]) -> Message | None:
        """A reply that is there; its message is taken out of `wanted`."""
        with self._lock:
            for message_id in self._ready:
                if message_id in wanted:
                    wanted.discard(message_id)
                    return self._ready.pop(message_id)
        return None

    def drop_taken(self, wanted: set[str]) -> None:
        """Take those out of `wanted` whose replies another thread has taken."""
        if not self._open:
            with self._lock:
                wanted &= self._ready.keys()

    def pull(self, message_ids: Iterable[str], unknown: Callable[[str], Message]) -> list[Message]:
        """The replies that are there, without waiting.

        Args:
            message_ids: of the messages.
            unknown: what stands in the place of a reply that was taken before, or never comes.
        """
        self.expire()
        found = []
        with self._lock:
            for message_id in dict.fromkeys(message_ids):
                if message_id in self._ready:
                    found.append(self._ready.pop(message_id))
                elif message_id not in self._open:
                    found.append(unknown(message_id or ""))
        return found

    # ---- the work

    def work(self, wanted: Collection[str], deadline: float) -> None:
        """Take part in the work until something has happened; one thread does it at a time."""
        with self._news:
            while self._working:
                if self._any_ready(wanted) or time.monotonic() >= deadline:
                    return
                self.attendant.look()
                self._news.wait(left(deadline))
            if self._any_ready(wanted):
                return
            self._working = True
        try:
            self._pump(deadline)
        finally:
            with self._news:
                self._working = False
                self._news.notify_all()

    def _any_ready(self, wanted: Collection[str]) -> bool:
        return any(message_id in wanted for message_id in self._ready)

    def _pump(self, deadline: float) -> None:
        """Get at least one task done, or wait for the pool until the deadline."""
        self.expire()
        self._dismiss()
        while self._dispatcher.free and (tasks := self._next_tasks()):
            self._dispatcher.give(tasks)
        split: list[Task] = []
        for task, result in self._dispatcher.wait(left(min(deadline, self._soonest))):
            if result is None:
                split.append(task)
            else:
                self._finish(task, result)
                del result  # it is the reply's own memory that would be held
        if split:
            with self._lock:
                self._queue.put_back(split, self._open)
        if not self._open:
            self._pool.rest()

    def _next_tasks(self) -> list[Task]:
        with self._lock:
            return self._queue.take()

    def _finish(self, task: Task, done: Done) -> None:
        message_id = task.envelope.message_id
        give_id(done.reply, f"{message_id}-reply")
        with self._news:
            self._queue.free(task)
            if self._open.pop(message_id, None) is None:
                return  # given up, or reported as dead already
            self._states.put(task.envelope.node_id, done.state)
            self._ready[message_id] = done.reply
            self.attendant.let_go(message_id)
        if done.failure and self._log is not None:
            name = task.envelope.node_id - FIRST_NODE
            self._log.write(f"node {name} failed:\n{done.failure}\n")
            self._log.flush()

    # ---- what is not waited for any longer

    def expire(self) -> None:
        """Answer the messages whose ttl is over with an error."""
        now = time.monotonic()
        if now < self._soonest:
            return
        with self._news:
            over = {message_id for message_id, known in self._open.items() if known.until <= now}
            for message_id in over:
                envelope = self._open[message_id].envelope
                self._ready[message_id] = envelope.error(UNKNOWN, TOO_LATE)
                give_id(self._ready[message_id], f"{message_id}-reply")
            self._forget(over)
            self._soonest = min((known.until for known in self._open.values()), default=math.inf)
            self._news.notify_all()

    def give_up(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these; workers that are busy with them alone are freed."""
        message_ids = set(message_ids)
        with self._news:
            for message_id in message_ids:
                self._ready.pop(message_id, None)
            self._forget(message_ids)
            if self._working or self._closed:
                return
            self._working = True
        try:
            self._dismiss()
        finally:
            with self._news:
                self._working = False
                self._news.notify_all()

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these; whoever does the work next dismisses who is busy with them."""
        for message_id in message_ids:
            self._open.pop(message_id, None)
            self.attendant.let_go(message_id)
        self._queue.keep(self._open)
        self._dispatcher.wake()

    def _dismiss(self) -> None:
        """Free the workers that are busy with what nobody waits for."""
        given_up = self._dispatcher.abandon(self._open)
        with self._lock:
            self._queue.isolate(given_up)

    def close(self) -> None:
        """End; unanswered messages are lost."""
        if self._closed:
            return
        self._closed = True
        self.attendant.close(self._dispatcher.wake, join=not self._pool.in_process)
        self._pool.close()


def left(deadline: float) -> float | None:
    """Seconds until then; None where there is no end."""
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())
