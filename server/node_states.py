"""What lasts of virtual nodes between their messages: a pickled `Context.state` each."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class NodeStates:
    """The states of virtual nodes, and which of them changed since they were last saved.

    Attributes:
        by_node: pickled states by node id.
        changed: ids of the nodes whose states a checkpoint does not have yet.
    """

    by_node: dict[int, bytes] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)

    def put(self, node_id: int, state: bytes | None) -> None:
        """Keep a node's state; None leaves it as it is."""
        if state is not None and self.by_node.get(node_id) != state:
            self.by_node[node_id] = state
            self.changed.add(node_id)

    def take_changed(self) -> dict[int, bytes]:
        """States that changed since the last call, by node id; for a checkpoint."""
        found = {node_id: self.by_node[node_id] for node_id in self.changed}
        self.changed.clear()
        return found

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Put back what `take_changed` gave.

        Raises:
            Exception: of `pickle`, if a state is damaged.
        """
        for node_id, state in states.items():
            pickle.loads(state)  # a damaged state must fail here, not in the middle of a round
            self.by_node[node_id] = state
