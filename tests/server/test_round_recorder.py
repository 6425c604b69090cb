"""Rounds of apps that keep their own: read off the messages."""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result

from umbel.core.flower import take_identity
from umbel.server.embedded.grid import ObservedGrid
from umbel.server.kept_model import BY_STRATEGY, NO_MODEL, KeptModel, watching_strategies
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


def test_the_model_is_what_was_evaluated_last_or_what_a_strategy_returned(tmp_path: Path) -> None:
    run = RunDirectory.create(None, "x", {}, out=tmp_path / "run")
    kept = KeptModel()
    take_identity(1)
    assert kept.save(run) == NO_MODEL and not run.model_path.exists()

    def asked(value: float) -> Message:
        arrays = {"w": Array(np.full(3, value)), "n": Array(np.array(["a", "b"]))}
        return Message(RecordDict({"arrays": ArrayRecord(arrays)}), 1001, "evaluate")

    kept.saw_evaluation(asked(1.0), 4)
    said = kept.save(run)
    assert "evaluated in round 4" in said and "without n, which are no plain numbers" in said
    assert run.read_model()["w"].tolist() == [1.0, 1.0, 1.0]
    with watching_strategies(kept):
        Once().start(None, ArrayRecord({"w": Array(np.zeros(2, np.float32))}))  # type: ignore[arg-type]
    assert BY_STRATEGY in kept.save(run)
    assert run.read_model()["w"].tolist() == [0.0, 0.0]


class Once(FedAvg):
    """A strategy whose own loop has no rounds."""

    def start(self, grid: Any, initial_arrays: ArrayRecord, *_: Any, **__: Any) -> Result:
        found = super().start(grid, initial_arrays, num_rounds=0)
        found.arrays = initial_arrays
        return found
