"""The same nodes in the same order on every engine."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from tests.fakes import reply, request
from umbel.core.errors import RunError
from umbel.core.flower import take_identity
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.roster import roster


class Strangers(Grid):
    """A grid that knows its nodes by random ids only; they come over time."""

    set_run = run = create_message = get_nodes = push_messages = pull_messages = None

    def __init__(self, waves: Sequence[dict[int, int]], total: int, silent: Sequence[int] = ()):
        self.waves, self.total, self.silent = list(waves), total, silent
        self.asked: list[int] = []
        self.known: dict[int, int] = {}

    def get_node_ids(self) -> list[int]:
        self.known |= self.waves.pop(0) if self.waves else {}
        return list(self.known)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        assert timeout is not None
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            if node not in self.silent:
                said = ConfigRecord({"partition": self.known[node], "partitions": self.total})
                content = RecordDict({"umbel": said})
                replies.append(Message(content, reply_to=request(node, "query.umbel_hello")))
        return replies


def names(found: Sequence[Any]) -> list[str]:
    return [node.name for node in found]


def test_nodes_are_ordered_by_what_they_hold_and_asked_once() -> None:
    take_identity(1)
    waits: list[float] = []
    grid = Strangers([{77: 2}, {55: 0}, {99: 1}], 3)
    assert names(roster(grid, sleep=waits.append)) == ["0", "1", "2"]
    assert sorted(grid.asked) == [55, 77, 99]
    assert len(waits) == 2


def test_who_does_not_come_is_not_waited_for_for_ever() -> None:
    take_identity(1)
    grid = Strangers([{77: 2, 55: 0}], 3)
    assert names(roster(grid, timeout=0.0, sleep=lambda _: None)) == ["0", "2"]
    with pytest.raises(RunError, match="no node has answered within 0 seconds"):
        roster(Strangers([], 3), timeout=0.0, sleep=lambda _: None)


def test_nodes_that_can_only_fail_are_quoted() -> None:
    take_identity(1)

    class Failing(Strangers):
        def send_and_receive(
            self,
            messages: Iterable[Message],
            *,
            timeout: float | None = None,  # noqa: ARG002
        ) -> list[Message]:
            return [reply(m.metadata.dst_node_id, error="no module 'task'") for m in messages]

    waits: list[float] = []
    with pytest.raises(RunError, match="no node can run the app; node 77 said: no module 'task'"):
        roster(Failing([{77: 0}], 1), sleep=waits.append)
    assert len(waits) == 2


def test_an_engine_that_knows_its_nodes_is_believed() -> None:
    from flwr.clientapp import ClientApp

    with EmbeddedGrid(ClientApp(), 3) as grid:
        assert names(roster(grid)) == ["0", "1", "2"]
