"""Over-selection: a round ends with enough replies; whoever is late stops, and does not count."""

import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from tests.server.small_federation import lines, start_nodes, wait_for
from umbel.server.link.grid import LinkGrid
from umbel.transport.link_pb2 import Beat, Begin, Frame

CONTENT = RecordDict({"a": ArrayRecord({"x": Array(np.arange(10, dtype=np.float32))})})


def begun(node: Any) -> Begin:
    """The head of the next instruction; what is said in between is passed over."""
    while (frame := node.read()).WhichOneof("kind") != "begin":
        pass
    return Begin.FromString(frame.begin.SerializeToString())


def echo(node: Any, begin: Begin) -> None:
    node.send(Frame(begin=Begin(id=begin.id, size=len(begin.inline), inline=begin.inline)))


def test_four_of_five_are_enough_to_train_and_all_five_evaluate(lab: Any) -> None:
    nodes = [lab.node(f"n{i}", instance=str(i)) for i in range(5)]
    grid = LinkGrid(lab.hub, run_id=6, enough=0.8)

    def ask(kind: str) -> tuple[Any, list[Begin]]:
        requests = [Message(CONTENT, each, kind, group_id="1") for each in grid.get_node_ids()]
        asked = lab.ask_iterator(grid.stream(requests, 30.0))
        return asked, [begun(node) for node in nodes]

    asked, begins = ask("train")
    for node, begin in zip(nodes[:4], begins, strict=False):
        echo(node, begin)
    replies = asked.result()
    assert len(replies) == 4 and not any(reply.has_error() for reply in replies)
    assert nodes[4].read().cancel.id == begins[4].id
    echo(nodes[4], begins[4])  # it was ready at the same moment: its answer is taken off its hands
    assert nodes[4].read().done.id == begins[4].id

    asked, begins = ask("evaluate")
    for node, begin in zip(nodes, begins, strict=True):
        echo(node, begin)
    assert len(asked.result()) == 5


def test_whoever_fails_at_once_does_not_end_the_round_for_the_others(lab: Any) -> None:
    nodes = [lab.node(f"n{i}", instance=str(i)) for i in range(3)]
    grid = LinkGrid(lab.hub, run_id=8, enough=0.6)
    requests = [Message(CONTENT, each, "train", group_id="1") for each in grid.get_node_ids()]
    asked = lab.ask_iterator(grid.stream(requests, 30.0))
    begins = [begun(node) for node in nodes]
    nodes[0].send(Frame(begin=Begin(id=begins[0].id, failed=True, error_reason="no")))
    for node, begin in zip(nodes[1:], begins[1:], strict=True):
        echo(node, begin)
    assert [reply.has_error() for reply in asked.result()].count(False) == 2


def test_a_node_that_let_the_time_run_out_holds_up_the_next_round_for_less(lab: Any) -> None:
    """It heartbeats and says that it trains; the others are heard, and the round ends."""
    lab.hub.lost_after = 1.0
    good, bad = lab.node("good", instance="1"), lab.node("bad", instance="2")
    grid = LinkGrid(lab.hub, run_id=7)

    def ask(number: int, timeout: float) -> list[Any]:
        ids = grid.get_node_ids()
        requests = [Message(CONTENT, each, "train", group_id=str(number)) for each in ids]
        asked = lab.ask_iterator(grid.stream(requests, timeout))
        begins = [begun(node) for node in (good, bad)]
        bad.send(Frame(beat=Beat(phase="train", id=begins[1].id, working=True)))
        echo(good, begins[0])
        if number == 3:
            echo(bad, begins[1])
        return list(asked.result())

    assert len(ask(1, 0.5)) == 1
    began = time.monotonic()
    assert len(ask(2, 600.0)) == 1
    assert time.monotonic() - began < 60
    assert len(ask(3, 600.0)) == 2  # it answers in time, and is as good as any other again
    assert not grid._late


@pytest.mark.slow
def test_a_run_does_not_wait_for_a_node_that_hangs(federation: Any) -> None:
    """The round would last three hours; the node stays, and trains again in later rounds."""
    start_nodes(federation, "n1", "n2")
    options = "hang=true pause=0.3 rounds=6 round-timeout=10000.0 min-replies=1"
    federation.server("-c", options, "--enough", "0.5")
    assert federation.wait("server") == 0, federation.log("server")
    rounds = [line for line in lines(federation.result()) if line["round"]]
    assert [line["round"] for line in rounds] == [*range(1, 7)]
    assert all(line["clients"] >= 1 for line in rounds) and rounds[1]["clients"] == 1
    assert "not waited for any longer: n2" in federation.log("server")
    wait_for(federation, lambda: "was stopped" in federation.log("n2"))
    assert federation.running["n2"].poll() is None
