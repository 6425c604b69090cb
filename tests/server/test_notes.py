"""Rounds of apps that keep their own: read off the messages."""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from umbel.server.embedded.grid import ObservedGrid
from umbel.server.output.rundir import RunDirectory


def app() -> ClientApp:
    client = ClientApp()

    @client.train()
    @client.evaluate()
    @client.query()
    def answer(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if partition == message.content["c"].get("fails"):  # type: ignore[union-attr]
            raise OSError("gone")
        value = message.content["c"].get("value", float(partition))  # type: ignore[union-attr]
        metrics = MetricRecord({"num-examples": partition + 1, "loss": value})  # type: ignore[dict-item]
        arrays = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
        return Message(RecordDict({"m": metrics, "a": arrays}), reply_to=message)

    return client


def send(grid: ObservedGrid, kind: str, group: str = "", **config: Any) -> None:
    content = RecordDict({"c": ConfigRecord(config)})
    list(
        grid.send_and_receive(
            [Message(content, n, kind, group_id=group) for n in grid.get_node_ids()]
        )
    )


def observed(tmp_path: Path, trips: list[tuple[str, str, dict[str, Any]]]) -> Any:
    run = RunDirectory.create(None, "x", {}, out=tmp_path / "run")
    with ObservedGrid(app(), 3) as grid:
        for kind, group, config in trips:
            send(grid, kind, group, **config)
        result = grid.finish(run)
    return result, run.rounds()


def test_rounds_that_flowers_strategies_number(tmp_path: Path) -> None:
    trips = [
        (kind, "", {"server-round": number, **({"fails": 1} if number == 2 else {})})
        for number in (1, 2)
        for kind in ("train", "evaluate")
    ]
    result, lines = observed(tmp_path, trips)
    assert [line["round"] for line in lines] == [1, 2]
    assert [line["clients"] for line in lines] == [3, 2]
    assert lines[0]["failed"] == [] and {item["node"] for item in lines[1]["failed"]} == {"1"}
    assert lines[0]["metrics"]["loss"] == (0 * 1 + 1 * 2 + 2 * 3) / 6
    assert result["rounds"] == 2 and result["metrics"] == lines[1]["metrics"]
    assert lines[0]["bytes_up"] > 0 and lines[0]["seconds"] > 0
    assert "OSError: gone" in lines[1]["failed"][0]["reason"]


def test_rounds_that_nobody_numbers(tmp_path: Path) -> None:
    trips = [("train", "", {}), ("evaluate", "", {}), ("query", "", {}), ("train", "", {})]
    _, lines = observed(tmp_path, trips)
    assert [line["round"] for line in lines] == [1, 2]


def test_groups_number_rounds_too(tmp_path: Path) -> None:
    _, lines = observed(tmp_path, [("train", "4", {}), ("evaluate", "4", {}), ("train", "5", {})])
    assert [line["round"] for line in lines] == [4, 5]


def test_absurd_metrics_are_left_out(tmp_path: Path) -> None:
    result, lines = observed(tmp_path, [("train", "", {}), ("evaluate", "", {"value": 1.7e308})])
    assert lines[0]["metrics"] == result["metrics"] == {}


def test_an_app_that_sends_nothing(tmp_path: Path) -> None:
    result, lines = observed(tmp_path, [])
    assert (result["rounds"], lines) == (0, [])
