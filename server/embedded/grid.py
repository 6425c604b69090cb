"""The embedded engine: virtual nodes on this machine or a cluster, behind Flower's `Grid`.

Nodes have no thread and no process of their own. A message to a node is a task; tasks run on a
pool, in the order in which they were pushed. What lasts of a node is its `Context.state`, pickled,
between its messages. Nothing polls: whoever waits for replies does the work or sleeps until the
pool has news (`task_runner.py`). For messages that were pushed and that nobody waits for, a thread
beside the app does so (`attendant.py`).
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, Message
from flwr.clientapp import ClientApp

from umbel.core import streams
from umbel.core.errors import ConfigError
from umbel.core.flower import (
    UNAVAILABLE,
    Envelope,
    give_id,
    no_such_message,
    seconds_left,
    take_identity,
)
from umbel.core.records import to_array
from umbel.server.base_grid import BaseGrid, check_ttl, in_time, not_here
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.mailbox import EmbeddedMailbox
from umbel.server.embedded.mapped import File
from umbel.server.embedded.packing import BY_FILE, Packed, pack
from umbel.server.embedded.seeds import MessageSeeds
from umbel.server.embedded.task_runner import Post, TaskRunner
from umbel.server.mailbox import Mailbox
from umbel.server.node_states import NodeStates
from umbel.server.pools.base import Pool, Work
from umbel.server.pools.here import Here
from umbel.server.pools.processes import ForkServer, Processes
from umbel.server.roster import NodeRef
from umbel.server.round_recorder import RoundRecorder

log = logging.getLogger("flwr")  # what Flower's own grid says of such messages it says there


class EmbeddedGrid(BaseGrid):
    """A Flower grid whose nodes live on this machine, or where its pool is.

    Args:
        app: the app's folder, or a ClientApp of this process (then the pool must be in it).
        nodes: how many virtual nodes; node i has the `partition-id` i.
        workers: worker processes; 0 runs the nodes in this process.
        pool: where nodes run, in place of `workers`; closed with the grid.
        run_config: the run's options, as every node's `Context.run_config`. Its `seed`, if it has
            one, is what nodes' random numbers are derived from.
        run_id: of the run, for messages and contexts.
        threads: of a node's tensor operations. Fixed, so that the number of workers does not
            change results.
        group_size: how many training messages go to `ClientApp.train_many` together.
        nursery: the process that worker processes come from, started earlier to save time; made
            here if None.
        log: file for what the nodes print and for their tracebacks.

    Attributes:
        states: what lasts of the nodes between their messages.

    Raises:
        ConfigError: a value that cannot be.
    """

    states: NodeStates

    def __init__(
        self,
        app: Path | ClientApp,
        nodes: int,
        *,
        workers: int = 0,
        pool: Pool | None = None,
        run_config: Mapping[str, Any] | None = None,
        run_id: int = 1,
        threads: int = 1,
        group_size: int = 1,
        nursery: ForkServer | None = None,
        log: Path | None = None,
    ) -> None:
        if nodes < 1:
            raise ConfigError(f"nodes is {nodes}; a federation needs at least one")
        if workers < 0:
            raise ConfigError(f"workers is {workers}; use 0 to run the nodes in this process")
        if pool is None:
            pool = Processes(workers, nursery) if workers else Here()
        take_identity(run_id)
        config = dict(run_config or {})
        super().__init__(run_id)
        self.states = NodeStates()
        self._nodes = nodes
        self._next_id = 0
        self._pool = pool
        self._log = log.open("a", encoding="utf-8") if log else None
        try:
            if isinstance(app, ClientApp) and not pool.in_process:
                raise ConfigError(
                    "worker processes need an app's folder; use workers=0 for an object"
                )
            pool.start(Work(app, config, nodes, threads, log))
        except BaseException:
            pool.close()
            raise
        seeds = MessageSeeds(config)
        self._runner = TaskRunner(pool, self.states, seeds, group_size, self._log)

    def __enter__(self) -> "EmbeddedGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the pool; unanswered messages are lost."""
        self._runner.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers on this machine."""
        return self._pool.pids

    @property
    def sharing(self) -> int:
        return max(1, self._pool.workers)

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
        self._runner.attendant.take({message_id for message_id in ids if message_id is not None})
        return ids  # type: ignore[return-value]  # None is Flower's own answer, against its types

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are here; it does not wait.

        An error stands in the place of a reply that was pulled before, of a message that is
        unknown, and of one whose ttl is over.
        """
        self._runner.attendant.look()
        run_id = self._run.run_id
        found = self._runner.pull(message_ids, lambda each: no_such_message(each, run_id))
        return [in_time(reply) for reply in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies, in the order of the messages they answer."""
        messages = list(messages)
        ids = self._push(messages)
        # The app does nothing between the replies, so its generators are kept once for all.
        kept = streams.kept() if self._pool.in_process else contextlib.nullcontext()
        with self._box(timeout) as box, kept:
            box.expect(ids)
            replies = {reply.metadata.reply_to_message_id: reply for reply in box}
        answers = [
            self._nobody(message) if message_id is None else replies.get(message_id)
            for message, message_id in zip(messages, ids, strict=True)
        ]
        return [answer for answer in answers if answer is not None]

    # ---- what only engines of Umbel have

    def open(self, timeout: float | None = None) -> Mailbox:
        return self._box(timeout)

    def _box(self, timeout: float | None) -> EmbeddedMailbox:
        return EmbeddedMailbox(self._push, self._runner, len(self._pool.pids), timeout)

    def roster(self) -> list[NodeRef]:
        """All nodes, by partition."""
        return [
            NodeRef(node_id, str(partition), partition)
            for partition, node_id in enumerate(self.get_node_ids())
        ]

    def array(self, vector: torch.Tensor) -> Array:
        """A vector as it is sent: a large one lies where the worker processes can map it."""
        if not self._pool.maps_files or vector.numel() * vector.element_size() < BY_FILE:
            return to_array(vector)
        return to_array(vector, lambda parts: File().fill(parts))

    def name_of(self, node_id: int) -> str:
        """The node's name in reports: its partition."""
        return str(node_id - FIRST_NODE)

    # ---- sending

    def _push(self, messages: list[Message]) -> list[str | None]:
        """Queue messages; their ids, None for those to nobody."""
        self._runner.attendant.look()
        streams.look_closely()
        packed: dict[int, Packed] = {}
        ids: list[str | None] = []
        posts = []
        for message in messages:
            if self._is_nobody(message):
                log.error("%s", not_here(message.metadata.dst_node_id))
                ids.append(None)
                continue
            check_ttl(message)
            content = message.content
            if id(content) not in packed:  # the same object in many messages is packed once
                packed[id(content)] = pack(content)
            self._next_id += 1
            give_id(message, f"{self._run.run_id}-{self._next_id}")
            ids.append(message.metadata.message_id)
            post = Post(Envelope.of(message), packed[id(content)], seconds_left(message))
            posts.append(post)
        self._runner.post(posts)
        return ids

    def _is_nobody(self, message: Message) -> bool:
        return not FIRST_NODE <= message.metadata.dst_node_id < FIRST_NODE + self._nodes

    def _nobody(self, message: Message) -> Message:
        """The reply in the place of a node that is not here."""
        node_id = message.metadata.dst_node_id
        return Envelope.of(message).error(UNAVAILABLE, not_here(node_id))


class ObservedGrid(RoundRecorder, EmbeddedGrid):
    """An embedded grid that takes notes, for apps that keep their own rounds."""
