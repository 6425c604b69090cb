"""The embedded engine: virtual nodes on this machine, behind Flower's `Grid`.

Nodes have no thread and no process of their own. A message to a node is a task; tasks run in
this process, or on worker processes, in the order in which they were pushed. What lasts of a
node is its `Context.state`, pickled, between its messages. Nothing polls: whoever waits for
replies does the work or sleeps until a worker speaks.
"""

import itertools
import math
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from umbel.server.embedded.executor import FIRST_NODE, Done, Executor, Task, output_to
from umbel.server.embedded.packing import Packed, pack
from umbel.server.embedded.workers import Nursery, Workers
from umbel.server.notes import Notes
from umbel.server.own_grid import OwnGrid
from umbel.server.roster import NodeRef
from umbel.strategies.app import open_app
from umbel.strategies.errors import ConfigError
from umbel.transport.flower import Envelope, give_id, take_identity


@dataclass
class _Waiting:
    """A message that was pushed and has not been answered."""

    task: Task
    group: int


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


class EmbeddedGrid(OwnGrid):
    """A Flower grid whose nodes live on this machine.

    Args:
        app: the app's folder, or a ClientApp of this process (then `workers` must be 0).
        nodes: how many virtual nodes; node i has the `partition-id` i.
        workers: worker processes; 0 runs the nodes in this process.
        run_config: the run's options, as every node's `Context.run_config`.
        run_id: of the run, for messages and contexts.
        threads: of a node's tensor operations. Fixed, so that the number of workers does not
            change results.
        group_size: how many training messages go to `ClientApp.train_many` together.
        nursery: started earlier, to save time; made here if None.
        log: file for what the nodes print and for their tracebacks.

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
        nursery: Nursery | None = None,
        log: Path | None = None,
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
        self._queue: deque[_Waiting] = deque()
        self._ready: dict[str, Message] = {}
        self._open: set[str] = set()
        self._at_work: set[int] = set()
        self._alone: set[int] = set()
        """Nodes of whose group one hung; from then on each is a group of its own."""
        self._pump_lock = threading.RLock()
        self._queue_lock = threading.Lock()
        """Guards the queue and what is counted; held for moments, never while work is done."""
        self._next_id = self._next_group = 0
        self._executor: Executor | None = None
        self._workers: Workers | None = None
        self.on_done: Callable[[int], None] = _nothing
        if workers and isinstance(app, ClientApp):
            raise ConfigError("worker processes need an app's folder; use workers=0 for an object")
        if workers:
            assert isinstance(app, Path)
            self._workers = Workers(
                nursery or Nursery(threads),
                min(workers, nodes),
                app,
                run_config=config,
                nodes=nodes,
                threads=threads,
                log=log,
            )
        else:
            client = app if isinstance(app, ClientApp) else open_app(app).client_app()
            self._executor = Executor(client, config, nodes, threads)

    def __enter__(self) -> "EmbeddedGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; unanswered messages are lost."""
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
        messages = list(messages)  # a generator of the app's must not run under the lock
        with self._queue_lock:
            ids = [self._enqueue(*each) for each in self._grouped(messages)]
        if self._workers is not None:
            self._workers.wake()
        return ids

    def _grouped(self, messages: list[Message]) -> Iterator[tuple[Envelope, Packed, int]]:
        """What is queued for each message: envelope, content, and number of its group."""
        packed: dict[int, Packed] = {}
        group: set[int] = set()
        last_type = ""
        size = _evenly(len(messages), self._group_size)
        for message in messages:
            envelope = self._envelope(message)
            content = message.content
            if id(content) not in packed:  # the same object in many messages is packed once
                packed[id(content)] = pack(content)
            kind, node_id = envelope.message_type, envelope.node_id
            alone = node_id in self._alone or bool(group & self._alone)
            full = alone or len(group) >= (size if kind == "train" else 1)
            if not group or full or kind != last_type or node_id in group:
                self._next_group, group, last_type = self._next_group + 1, set(), kind
            group.add(node_id)
            yield envelope, packed[id(content)], self._next_group

    def _enqueue(self, envelope: Envelope, content: Packed, group: int) -> str:
        self._open.add(envelope.message_id)
        self._queue.append(_Waiting(Task(envelope, content, None), group))
        return envelope.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages. Works until all are there: nothing else would."""
        return list(self._replies(set(message_ids), None))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(self.stream(messages, timeout))

    # ---- what only this engine has

    def stream(
        self, messages: Iterable[Message], timeout: float | None = None
    ) -> Iterator[Message]:
        """Send, and yield the replies as they arrive.

        After `timeout` seconds the iterator ends; workers that are still busy with one of these
        messages are replaced, so that a hung node costs its own reply only.
        """
        return self._beside_workers(self._replies(set(self.push_messages(messages)), timeout))

    def roster(self) -> list[NodeRef]:
        """All nodes, by partition."""
        return [
            NodeRef(node_id, str(partition), partition)
            for partition, node_id in enumerate(self.get_node_ids())
        ]

    def name_of(self, node_id: int) -> str:
        """The node's name in reports: its partition."""
        return str(node_id - FIRST_NODE)

    def _envelope(self, message: Message) -> Envelope:
        node_id = message.metadata.dst_node_id
        if not FIRST_NODE <= node_id < FIRST_NODE + self._nodes:
            raise ConfigError(
                f"a message is addressed to node {node_id}, which is not in this federation; "
                "take node ids from grid.get_node_ids()"
            )
        self._next_id += 1
        give_id(message, f"{self._run.run_id}-{self._next_id}")
        return Envelope.of(message)

    def _beside_workers(self, replies: Iterator[Message]) -> Iterator[Message]:
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
        deadline = None if timeout is None else time.monotonic() + timeout
        wanted &= self._open | self._ready.keys()
        while wanted:
            for message_id in tuple(self._ready):  # another thread may add to it meanwhile
                if message_id in wanted:
                    wanted.discard(message_id)
                    yield self._ready.pop(message_id)
            if not wanted:
                return
            if deadline is not None and time.monotonic() >= deadline:
                with self._pump_lock:
                    self._give_up(wanted)
                return
            with self._pump_lock:
                if not wanted & self._ready.keys():
                    self._pump(deadline)

    def _pump(self, deadline: float | None) -> None:
        """Get at least one task done, or wait for a worker until the deadline."""
        if self._executor is not None:
            tasks = self._next_tasks()
            if tasks:
                with output_to(self._log):
                    for task, done in zip(tasks, self._executor.run(tasks), strict=True):
                        self._finish(task, done)
            return
        assert self._workers is not None
        while self._workers.idle and (tasks := self._next_tasks()):
            self._workers.give(tasks)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        split: list[Task] = []
        for task, result in self._workers.wait(left):
            if result is None:
                split.append(task)
            else:
                self._finish(task, result)
        self._requeue(split)

    def _requeue(self, tasks: list[Task]) -> None:
        """Put the tasks of a group back, each by itself, so that all workers share them."""
        with self._queue_lock:
            for task in reversed(tasks):
                self._at_work.discard(task.envelope.node_id)
                if task.envelope.message_id in self._open:
                    self._next_group += 1
                    self._queue.appendleft(_Waiting(task, self._next_group))

    def _next_tasks(self) -> list[Task]:
        """The next group, each task with its node's state of this moment.

        Empty while a node of the group is still at work: its state must come back first.
        """
        with self._queue_lock:
            if not self._queue:
                return []
            first = self._queue[0].group
            group = list(itertools.takewhile(lambda waiting: waiting.group == first, self._queue))
            nodes = {waiting.task.envelope.node_id for waiting in group}
            if nodes & self._at_work:
                return []
            self._at_work |= nodes
            for _ in group:
                self._queue.popleft()
        return [
            replace(w.task, state=self.states.by_node.get(w.task.envelope.node_id)) for w in group
        ]

    def _finish(self, task: Task, done: Done) -> None:
        message_id = task.envelope.message_id
        self._at_work.discard(task.envelope.node_id)
        if message_id not in self._open:
            return  # given up, or reported as dead already
        self._open.discard(message_id)
        self.states.put(task.envelope.node_id, done.state)
        give_id(done.reply, f"{message_id}-reply")
        self._ready[message_id] = done.reply
        if done.failure and self._log is not None:
            name = self.name_of(task.envelope.node_id)
            self._log.write(f"node {name} failed:\n{done.failure}\n")
            self._log.flush()
        self.on_done(1)

    def _give_up(self, message_ids: set[str]) -> None:
        with self._queue_lock:
            self._open -= message_ids
            left = [w for w in self._queue if w.task.envelope.message_id in self._open]
            self._queue = deque(left)
        if self._workers is not None:
            for task in self._workers.abandon(message_ids):
                self._at_work.discard(task.envelope.node_id)
                self._alone.add(task.envelope.node_id)

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


class ObservedGrid(Notes, EmbeddedGrid):
    """An embedded grid that takes notes, for apps that keep their own rounds."""


def _nothing(_: int) -> None:
    return None


def _evenly(count: int, most: int) -> int:
    """The size of groups of at most `most`, so that two workers get equal shares.

    It depends on nothing else: groups decide over the last bits of what is trained in them.
    """
    groups = max(math.ceil(count / most), min(2, count // 16))
    return min(most, math.ceil(count / max(1, groups)))
