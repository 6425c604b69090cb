"""What Umbel's own engines share as Flower grids."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.core.errors import ConfigError
from umbel.core.flower import NodeInfo, Run, empty_run, expired, is_over, take_identity
from umbel.core.records import to_array
from umbel.server.mailbox import Mailbox
from umbel.server.node_states import NodeStates
from umbel.server.roster import NodeRef


class BaseGrid(Grid):
    """A grid that knows its nodes by name; a subclass says how messages travel.

    Args:
        run_id: of the run, for messages and contexts.
        enough: the share of a round's training replies that is waited for.

    Attributes:
        states: what lasts of nodes that this engine keeps; None where they keep it themselves, so
            that it does not go back with a checkpoint.
    """

    states: NodeStates | None = None
    simulates = False
    """Whether time is that of simulated devices, and not the machine's."""

    def __init__(self, run_id: int, enough: float = 1.0) -> None:
        self._run = empty_run(run_id)
        self.enough = enough

    @abstractmethod
    def roster(self) -> list[NodeRef]:
        """All nodes, by partition."""

    @abstractmethod
    def open(self, timeout: float | None = None) -> Mailbox:
        """A mailbox whose replies end after `timeout` seconds; None is no end."""

    def stream(
        self, messages: Iterable[Message], timeout: float | None = None
    ) -> Iterator[Message]:
        """Send, and yield the replies as they arrive, for `timeout` seconds at most."""
        with self.open(timeout) as box:
            box.send(messages)
            yield from box

    @property
    def sharing(self) -> int:
        """How many places of work share the nodes; 0 where each node is a place of its own."""
        return 0

    def gone(self) -> set[int]:
        """Ids of nodes that were shut out for good and are asked no more."""
        return set()

    def told(self) -> Mapping[str, float]:
        """What the engine itself says of a round that is over, for the run's lines."""
        return {}

    def go_on(self, line: Mapping[str, Any]) -> None:
        """Go on with a run whose last line this is."""

    def array(self, vector: Tensor) -> Array:
        """A vector as it is sent to many nodes."""
        return to_array(vector)

    def set_run(self, run: Run) -> None:
        self._run = run
        take_identity(run.run_id)

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.roster()]

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node.node_id, name=node.name) for node in self.roster()]


def check_ttl(message: Message) -> None:
    """Raise where a message has no time to be answered in.

    Raises:
        ConfigError: its ttl is not above 0.
    """
    if message.metadata.ttl <= 0:
        ttl = message.metadata.ttl
        raise ConfigError(f"a message has a ttl of {ttl}; it must be above 0 seconds")


def in_time(reply: Message) -> Message:
    """A reply, or what stands in its place if it came after the ttl of what it answers."""
    return expired(reply) if is_over(reply) else reply


def not_here(node_id: int) -> str:
    """What is said of a message to nobody."""
    return (
        f"a message is addressed to node {node_id}, which is not in this federation; "
        "take node ids from grid.get_node_ids()"
    )
