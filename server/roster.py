"""Who is in the federation: the same nodes in the same order on every engine.

Flower's own grids know their nodes by random ids. To choose the same cohort for the same seed,
nodes are ordered by the partition they hold, which such grids must ask them for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from umbel.core.contents import take_record
from umbel.core.errors import RunError
from umbel.strategies.layout import CONFIG, HELLO

POLL_S = 1.0
REFUSALS = 3
"""Times in a row that nodes may answer with errors alone before the run ends."""


@dataclass(frozen=True, order=True)
class NodeRef:
    """A node: Flower's id, the name people know it by, and its partition."""

    node_id: int
    name: str
    partition: int


@runtime_checkable
class KnowsNodes(Protocol):
    """A grid that can name its nodes."""

    def roster(self) -> list[NodeRef]:
        """All nodes, by partition."""
        ...


def roster(
    grid: Grid, *, timeout: float = 300.0, sleep: Callable[[float], None] = time.sleep
) -> list[NodeRef]:
    """All nodes of a grid, by partition and name.

    Raises:
        RunError: no node has come within `timeout` seconds, or all that came fail; engines that
            start processes for their nodes may need a minute for the first.
    """
    if isinstance(grid, KnowsNodes):
        nodes = grid.roster()
        if not nodes:
            raise RunError("no node is connected")
        return nodes
    deadline = time.monotonic() + timeout
    known: dict[int, NodeRef] = {}
    expected, refusals, why = 1, 0, ""
    while True:
        new = [node_id for node_id in grid.get_node_ids() if node_id not in known]
        requests = [Message(RecordDict(), node_id, f"query.{HELLO}") for node_id in new]
        for reply in grid.send_and_receive(requests, timeout=timeout) if requests else ():
            if reply.has_error():
                why = f"; node {reply.metadata.src_node_id} said: {reply.error.reason}"
                continue
            said = take_record(reply.content, CONFIG, ConfigRecord)
            node_id, partition = reply.metadata.src_node_id, int(said["partition"])  # type: ignore[arg-type]  # whatever the node sent: int() raises
            known[node_id] = NodeRef(node_id, str(partition), partition)
            expected = max(expected, int(said["partitions"]))  # type: ignore[arg-type]  # whatever the node sent: int() raises
        if len(known) >= expected:
            return sorted(known.values(), key=lambda node: (node.partition, node.name))
        refusals = refusals + 1 if why and not known else 0
        if refusals >= REFUSALS:
            raise RunError(f"no node can run the app{why}")
        if time.monotonic() > deadline:
            if known:
                return sorted(known.values(), key=lambda node: (node.partition, node.name))
            raise RunError(f"no node has answered within {timeout:g} seconds{why}")
        sleep(POLL_S)


def newcomers(grid: Grid, nodes: Sequence[NodeRef]) -> list[NodeRef]:
    """Nodes that are here and were not when `nodes` were listed.

    Only grids that can name their nodes are asked: on others each look would be a message to
    every node.
    """
    if not isinstance(grid, KnowsNodes):
        return []
    known = {node.node_id for node in nodes}
    return [node for node in grid.roster() if node.node_id not in known]
