"""The rounds of a federation over the embedded grid: the same bits on any engine's terms."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from torch import Tensor

from tests.fakes import APPS, PlusOne, SharedNursery, Times
from umbel.clients.data.examples import Node
from umbel.clients.received import job_seed
from umbel.core.app_folder import load
from umbel.core.errors import ConfigError, RunError
from umbel.federation import Federation
from umbel.privacy.budget.events import ADD_OR_REMOVE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.roster import NodeRef
from umbel.server.rounds import Rounds
from umbel.server.shortfall import Shortfall
from umbel.server.training_spec import Outcome
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim

Fit = Callable[..., tuple[Outcome, list[dict[str, Any]]]]


@pytest.fixture
def slope() -> Iterator[Federation]:
    path = sys.path[:]
    yield load(APPS / "slope", "task:federation", Federation)
    sys.path[:] = path


@pytest.fixture
def fit(slope: Federation, tmp_path: Path, nursery: SharedNursery) -> Fit:
    """Train the slope, or another federation, in this process."""

    def train(
        federation: Federation = slope,
        nodes: int = 6,
        workers: int = 0,
        app: Any = None,
        **changes: Any,
    ) -> tuple[Outcome, list[dict[str, Any]]]:
        given = {name.replace("_", "-"): value for name, value in changes.items()}
        options = federation.complete(given)
        count = len(list(tmp_path.iterdir()))
        run = RunDirectory.create(None, "x", {}, out=tmp_path / str(count))
        client = app if workers else federation.client_app()
        with EmbeddedGrid(
            client, nodes, workers=workers, run_config=options, nursery=nursery, log=run.log_path
        ) as grid:
            rounds = Rounds(federation.job(options), grid, grid.roster(), run, SilentProgress())
            outcome = rounds.fit()
        assert {k: v.tolist() for k, v in run.read_model().items()} == {
            k: v.tolist() for k, v in {**outcome.parameters, **outcome.buffers}.items()
        }
        return outcome, run.rounds()

    return train


def bits(outcome: Outcome) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in outcome.parameters.values())


def test_rounds_are_federated_averaging(fit: Fit, slope: Federation) -> None:
    """Against a plain loop that knows no messages."""
    outcome, lines = fit(rounds=4, seed=3)
    task = importlib.import_module("task")
    options = slope.complete({"seed": 3})
    w = slope.trainer_for(options).initial(options, 3).parameters["slope"]
    for number in range(1, 5):
        rows: list[tuple[Tensor, int]] = []
        for partition in range(6):
            examples = task.line(Node(partition, 6, {}), options).train
            noise = torch.randn(
                3, generator=torch.Generator().manual_seed(job_seed(3, number, partition))
            )
            error = examples.x @ w - examples.y
            rows.append((w - 0.1 * (examples.x.T @ error / len(error) + noise * 0.01), len(error)))
        w = torch.from_numpy(
            np.average([r.numpy() for r, _ in rows], axis=0, weights=[n for _, n in rows])
        )
        w = w.float()
    torch.testing.assert_close(outcome.parameters["slope"], w, rtol=1e-5, atol=1e-6)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["metrics"] == outcome.metrics
    assert outcome.stopped == "rounds"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_bits_for_any_number_of_workers(fit: Fit, workers: int) -> None:
    changes: dict[str, Any] = {
        "rounds": 3,
        "cohort": "fixed",
        "cohort_size": 5,
        "optimizer": "fedadam",
    }
    plain, lines = fit(nodes=8, **changes)
    spread, others = fit(nodes=8, workers=workers, app=APPS / "slope", **changes)
    assert bits(plain) == bits(spread)
    assert [line["train"] for line in lines[1:]] == [line["train"] for line in others[1:]]
    assert lines[-1]["federated"] == others[-1]["federated"]


def test_layers_that_undo_themselves_change_nothing_and_see_every_round(
    fit: Fit, slope: Federation
) -> None:
    plain, _ = fit(rounds=3)
    stacked, lines = fit(replace(slope, stack=Stack([PlusOne(), Times()])), rounds=3)
    torch.testing.assert_close(plain.parameters, stacked.parameters, rtol=1e-4, atol=1e-5)
    assert [line["train"]["plus-one.rounds"] for line in lines[1:]] == [0.0, 1.0, 2.0]
    assert [line["train"]["plus-one.replies"] for line in lines[1:]] == [6.0, 6.0, 6.0]


def test_cohorts(fit: Fit) -> None:
    everyone, fixed, poisson = (
        [line["clients"] for line in fit(rounds=12, nodes=10, **changes)[1][1:]]
        for changes in (
            {},
            {"cohort": "fixed", "cohort_size": 4},
            {"cohort": "poisson", "cohort_size": 1.5},
        )
    )
    assert set(everyone) == {10}
    assert set(fixed) == {4}
    assert len(set(poisson)) > 1 and 0 in poisson, "an empty draw is a round like any other"
    one, two = (fit(rounds=2, cohort="fixed", cohort_size=2, seed=s)[0] for s in (1, 1))
    assert bits(one) == bits(two) != bits(fit(rounds=2, cohort="fixed", cohort_size=2, seed=2)[0])


def test_a_schedule_reaches_the_nodes(fit: Fit) -> None:
    _, lines = fit(rounds=4, schedule="step", schedule_gamma=0.5, schedule_every=2, warmup_rounds=1)
    assert [line["learning_rate"] for line in lines[1:]] == [0.05, 0.1, 0.1, 0.05]


def test_buffers_stay_on_their_node_or_are_averaged(fit: Fit) -> None:
    local, lines = fit(rounds=3)
    assert local.buffers["visits"].tolist() == [0.0], "the coordinator's own, as it began"
    assert [line["train"]["visits"] for line in lines[1:]] == [1.0, 2.0, 3.0]
    mean, lines = fit(rounds=3, buffers="mean", cohort="fixed", cohort_size=2)
    assert mean.buffers["visits"].tolist() == [3.0], "everyone goes on from the mean"
    assert lines[-1]["metrics"]["visits"] == 3.0
    assert lines[1]["bytes_down"] == 2 * (3 + 1) * 4


def test_early_stopping_and_the_best_model(fit: Fit) -> None:
    """With a rate that makes the loss rise soon."""
    worse: dict[str, Any] = {"rounds": 30, "learning_rate": 0.9, "server_learning_rate": 2.5}
    outcome, lines = fit(early_stop_patience=3, keep="best", **worse)
    losses = [line["metrics"]["loss"] for line in lines]
    best = losses.index(min(losses))
    assert (outcome.stopped, outcome.rounds) == ("early-stop", best + 3)
    assert outcome.metrics["loss"] == pytest.approx(min(losses))
    last, _ = fit(early_stop_patience=3, **worse)
    assert last.metrics["loss"] == losses[-1] > min(losses)


def test_a_metric_that_cannot_be_compared_is_never_the_best(fit: Fit, slope: Federation) -> None:
    """A NaN at the beginning must not stay the best for ever."""

    @dataclass
    class NanFirst:
        inner: Any
        calls: int = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def evaluate(self, weights: Any, examples: Any, options: Any) -> Any:
            found = self.inner.evaluate(weights, examples, options)
            self.calls += 1
            metrics = {"loss": float("nan")} if self.calls == 1 else found.metrics
            return replace(found, metrics=metrics)

    federation = replace(slope, trainer=NanFirst(slope.trainer))
    outcome, lines = fit(federation, rounds=3, keep="best", client_eval_every=-1)
    assert outcome.metrics["loss"] == pytest.approx(
        min(line["metrics"]["loss"] for line in lines[1:])
    )


def test_the_mean_of_the_last_models(fit: Fit) -> None:
    models = [fit(rounds=n)[0].parameters["slope"].double() for n in (3, 4, 5)]
    averaged, _ = fit(rounds=5, average_from=3)
    expected = torch.stack(models).mean(0).float()
    torch.testing.assert_close(averaged.parameters["slope"], expected, rtol=1e-5, atol=1e-6)


def test_evaluations_are_as_rare_as_asked_and_the_last_round_has_both(fit: Fit) -> None:
    _, lines = fit(rounds=5, evaluate_every=3, client_eval_every=2)
    assert [bool(line["metrics"]) for line in lines] == [True, False, False, True, False, True]
    federated = [line["round"] for line in lines[1:] if line["federated"]]
    assert federated == [2, 4, 5]
    summary = lines[-1]["federated"]["loss"]
    assert set(summary) == {"mean", "spread", "worst_decile", "nodes"}
    assert summary["nodes"] == 6
    assert summary["worst_decile"] >= summary["mean"]
    _, never = fit(rounds=2, client_eval_every=-1)
    assert all(line["federated"] is None for line in never[1:])


def test_a_broken_node_costs_its_share(fit: Fit) -> None:
    _, lines = fit(rounds=3, **{"break-node": 1, "break-round": 2})
    assert [line["clients"] for line in lines[1:]] == [6, 5, 6]
    (failed,) = lines[2]["failed"]
    assert failed["node"] == "1"
    assert re.fullmatch(r"OSError: the disk is on fire \(.*task.py, line \d+\)", failed["reason"])


def test_too_few_replies_leave_the_model_and_end_the_run_in_the_end(fit: Fit) -> None:
    fewer = {"break-node": 1, "break-round": 2, "min-replies": 6}
    _, lines = fit(rounds=3, **fewer)
    assert lines[2]["metrics"] == lines[1]["metrics"] != lines[3]["metrics"]
    with pytest.raises(RunError, match=r"round 3: 5 of 6 needed .*; node 1 said: OSError"):
        fit(rounds=9, **{**fewer, "break-round": 0})


def failing(slope: Federation, first: int) -> Federation:
    """The same, with nodes from partition `first` on whose data cannot be read."""

    def data(node: Any, options: Any) -> Any:
        if node.partition >= first:
            raise OSError("the disk is on fire")
        return slope.data(node, options)

    return replace(slope, data=data)


def test_half_of_the_nodes_make_a_round_and_fewer_do_not(fit: Fit, slope: Federation) -> None:
    _, lines = fit(failing(slope, 3), rounds=2)
    assert [line["used"] for line in lines[1:]] == [True, True]
    assert Shortfall.of(lines).sentences() == [
        "nodes failed in 2 of 2 rounds, up to 3 of 6, and the model was trained without them; "
        f"most often: {lines[1]['failed'][0]['reason']}"
    ]
    with pytest.raises(RunError, match="2 of 3 needed replies could be used"):
        fit(failing(slope, 2), rounds=5)
    _, lines = fit(failing(slope, 2), rounds=2, min_replies=2)
    assert all(line["used"] for line in lines[1:])


def test_a_run_whose_rounds_changed_nothing_has_failed(fit: Fit, slope: Federation) -> None:
    with pytest.raises(RunError, match=r"none of the 2 rounds changed the model: .*on fire"):
        fit(failing(slope, 2), rounds=2)
    _, lines = fit(rounds=2, **{"break-node": 1, "break-round": 2, "min-replies": 6})
    assert [line["used"] for line in lines[1:]] == [True, False]
    (sentence,) = Shortfall.of(lines).sentences()
    assert sentence.startswith("1 of 2 rounds could not be used and left the model as it was")


def test_a_model_that_is_no_longer_finite_ends_the_run_with_the_cure(fit: Fit) -> None:
    with pytest.raises(RunError, match=r"lower learning-rate|the longest taken"):
        fit(rounds=60, learning_rate=50.0, server_learning_rate=1e30)


def test_what_cannot_be_is_said_before_the_first_round(fit: Fit, slope: Federation) -> None:
    with pytest.raises(ConfigError, match=r"early-stop-metric is 'f1'.*choose one of loss, visits"):
        fit(keep="best", early_stop_metric="f1")
    with pytest.raises(ConfigError, match="keep-model=best needs held-out examples"):
        fit(replace(slope, test=None), keep="best")


class Growing(EmbeddedGrid):
    """A federation that two more nodes join after its second round of training."""

    trips = 0

    def roster(self) -> list[NodeRef]:
        nodes = super().roster()
        return nodes if self.trips > 2 else [nodes[0], *nodes[3:]]

    def stream(self, messages: Any, timeout: float | None = None) -> Any:
        self.trips += 1
        return super().stream(messages, timeout)


@pytest.mark.parametrize("private", [False, True])
def test_nodes_that_come_later_join_a_plain_run_and_wait_for_the_end_of_a_private_one(
    slope: Federation, tmp_path: Path, private: bool
) -> None:
    @dataclass(frozen=True)
    class Promising(PlusOne):
        def claim(self, facts: Any) -> Claim:  # noqa: ARG002
            return Claim(GaussianDpEvent(1.0), "client", ADD_OR_REMOVE, "model-user")

    stack = Stack([Promising() if private else PlusOne()])
    notes: list[str] = []

    class Watch(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    options = slope.complete({"rounds": 4, "client-eval-every": -1})
    job = replace(slope.job(options, 3), stack=stack)
    run = RunDirectory.create(None, "x", {}, out=tmp_path / "run")
    with Growing(slope.client_app(), 5, run_config=options) as grid:
        Rounds(job, grid, grid.roster(), run, Watch()).fit()
    clients = [line["clients"] for line in run.rounds() if line["round"]]
    told = " ".join(notes)
    if private:
        assert clients == [3, 3, 3, 3]
        assert told.count("takes part from the next run on") == 2 and "counts on 3 nodes" in told
    else:
        assert clients == [3, 3, 3, 5]
        assert "joined the run: 1, 2; there are 5 nodes now" in told
