"""The node's half: what it is sent, what it sends, what it keeps."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from tests.fakes import APPS, PlusOne, Times, request
from umbel.clients.holding import SEEN
from umbel.clients.plan import LOCAL
from umbel.clients.received import job_seed, node_of
from umbel.core.app_folder import load
from umbel.core.errors import ConfigError
from umbel.core.records import Manifest, from_array, to_array
from umbel.federation import Federation
from umbel.strategies.collect import BUFFERS, METRICS, UPDATE
from umbel.strategies.layout import CONFIG, HELLO, MODEL, PARAMETERS
from umbel.strategies.stack import Stack


@pytest.fixture
def slope() -> Iterator[Federation]:
    path = sys.path[:]
    yield load(APPS / "slope", "task:federation", Federation)
    sys.path[:] = path


def context(partition: int = 1, **options: Any) -> Context:
    config = {"partition-id": partition, "num-partitions": 4}
    run = {name.replace("_", "-"): value for name, value in options.items()}
    return Context(1, 1001 + partition, config, RecordDict(), run)


def asked(kind: str = "train", model: Any = None, **config: Any) -> Message:
    parameters = torch.tensor([1.0, 0.0, -1.0]) if model is None else model
    manifest = Manifest.of({"slope": torch.zeros(3)})
    content = RecordDict(
        {
            MODEL: ArrayRecord({PARAMETERS: to_array(parameters)}),
            CONFIG: ConfigRecord(
                {"round": 1, "manifest": manifest.digest, "learning-rate": 0.1, **config}
            ),
        }
    )
    return request(1002, kind, content)


def update_of(reply: Message) -> torch.Tensor:
    return from_array(reply.content.array_records[UPDATE][UPDATE])


def test_what_travels_is_the_difference(slope: Federation) -> None:
    app, message = slope.client_app(), asked()
    before = message.content.array_records[MODEL][PARAMETERS].data
    reply = app(message, context())
    assert message.content.array_records[MODEL][PARAMETERS].data == before
    assert list(reply.content.array_records[UPDATE]) == [UPDATE], "buffers stay"
    metrics = reply.content.metric_records[METRICS]
    assert metrics["num-examples"] == 20 and metrics["visits"] == 1.0
    again = app(asked(), context())
    assert torch.equal(update_of(reply), update_of(again)), "the same job, the same bits"
    other_round = app(asked(round=2), context())
    assert not torch.equal(update_of(reply), update_of(other_round))


def test_the_layers_encode_in_list_order(slope: Federation) -> None:
    plain = update_of(slope.client_app()(asked(), context()))
    stacked = replace(slope, stack=Stack([PlusOne(), Times()])).client_app()
    reply = stacked(asked(**{"plus-one.rounds": 5}), context())
    torch.testing.assert_close(update_of(reply), (plain + 1) * 3)
    assert reply.content.metric_records[METRICS]["plus-one.rounds"] == 5.0


def test_local_buffers_are_kept_in_the_nodes_own_state(slope: Federation) -> None:
    app, own = slope.client_app(), context()
    visits = [app(asked(), own).content.metric_records[METRICS]["visits"] for _ in range(3)]
    assert visits == [1.0, 2.0, 3.0]
    assert list(own.state.array_records[LOCAL]) == ["visits"]
    fresh = app(asked(), context(2)).content.metric_records[METRICS]["visits"]
    assert fresh == 1.0, "another node has a state of its own"


def test_averaged_buffers_travel_and_nothing_is_kept(slope: Federation) -> None:
    app, own = slope.client_app(), context(buffers="mean")
    message = asked()
    message.content.array_records[MODEL][BUFFERS] = to_array(torch.tensor([6.5]))
    reply = app(message, own)
    assert from_array(reply.content.array_records[UPDATE][BUFFERS]).tolist() == [7.5]
    assert list(own.state) == [SEEN]  # what its data were; no buffers


def test_a_node_with_another_model_says_so(slope: Federation) -> None:
    with pytest.raises(ConfigError, match="3 parameters in another layout than the server's"):
        slope.client_app()(asked(manifest="0123456789abcdef"), context())


def test_evaluation_is_on_the_nodes_own_examples(slope: Federation) -> None:
    reply = slope.client_app()(asked("evaluate", torch.tensor([1.0, 2.0, 3.0])), context())
    metrics = reply.content.metric_records[METRICS]
    assert metrics["num-examples"] == 5 and metrics["loss"] == pytest.approx(0.0, abs=1e-9)


def test_a_node_without_examples_of_its_own_to_test_reports_none(slope: Federation) -> None:
    def without(node: Any, options: Any) -> Any:
        return slope.data(node, options).train

    reply = replace(slope, data=without).client_app()(asked("evaluate"), context())
    assert dict(reply.content.metric_records[METRICS]) == {"num-examples": 0}


def test_a_node_says_which_partition_it_holds(slope: Federation) -> None:
    reply = slope.client_app()(request(1002, f"query.{HELLO}"), context(3))
    assert dict(reply.content.config_records[CONFIG]) == {"partition": 3, "partitions": 4}
    assert node_of(Context(1, 1, {}, RecordDict(), {})).partitions == 1


def test_an_unknown_query_is_an_error(slope: Federation) -> None:
    with pytest.raises(ConfigError, match="no query is registered under 'nonsense'"):
        slope.client_app()(request(1002, "query.nonsense"), context())


def test_data_are_made_once_for_each_warm_node_and_again_for_other_options(
    slope: Federation,
    tmp_path: Path,  # noqa: ARG001
) -> None:
    made: list[tuple[int, Any]] = []

    def data(node: Any, options: Any) -> Any:
        made.append((node.partition, options["seed"]))
        return slope.data(node, options)

    app = replace(slope, data=data).client_app()
    for partition, seed in [(0, 0), (1, 0), (0, 0), (1, 0), (0, 9), (0, 9)]:
        app(asked(), context(partition, seed=seed))
    assert made == [(0, 0), (1, 0), (0, 9)]


def test_seeds_of_jobs_differ_and_fit_everywhere() -> None:
    seeds = {job_seed(s, r, p) for s in range(5) for r in range(20) for p in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert type(job_seed(0, 1, 2)) is int and np.random.default_rng(job_seed(0, 1, 2))
