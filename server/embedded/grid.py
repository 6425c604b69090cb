"""The embedded engine: virtual nodes on this machine, behind Flower's `Grid`.

Nodes have no thread and no process of their own. A message to a node is a task; tasks run in
this process, or on worker processes, in the order in which they were pushed. What lasts of a
node is its `Context.state`, pickled, between its messages. Nothing polls: whoever waits for
replies does the work or sleeps until a worker speaks. For messages that were pushed and that
nobody waits for, a thread beside the app does so (the attendant).
"""

import contextlib
import itertools
import logging
import math
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, Message
from flwr.clientapp import ClientApp

from umbel.core import streams
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.core.flower import (
    TOO_LATE,
    UNAVAILABLE,
    UNKNOWN,
    Envelope,
    give_id,
    no_such_message,
    seconds_left,
    take_identity,
)
from umbel.core.records import to_array
from umbel.server.base_grid import BaseGrid, check_ttl, in_time, not_here
from umbel.server.embedded.executor import FIRST_NODE, Done, Executor, Task, output_to
from umbel.server.embedded.mapped import File
from umbel.server.embedded.packing import BY_FILE, Packed, pack
from umbel.server.embedded.workers import ForkServer, Workers
from umbel.server.roster import NodeRef
from umbel.server.round_recorder import RoundRecorder

log = logging.getLogger("flwr")  # what Flower's own grid says of such messages it says there


@dataclass
class _Waiting:
    """A message that was pushed and has not been answered."""

    task: Task
    group: int


@dataclass(frozen=True)
class _Open:
    """What is known of a message while it has no reply."""

    envelope: Envelope
    until: float
    """When its ttl is over, on the monotonic clock."""


@dataclass
class NodeStates:
    """The states of virtual nodes, and which of them changed since they were last saved."""

    by_node: dict[int, bytes] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)

    def put(self, node_id: int, state: bytes | None) -> None:
        """Keep a node's state; None leaves it as it is."""
        if state is not None and self.by_node.get(node_id) != state:
            self.by_node[node_id] = state
            self.changed.add(node_id)


class _Seeds:
    """A seed for every message, from the run's, the node and which of its messages it is.

    Which thread of an app pushed first, and how many workers there are, makes no difference. A
    run that goes on counts anew in every round, so it needs to know nothing of earlier ones.
    """

    def __init__(self, run_config: Mapping[str, Any]) -> None:
        seed = run_config.get("seed", 0)
        self._seed = seed if isinstance(seed, int) else 0
        self._asked: dict[tuple[int, str], tuple[int, int]] = {}

    def of(self, envelope: Envelope) -> int:
        """The seed of the next message."""
        about = (envelope.node_id, envelope.message_type)
        last, count = self._asked.get(about, (0, 0))
        group = envelope.group_id
        if group.isdecimal() and int(group) > last:
            last, count = int(group), 0
        self._asked[about] = last, count + 1
        return streams.derived_seed(self._seed, *about, last, count)


