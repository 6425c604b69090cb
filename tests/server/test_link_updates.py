"""Updates that lie, over the link and into a sum: rejected by name, and the round goes on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from umbel.server.drive import drive
from umbel.strategies.collect import EXAMPLES, METRICS, UPDATE, Gathering, PlainSum
from umbel.strategies.transform import Facts
from umbel.transport.codec import encode
from umbel.transport.link_pb2 import Begin, Frame

SIZE = 4


def update(values: Any, name: str = UPDATE, examples: Any = 1) -> RecordDict:
    array = Array(np.asarray(values))
    return RecordDict(
        {
            UPDATE: ArrayRecord({name: array}),
            METRICS: MetricRecord({EXAMPLES: examples, "loss": 0.5}),
        }
    )


GOOD = np.ones(SIZE, np.float32)
LIES: dict[str, Callable[[], RecordDict]] = {
    "shape": lambda: update(np.ones(SIZE + 1, np.float32)),
    "shape of two axes": lambda: update(np.ones((2, 2, 2), np.float32)),
    "dtype": lambda: update(np.array(["a"] * SIZE)),
    "name": lambda: update(GOOD, name="other"),
    "nan": lambda: update(GOOD * np.nan),
    "infinity": lambda: update(GOOD * np.inf),
    "no update": lambda: RecordDict({METRICS: MetricRecord({EXAMPLES: 1})}),
    "another kind of record": lambda: RecordDict({UPDATE: ConfigRecord({"a": 1})}),
    "weight": lambda: update(GOOD, examples=float("nan")),
    "negative weight": lambda: update(GOOD, examples=-5),
    "nothing": RecordDict,
}


def answer(peer: Any, content: RecordDict) -> None:
    begin = peer.read().begin
    data = b"".join(encode(content))
    peer.send(Frame(begin=Begin(id=begin.id, size=len(data), inline=data)))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_its_sender_and_not_the_round(lab: Any, lie: str) -> None:
    honest, liar = lab.node("honest"), lab.node("liar", instance="2")
    ids = {line.node.name: line.node.node_id for line in lab.hub.members()}
    answer_with = [(honest, update(GOOD)), (liar, LIES[lie]())]
    requests = [Message(RecordDict(), each, "train", group_id="1") for each in ids.values()]
    gathering = Gathering(1, SIZE, torch.float32, 2.0, Facts(size=SIZE))

    def send(messages: Any) -> Any:
        replies = lab.grid.stream(messages, 30.0)
        asked = lab.ask_iterator(replies)
        for peer, content in answer_with:
            answer(peer, content)
        return iter(asked.result())

    total = drive(PlainSum().gather(requests, gathering), send)
    assert torch.equal(total.total, torch.ones(SIZE, dtype=total.total.dtype))
    assert [rejected.node_id for rejected in total.rejected] == [ids["liar"]]
    assert total.replies == 1 and total.rejected[0].reason
