"""Mailboxes: send while replies come, wait for any, cancel; the same on every engine."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.fakes import APPS, SharedNursery
from umbel.server.drive import mailbox
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.link.grid import LinkGrid
from umbel.server.mailbox import GridMailbox
from umbel.transport.link_pb2 import Begin, Frame


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        context.state["seen"] = ConfigRecord({"id": message.metadata.group_id})
        return Message(message.content, reply_to=message)

    return app


def message(node: int, group: str) -> Message:
    return Message(RecordDict({"said": ConfigRecord({"in": group})}), node, "train", group_id=group)


class Plain:
    """What a Flower grid has, and nothing of Umbel's."""

    def __init__(self, inner: EmbeddedGrid) -> None:
        self.push_messages, self.pull_messages = inner.push_messages, inner.pull_messages


def conversation(open_box: Callable[[], Any]) -> list[str]:
    """Two nodes get a first message each, and another for each of the first four replies."""
    heard, sent = [], 2
    with open_box() as box:
        box.send([message(FIRST_NODE + i, str(i)) for i in range(2)])
        for reply in box:
            assert not reply.has_error(), reply.error.reason
            heard.append(str(reply.content["said"]["in"]))
            if sent < 6:
                box.send([message(reply.metadata.src_node_id, str(sent))])
                sent += 1
        assert list(box) == []
    return heard


@pytest.mark.parametrize("plain", [False, True])
def test_messages_go_out_while_replies_come_in(plain: bool) -> None:
    waits: list[float] = []
    with EmbeddedGrid(echo_app(), 3) as grid:
        if plain:
            heard = conversation(lambda: GridMailbox(Plain(grid), 60.0, waits.append))  # type: ignore[arg-type]
        else:
            heard = conversation(lambda: mailbox(grid, None))
    assert sorted(heard) == ["0", "1", "2", "3", "4", "5"]


def test_messages_go_out_to_processes_while_replies_come_in(nursery: SharedNursery) -> None:
    orders = RecordDict({"orders": ConfigRecord({})})
    with EmbeddedGrid(APPS / "unruly", 3, workers=2, nursery=nursery) as grid:
        with grid.open(60.0) as box:
            box.send([Message(orders, node, "train") for node in grid.get_node_ids()])
            visits: list[int] = []
            for reply in box:
                visits.append(reply.content["said"]["visits"])  # type: ignore[index]
                if visits[-1] == 1:
                    box.send([Message(orders, reply.metadata.src_node_id, "train")])
        assert sorted(visits) == [1, 1, 1, 2, 2, 2]


def test_what_is_cancelled_is_not_heard_of_again() -> None:
    with EmbeddedGrid(echo_app(), 4) as grid:
        with grid.open() as box:
            box.send([message(node, "old") for node in grid.get_node_ids()])
            first = next(iter(box))
        with grid.open() as box:
            box.send([message(node, "new") for node in grid.get_node_ids()])
            heard = [str(reply.content["said"]["in"]) for reply in box]
    assert str(first.content["said"]["in"]) == "old" and heard == ["new"] * 4


def test_a_plain_grid_is_not_waited_for_longer_than_asked() -> None:
    waits: list[float] = []

    class Silent:
        def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
            return [None, *(str(i) for i, _ in enumerate(messages))]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            del message_ids
            return iter(())

    box = GridMailbox(Silent(), 0.0, waits.append)  # type: ignore[arg-type]
    with EmbeddedGrid(echo_app(), 1):
        box.send([message(FIRST_NODE, "1")])
    assert list(box) == [] and waits == []


def begun(node: Any) -> Begin:
    while (frame := node.read()).WhichOneof("kind") != "begin":
        pass
    return Begin.FromString(frame.begin.SerializeToString())


def test_real_nodes_are_asked_again_while_others_are_waited_for(lab: Any) -> None:
    """The quick one answers three times before the slow one does once."""
    quick, slow = (lab.node(name, instance=name) for name in ("quick", "slow"))
    grid = LinkGrid(lab.hub, run_id=9)
    content = RecordDict({"a": ArrayRecord({"x": Array(np.arange(10, dtype=np.float32))})})
    names = {node.node_id: node.name for node in grid.roster()}
    heard: list[str] = []

    def replies() -> Iterator[Message]:
        with grid.open(30.0) as box:
            box.send([Message(content, node, "train", group_id="1") for node in names])
            for reply in box:
                heard.append(names[reply.metadata.src_node_id])
                if heard.count("quick") < 3 and heard[-1] == "quick":
                    node, group = reply.metadata.src_node_id, str(len(heard) + 1)
                    box.send([Message(content, node, "train", group_id=group)])
                yield reply

    def echo(node: Any) -> None:
        begin = begun(node)
        node.send(Frame(begin=Begin(id=begin.id, size=len(begin.inline), inline=begin.inline)))

    asked = lab.ask_iterator(replies())
    for _ in range(3):
        echo(quick)
    echo(slow)
    assert len(asked.result()) == 4
    assert sorted(heard) == ["quick"] * 3 + ["slow"]
