"""Federated evaluation: means, spread and the worst tenth, whatever nodes report."""

import math
from typing import Any

import pytest
from flwr.app import Message, MetricRecord, RecordDict

from tests.fakes import reply, request
from umbel.server.evaluation import FederatedEvaluation, direction, gather
from umbel.server.roster import NodeRef

NODES = [NodeRef(1001 + i, str(i), i) for i in range(20)]


def said(i: int, examples: Any = 1, **metrics: Any) -> Message:
    record = MetricRecord({"num-examples": examples, **metrics})
    return Message(RecordDict({"metrics": record}), reply_to=request(1001 + i, "evaluate"))


def test_the_summary_of_twenty_nodes() -> None:
    replies = [said(i, i + 1, loss=float(i), accuracy=i / 100) for i in reversed(range(20))]
    evaluation = gather(replies, NODES)
    assert [row["node"] for row in evaluation.rows] == [str(i) for i in range(20)]
    summary = evaluation.summary()
    weights = range(1, 21)
    assert summary["loss"]["mean"] == pytest.approx(sum(i * w for i, w in enumerate(weights)) / 210)
    assert summary["loss"]["spread"] == pytest.approx(math.sqrt((20**2 - 1) / 12))
    assert summary["loss"]["worst_decile"] == pytest.approx(18.5), "a loss is bad when it is high"
    assert summary["accuracy"]["worst_decile"] == pytest.approx(0.005)
    assert summary["loss"]["nodes"] == 20


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("loss", -1),
        ("test_loss", -1),
        ("val-rmse", -1),
        ("eval.loss", -1),
        ("accuracy", 1),
        ("top5 acc", 1),
        ("glossary", 0),
        ("closeness", 0),
    ],
)
def test_which_way_is_better(name: str, way: int) -> None:
    assert direction(name) == way


def test_failures_and_nodes_without_data_are_left_out() -> None:
    replies = [
        said(0, 5, loss=1.0),
        said(1, 0),
        reply(1003, error="no disk"),
        said(3, math.nan, loss=1.0),
        said(4, 5, loss=math.nan, other=2.0),
        said(5, -1, loss=3.0),
        reply(999, error="who am I"),
    ]
    evaluation = gather(replies, NODES)
    assert [row["node"] for row in evaluation.rows] == ["0", "4"]
    assert (evaluation.failed[0].node_id, evaluation.failed[0].reason) == (1003, "no disk")
    summary = evaluation.summary()
    assert (summary["loss"]["mean"], summary["loss"]["nodes"]) == (1.0, 1)
    assert summary["other"]["mean"] == 2.0


def test_nothing_at_all() -> None:
    assert gather([], NODES).summary() == FederatedEvaluation().summary() == {}


@pytest.mark.parametrize("name", ["examples", "node"])
def test_a_metric_may_have_any_name(name: str) -> None:
    odd = said(0, 5, loss=1.0)
    odd.content["metrics"][name] = 0.0  # type: ignore[call-overload,index]
    evaluation = gather([odd, said(1, 5, loss=3.0)], NODES)
    assert [row["node"] for row in evaluation.rows] == ["0", "1"]
    assert evaluation.summary()["loss"]["mean"] == 2.0


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 10**400])
def test_absurd_values_do_not_end_the_run(value: Any) -> None:
    evaluation = gather(
        [said(i, 2**52, loss=value) for i in range(3)] + [said(4, 1, loss=0.5)], NODES
    )
    assert evaluation.summary()["loss"]["mean"] == 0.5
    absurd = gather([said(0, value, loss=1.0), said(1, 1, loss=0.5)], NODES)
    assert absurd.summary()["loss"]["mean"] == 0.5
