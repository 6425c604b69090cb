"""What Flower promises of a grid, kept by the link engine: order, ttl, and messages to nobody."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from tests.server.conftest import eventually
from tests.server.test_link_stragglers import begun, echo
from umbel.core.errors import ConfigError
from umbel.core.flower import UNAVAILABLE, UNKNOWN
from umbel.server.link.grid import LinkGrid

CONTENT = RecordDict({"c": ConfigRecord({"a": 1})})


@pytest.fixture
def grid(lab: Any) -> LinkGrid:
    found: LinkGrid = lab.grid
    return found


def ask(nodes: Any, **more: Any) -> list[Message]:
    return [Message(CONTENT, node, "query", **more) for node in nodes]


def later(grid: LinkGrid, messages: list[Message]) -> Iterator[Message]:
    """The list that `send_and_receive` gives, when a thread begins to read it."""
    yield from grid.send_and_receive(messages, timeout=30.0)


def test_replies_come_in_the_order_of_the_messages(lab: Any, grid: LinkGrid) -> None:
    nodes = [lab.node(f"n{i}", instance=str(i)) for i in range(3)]
    ids = dict(
        zip([line.node.name for line in lab.hub.members()], grid.get_node_ids(), strict=True)
    )
    for order in itertools.permutations(range(3)):
        asked = lab.ask_iterator(later(grid, ask([ids[f"n{i}"] for i in range(3)])))
        begins = [begun(node) for node in nodes]
        for i in order:
            echo(nodes[i], begins[i])
        replies = asked.result()
        assert [reply.metadata.src_node_id for reply in replies] == [ids[f"n{i}"] for i in range(3)]


def test_a_message_whose_ttl_is_over_is_an_error_and_its_node_is_told(
    lab: Any, grid: LinkGrid
) -> None:
    quick, slow = (lab.node(name, instance=name) for name in ("quick", "slow"))
    names = {line.node.name: line.node.node_id for line in lab.hub.members()}
    asked = lab.ask(ask([names["slow"], names["quick"]], ttl=2.0), timeout=None)
    begin, other = begun(slow), begun(quick)
    assert 0 < begin.deadline_s <= 2.0
    echo(quick, other)
    replies = {reply.metadata.src_node_id: reply for reply in asked.result()}
    assert replies[names["quick"]].has_content()
    assert replies[names["slow"]].error.code == UNKNOWN
    assert slow.read().cancel.id == begin.id

    (pushed,) = grid.push_messages(ask([names["slow"]], ttl=1.0))
    begun(slow)
    assert grid.pull_messages([pushed]) == []
    (reply,) = eventually(lambda: grid.pull_messages([pushed]))
    assert (reply.error.code, reply.metadata.reply_to_message_id) == (UNKNOWN, pushed)
    with pytest.raises(ConfigError, match="ttl of -1"):
        grid.push_messages(ask([names["slow"]], ttl=-1.0))


def test_messages_to_nobody_and_of_nobody(
    lab: Any, grid: LinkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    node = lab.node("here")
    (here,) = grid.get_node_ids()
    with caplog.at_level(logging.ERROR, logger="umbel.link"):
        message_id, nothing = grid.push_messages(ask([here, 5]))
    assert nothing is None
    assert "node 5, which is not in this federation" in caplog.text
    echo(node, begun(node))
    (reply,) = eventually(lambda: grid.pull_messages([message_id]))
    assert reply.has_content()
    for asked in (message_id, "unheard-of"):
        (error,) = grid.pull_messages([asked])
        assert (error.error.code, error.metadata.reply_to_message_id) == (UNKNOWN, asked)
    (refused,) = grid.send_and_receive(ask([5]))
    assert (refused.error.code, refused.metadata.src_node_id) == (UNAVAILABLE, 5)
