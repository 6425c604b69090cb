"""Tasks that wait for a worker: in groups, and no node at two places at once."""

import itertools
import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from umbel.core.flower import Envelope
from umbel.server.embedded.executor import Task
from umbel.server.node_states import NodeStates


@dataclass(frozen=True)
class _Waiting:
    task: Task
    group: int


class TaskQueue:
    """Keeps tasks in the order in which they were sent, and gives out groups whose nodes are free.

    Args:
        states: the nodes' states; a task takes its node's when it is given out.
        group_size: how many training messages form a group.
    """

    def __init__(self, states: NodeStates, group_size: int) -> None:
        self._states = states
        self._group_size = max(1, group_size)
        self._queue: deque[_Waiting] = deque()
        self._at_work: set[int] = set()
        self._isolated: set[int] = set()
        """Nodes of whose group one hung; from then on each is a group of its own."""
        self._next_group = 0

    def grouped(self, envelopes: Sequence[Envelope]) -> Iterator[int]:
        """The number of the group of each message of a trip."""
        group: set[int] = set()
        last_type = ""
        size = evenly(len(envelopes), self._group_size)
        for envelope in envelopes:
            kind, node_id = envelope.message_type, envelope.node_id
            alone = node_id in self._isolated or bool(group & self._isolated)
            full = alone or len(group) >= (size if kind == "train" else 1)
            if not group or full or kind != last_type or node_id in group:
                self._next_group, group, last_type = self._next_group + 1, set(), kind
            group.add(node_id)
            yield self._next_group

    def put(self, task: Task, group: int) -> None:
        """Queue a task as part of a group."""
        self._queue.append(_Waiting(task, group))

    def take(self) -> list[Task]:
        """The next group whose nodes are free, each task with its node's state of this moment.

        A group waits while one of its nodes is at work, or has an earlier task that waits: the
        node's state must come back first. Empty if there is none.
        """
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
        return [self._with_state(waiting.task) for waiting in group]

    def _with_state(self, task: Task) -> Task:
        state = self._states.by_node.get(task.envelope.node_id)
        return task if state is task.state else replace(task, state=state)

    def put_back(self, tasks: Sequence[Task], wanted: Container[str]) -> None:
        """Put the tasks of a group back, each by itself, so that all workers share them."""
        for task in reversed(tasks):
            self.free(task)
            if task.envelope.message_id in wanted:
                self._next_group += 1
                self._queue.appendleft(_Waiting(task, self._next_group))

    def free(self, task: Task) -> None:
        """The task's node is at work no longer."""
        self._at_work.discard(task.envelope.node_id)

    def isolate(self, tasks: Iterable[Task]) -> None:
        """These were given up with their group: one of their nodes hung, nobody knows which."""
        for task in tasks:
            self.free(task)
            self._isolated.add(task.envelope.node_id)

    def keep(self, wanted: Container[str]) -> None:
        """Drop the tasks that nobody waits for."""
        self._queue = deque(w for w in self._queue if w.task.envelope.message_id in wanted)


def evenly(count: int, most: int) -> int:
    """The size of groups of at most `most`, so that two workers get equal shares.

    It depends on nothing else: groups decide over the last bits of what is trained in them.
    """
    groups = max(math.ceil(count / most), min(2, count // 16))
    return min(most, math.ceil(count / max(1, groups)))
