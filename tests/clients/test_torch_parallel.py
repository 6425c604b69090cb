"""A job that several processes share gives what one process gives.

Starting a team takes seconds (each process imports PyTorch), so one team serves most tests.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import MetricRecord, RecordDict
from torch import nn

from tests.clients.tasks import Counting, linear
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.loop import Share
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Weights
from umbel.core.errors import ConfigError, RunError

TEAM = {"local-processes": 2, "device": "cpu"}


def classes(n: int) -> Examples:
    rng = np.random.default_rng(0)
    return Examples(rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n))


@pytest.fixture(scope="module")
def trainer() -> Iterator[TorchTrainer]:
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    trainer = TorchTrainer(partial(nn.Sequential, *layers), learning_rate=0.2)
    yield trainer
    trainer.team.close()


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_a_batch_make_up_its_mean(rows: int, world: int) -> None:
    values = torch.arange(rows, dtype=torch.float64) ** 2
    parts = [Share(rank, world).of(torch.arange(rows)) for rank in range(world)]
    mean = sum(factor * values[mine].mean() for mine, factor in parts) / world
    assert float(mean) == pytest.approx(float(values.mean()))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (23, {"batch-size": 4, "local-epochs": 2}),
        (21, {"batch-size": 5, "momentum": 0.9, "proximal-mu": 0.3, "accumulate": 3}),
        (7, {"batch-size": 0, "local-steps": 3, "clip-gradient": 0.1}),
        (1, {"batch-size": 8}),
    ],
)
def test_two_processes_give_what_one_gives(
    trainer: TorchTrainer, size: int, options: dict[str, Any]
) -> None:
    weights = trainer.initial({}, 1)
    examples = classes(size)
    alone = trainer.train(weights, examples, Job(1, 5, options))
    shared = trainer.train(weights, examples, Job(1, 5, options | TEAM))
    assert shared.examples == size
    assert shared.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
    for name, value in alone.weights.parameters.items():
        torch.testing.assert_close(shared.weights.parameters[name], value, rtol=1e-5, atol=1e-6)


def test_examples_are_sent_once_and_results_repeat(trainer: TorchTrainer) -> None:
    weights, examples = trainer.initial({}, 1), classes(9)
    one, other = (trainer.train(weights, examples, Job(1, 5, TEAM)).weights for _ in range(2))
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name])
    fewer = trainer.train(weights, examples.take(slice(4)), Job(1, 5, TEAM))
    assert fewer.examples == 4


def test_what_a_trainer_keeps_of_its_node_goes_round_with_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # for the processes of the team
    weights, examples = Counting(linear).initial({}, 1), classes(8)

    def thrice(options: dict[str, Any]) -> tuple[RecordDict, Weights]:
        trainer, memory, now = Counting(linear), RecordDict(), weights
        for number in (1, 2, 3):
            now = trainer.train(now, examples, Job(number, 5, options, memory=memory)).weights
        trainer.team.close()
        return memory, now

    (alone, one), (shared, other) = thrice({}), thrice(TEAM)
    assert alone == shared == RecordDict({"own": MetricRecord({"n": 3})})
    for name, value in one.parameters.items():
        torch.testing.assert_close(other.parameters[name], value, rtol=1e-5, atol=1e-6)


def test_a_mistake_or_a_death_ends_the_team_and_the_next_job_starts_another(
    trainer: TorchTrainer,
) -> None:
    weights = trainer.initial({}, 1)
    wrong = Examples(classes(4).x, np.array([0, 1, 2, 9]))
    with pytest.raises(ConfigError, match="class labels go from 0"):
        trainer.train(weights, wrong, Job(1, 5, TEAM))
    assert trainer.team._group is None
    assert trainer.train(weights, classes(4), Job(1, 5, TEAM)).examples == 4
    group = trainer.team._group
    assert group is not None
    process = group.ranks[1].process
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not group.serves(2, False)
    with pytest.raises(RunError, match="process 1 of the 2 that train together died"):
        group.train(weights, classes(4), Job(1, 5, TEAM))


def test_a_team_is_not_batched(trainer: TorchTrainer) -> None:
    weights = trainer.initial({}, 1)
    assert trainer.train_cohort([weights] * 9, [classes(4)] * 9, [Job(1, 5, TEAM)] * 9) is None


def test_what_cannot_be_imported_elsewhere_is_a_sentence() -> None:
    trainer = TorchTrainer(lambda: nn.Linear(6, 3))
    with pytest.raises(ConfigError, match="top level of a module"):
        trainer.train(Weights({}), classes(4), Job(1, 5, TEAM))