class EmbeddedGrid(BaseGrid):
    """A Flower grid whose nodes live on this machine.

    Args:
        app: the app's folder, or a ClientApp of this process (then `workers` must be 0).
        nodes: how many virtual nodes; node i has the `partition-id` i.
        workers: worker processes; 0 runs the nodes in this process.
        run_config: the run's options, as every node's `Context.run_config`. Its `seed`, if it has
            one, is what nodes' random numbers are derived from.
        run_id: of the run, for messages and contexts.
        threads: of a node's tensor operations. Fixed, so that the number of workers does not
            change results.
        group_size: how many training messages go to `ClientApp.train_many` together.
        nursery: started earlier, to save time; made here if None.
        log: file for what the nodes print and for their tracebacks.
        mapped: large arrays of replies need not be bytes: they may lie in memory that is mapped
            from the workers, which Flower's own functions do not expect.

    Raises:
        ConfigError: a value that cannot be.
    """

    def __init__(
        self,
        app: Path | ClientApp,
        nodes: int,
        *,
        workers: int = 0,
        run_config: Mapping[str, Any] | None = None,
        run_id: int = 1,
        threads: int = 1,
        group_size: int = 1,
        nursery: ForkServer | None = None,
        log: Path | None = None,
        mapped: bool = False,
    ) -> None:
        if nodes < 1:
            raise ConfigError(f"nodes is {nodes}; a federation needs at least one")
        if workers < 0:
            raise ConfigError(f"workers is {workers}; use 0 to run the nodes in this process")
        take_identity(run_id)
        config = dict(run_config or {})
        self.states = NodeStates()
        super().__init__(run_id)
        self._nodes = nodes
        self._group_size = max(1, group_size)
        self._log = log.open("a", encoding="utf-8") if log else None
        self._seeds = _Seeds(config)
        self._queue: deque[_Waiting] = deque()
        self._ready: dict[str, Message] = {}
        self._open: dict[str, _Open] = {}
        self._soonest = math.inf
        """No open message's ttl is over before."""
        self._at_work: set[int] = set()
        self._alone: set[int] = set()
        """Nodes of whose group one hung; from then on each is a group of its own."""
        self._lock = threading.RLock()
        """Guards all of this; held for moments, never while work is done."""
        self._news = threading.Condition(self._lock)
        """Replies have come, or the work is free to be taken up."""
        self._working = False
        """Whether a thread is doing the work: running tasks, or listening to workers."""
        self._attendant = _Attendant(self)
        self._next_id = self._next_group = 0
        self._executor: Executor | None = None
        self._workers: Workers | None = None
        self.on_done: Callable[[int], None] = _nothing
        if workers and isinstance(app, ClientApp):
            raise ConfigError("worker processes need an app's folder; use workers=0 for an object")
        if workers:
            assert isinstance(app, Path)
            self._workers = Workers(
                nursery or ForkServer(threads),
                min(workers, nodes),
                app,
                run_config=config,
                nodes=nodes,
                threads=threads,
                log=log,
                mapped=mapped,
            )
        else:
            with streams.kept():  # an app may seed the generators where it is imported
                client = app if isinstance(app, ClientApp) else open_app(app).client_app()
            self._executor = Executor(client, config, nodes, threads)

    def __enter__(self) -> "EmbeddedGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; unanswered messages are lost."""
        self._attendant.close(self._workers.wake if self._workers is not None else None)
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._log is not None:
            self._log.close()
            self._log = None

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [] if self._workers is None else self._workers.pids

    # ---- what Flower asks of a grid

    def get_node_ids(self) -> list[int]:
        return list(range(FIRST_NODE, FIRST_NODE + self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; the nodes set to work whether or not anybody waits for their replies.

        Returns:
            Ids to pull replies by; as Flower's grid has it, None in the place of a message to a
            node that is not in this federation.
        """
        ids = self._push(list(messages))
        self._attendant.take({message_id for message_id in ids if message_id is not None})
        return ids  # type: ignore[return-value]  # None is Flower's own answer, against its types

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are here; it does not wait.

        An error stands in the place of a reply that was pulled before, of a message that is
        unknown, and of one whose ttl is over.
        """
        self._attendant.look()
        self._expire()
        found = []
        with self._lock:
            for message_id in dict.fromkeys(message_ids):
                if message_id in self._ready:
                    found.append(self._ready.pop(message_id))
                elif message_id not in self._open:
                    found.append(no_such_message(message_id or "", self._run.run_id))
        return [in_time(reply) for reply in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies, in the order of the messages they answer."""
        messages = list(messages)
        ids = self._push(messages)
        # The app does nothing between the replies, so its generators are kept once for all.
        with streams.kept() if self._executor is not None else contextlib.nullcontext():
            replies = {
                reply.metadata.reply_to_message_id: reply
                for reply in self._limit_threads(self._replies(_known(ids), timeout))
            }
        answers = [
            self._nobody(message) if message_id is None else replies.get(message_id)
            for message, message_id in zip(messages, ids, strict=True)
        ]
        return [answer for answer in answers if answer is not None]

    # ---- what only this engine has

    def stream(
        self, messages: Iterable[Message], timeout: float | None = None
    ) -> Iterator[Message]:
        """Send, and yield the replies as they arrive.

        After `timeout` seconds the iterator ends; workers that are still busy with one of these
        messages are replaced, so that a hung node costs its own reply only.
        """
        messages = list(messages)
        ids = self._push(messages)
        for message, message_id in zip(messages, ids, strict=True):
            if message_id is None:
                yield self._nobody(message)
        del messages
        yield from self._limit_threads(self._replies(_known(ids), timeout))

    def roster(self) -> list[NodeRef]:
        """All nodes, by partition."""
        return [
            NodeRef(node_id, str(partition), partition)
            for partition, node_id in enumerate(self.get_node_ids())
        ]

    def array(self, vector: torch.Tensor) -> Array:
        """A vector as it is sent: a large one lies where the worker processes can map it."""
        if self._workers is None or vector.numel() * vector.element_size() < BY_FILE:
            return to_array(vector)
        return to_array(vector, lambda parts: File().fill(list(parts)))

    def name_of(self, node_id: int) -> str:
        """The node's name in reports: its partition."""
        return str(node_id - FIRST_NODE)

    # ---- sending

    def _push(self, messages: list[Message]) -> list[str | None]:
        """Queue messages; their ids, None for those to nobody."""
        self._attendant.look()
        streams.look_closely()
        with self._lock:
            ids = [self._enqueue(*each) for each in self._grouped(messages)]
        if self._workers is not None:
            self._workers.wake()
        return ids

    def _grouped(
        self, messages: list[Message]
    ) -> Iterator[tuple[Envelope | None, Packed | None, float, int]]:
        """What is queued for each message: envelope, content, seconds, number of its group."""
        packed: dict[int, Packed] = {}
        group: set[int] = set()
        last_type = ""
        size = _evenly(len(messages), self._group_size)
        for message in messages:
            envelope = self._envelope(message)
            if envelope is None:
                yield None, None, 0.0, 0
                continue
            content = message.content
            if id(content) not in packed:  # the same object in many messages is packed once
                packed[id(content)] = pack(content)
            kind, node_id = envelope.message_type, envelope.node_id
            alone = node_id in self._alone or bool(group & self._alone)
            full = alone or len(group) >= (size if kind == "train" else 1)
            if not group or full or kind != last_type or node_id in group:
                self._next_group, group, last_type = self._next_group + 1, set(), kind
            group.add(node_id)
            yield envelope, packed[id(content)], seconds_left(message), self._next_group

    def _envelope(self, message: Message) -> Envelope | None:
        data = message.metadata
        if not FIRST_NODE <= data.dst_node_id < FIRST_NODE + self._nodes:
            log.error("%s", not_here(data.dst_node_id))
            return None
        check_ttl(message)
        self._next_id += 1
        give_id(message, f"{self._run.run_id}-{self._next_id}")
        return Envelope.of(message)

    def _enqueue(
        self, envelope: Envelope | None, content: Packed | None, left: float, group: int
    ) -> str | None:
        if envelope is None or content is None:
            return None
        until = time.monotonic() + left
        self._soonest = min(self._soonest, until)
        self._open[envelope.message_id] = _Open(envelope, until)
        task = Task(envelope, content, None, self._seeds.of(envelope))
        self._queue.append(_Waiting(task, group))
        return envelope.message_id

    def _nobody(self, message: Message) -> Message:
        """The reply in the place of a node that is not here."""
        node_id = message.metadata.dst_node_id
        return Envelope.of(message).error(UNAVAILABLE, not_here(node_id))

    # ---- receiving

    def _limit_threads(self, replies: Iterator[Message]) -> Iterator[Message]:
        """While workers use the cores, what is done with their replies runs on those left over."""
        if self._workers is None:
            yield from replies
            return
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before - len(self._workers.pids)))
        try:
            yield from replies
        finally:
            torch.set_num_threads(before)

    def _replies(self, wanted: set[str], timeout: float | None) -> Iterator[Message]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while wanted:
            while (reply := self._take(wanted)) is not None:
                yield in_time(reply)
                del reply  # while the next is awaited, this one must not take room
            if not wanted:
                return
            if time.monotonic() >= deadline:
                self._give_up(wanted)
                return
            self._work(wanted, deadline)
            if not self._open:  # another thread has pulled what this one waits for
                with self._lock:
                    wanted &= self._ready.keys()

    def _take(self, wanted: set[str]) -> Message | None:
        """A reply that is there."""
        with self._lock:
            for message_id in self._ready:
                if message_id in wanted:
                    wanted.discard(message_id)
                    return self._ready.pop(message_id)
        return None

    # ---- the work

    def _work(self, wanted: Collection[str], deadline: float) -> None:
        """Take part in the work until something has happened; one thread does it at a time."""
        with self._news:
            while self._working:
                if self._any_ready(wanted) or time.monotonic() >= deadline:
                    return
                self._attendant.look()
                self._news.wait(_left(deadline))
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
        """Get at least one task done, or wait for a worker until the deadline."""
        self._expire()
        if self._executor is not None:
            tasks = self._next_tasks()
            if tasks:
                with output_to(self._log), streams.kept():
                    done = self._executor.run(tasks)
                for pair in zip(tasks, done, strict=True):
                    self._finish(*pair)
            return
        assert self._workers is not None
        self._dismiss()
        while self._workers.idle and (tasks := self._next_tasks()):
            self._workers.give(tasks)
        split: list[Task] = []
        for task, result in self._workers.wait(_left(min(deadline, self._soonest))):
            if result is None:
                split.append(task)
            else:
                self._finish(task, result)
                del result  # it is the reply's own memory that would be held
        self._requeue(split)
        if not self._open:
            self._workers.rest()

    def _requeue(self, tasks: list[Task]) -> None:
        """Put the tasks of a group back, each by itself, so that all workers share them."""
        with self._lock:
            for task in reversed(tasks):
                self._at_work.discard(task.envelope.node_id)
                if task.envelope.message_id in self._open:
                    self._next_group += 1
                    self._queue.appendleft(_Waiting(task, self._next_group))

    def _next_tasks(self) -> list[Task]:
        """The next group whose nodes are free, each task with its node's state of this moment.

        A group waits while one of its nodes is at work, or has an earlier task that waits: the
        node's state must come back first.
        """
        with self._lock:
            busy = set(self._at_work)
            for _, members in itertools.groupby(self._queue, key=lambda waiting: waiting.group):
                group = list(members)
                nodes = {waiting.task.envelope.node_id for waiting in group}
                if not nodes & busy:
                    break
                busy |= nodes
            else:
                return []
            if group[0] is self._queue[0]:
                for _ in group:
                    self._queue.popleft()
            else:
                taken = {id(waiting) for waiting in group}
                self._queue = deque(w for w in self._queue if id(w) not in taken)
            self._at_work |= nodes
            return [
                replace(w.task, state=self.states.by_node.get(w.task.envelope.node_id))
                for w in group
            ]

    def _finish(self, task: Task, done: Done) -> None:
        message_id = task.envelope.message_id
        give_id(done.reply, f"{message_id}-reply")
        with self._news:
            self._at_work.discard(task.envelope.node_id)
            if self._open.pop(message_id, None) is None:
                return  # given up, or reported as dead already
            self.states.put(task.envelope.node_id, done.state)
            self._ready[message_id] = done.reply
            self._attendant.let_go(message_id)
        if done.failure and self._log is not None:
            name = self.name_of(task.envelope.node_id)
            self._log.write(f"node {name} failed:\n{done.failure}\n")
            self._log.flush()
        self.on_done(1)

    # ---- what is not waited for any longer

    def _expire(self) -> None:
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

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these; whoever does the work next dismisses who is busy with them."""
        for message_id in message_ids:
            self._open.pop(message_id, None)
            self._attendant.let_go(message_id)
        self._queue = deque(w for w in self._queue if w.task.envelope.message_id in self._open)
        if self._workers is not None:
            self._workers.wake()

    def _give_up(self, message_ids: set[str]) -> None:
        with self._news:
            self._forget(message_ids)
            if self._working or self._workers is None:
                return
            self._working = True
        try:
            self._dismiss()
        finally:
            with self._news:
                self._working = False
                self._news.notify_all()

    def _dismiss(self) -> None:
        """Replace the workers that are busy with what nobody waits for."""
        assert self._workers is not None
        for task in self._workers.abandon(self._open):
            self._at_work.discard(task.envelope.node_id)
            self._alone.add(task.envelope.node_id)

    # ---- checkpoints

    def pickled_states(self) -> Mapping[int, bytes]:
        """States that changed since the last call, by node id."""
        changed = {node: self.states.by_node[node] for node in self.states.changed}
        self.states.changed.clear()
        return changed

    def restore_states(self, states: Mapping[int, bytes]) -> None:
        """Put back what `pickled_states` gave."""
        for node_id, state in states.items():
            pickle.loads(state)  # a damaged state must fail here, not in the middle of a round
            self.states.by_node[node_id] = state


class _Attendant:
    """A thread that works for messages that were pushed, so that nobody has to wait for them.

    It begins with the first such message. Without worker processes the nodes run in it, beside
    the server app.
    """

    def __init__(self, grid: EmbeddedGrid) -> None:
        self._grid = grid
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._fault: BaseException | None = None

    def take(self, message_ids: set[str]) -> None:
        """See to these messages."""
        with self._grid._news:
            self._waiting |= message_ids & self._grid._open.keys()
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._attend, daemon=True)
                self._thread.start()
            self._grid._news.notify_all()

    def let_go(self, message_id: str) -> None:
        """This message needs nobody any longer."""
        self._waiting.discard(message_id)

    def look(self) -> None:
        """Raise what went wrong meanwhile, in the thread of the app."""
        if self._fault is not None and threading.current_thread() is not self._thread:
            fault, self._fault = self._fault, None
            raise fault

    def close(self, wake: Callable[[], None] | None) -> None:
        """End; a node that runs in this process cannot be stopped, and ends with it."""
        with self._grid._news:
            self._closed = True
            self._waiting.clear()
            self._grid._news.notify_all()
        if self._thread is not None and wake is not None:
            wake()
            self._thread.join()

    def _attend(self) -> None:
        news = self._grid._news
        while True:
            with news:
                news.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            try:
                self._grid._work((), math.inf)
            except BaseException as fault:
                with news:
                    self._fault = fault
                    self._waiting.clear()
                    news.notify_all()


class ObservedGrid(RoundRecorder, EmbeddedGrid):
    """An embedded grid that takes notes, for apps that keep their own rounds."""


def _nothing(_: int) -> None:
    return None


def _known(ids: Iterable[str | None]) -> set[str]:
    return {message_id for message_id in ids if message_id is not None}


def _left(deadline: float) -> float | None:
    """Seconds until then; None where there is no end."""
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


def _evenly(count: int, most: int) -> int:
    """The size of groups of at most `most`, so that two workers get equal shares.

    It depends on nothing else: groups decide over the last bits of what is trained in them.
    """
    groups = max(math.ceil(count / most), min(2, count // 16))
    return min(most, math.ceil(count / max(1, groups)))
