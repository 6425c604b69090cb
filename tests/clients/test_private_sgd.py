"""DP-SGD inside a node: the noise is what was promised, the ledger is charged, the budget holds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.node_ledger import StateLedger
from umbel.clients.private_sgd import PrivateSgd
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainer import Job, Options, Weights
from umbel.privacy.budget.accounting import epsilon as epsilon_of
from umbel.privacy.budget.accounting import poisson
from umbel.privacy.budget.events import Charge
from umbel.strategies.errors import ConfigError, RunError


def linear() -> nn.Module:
    return nn.Linear(20, 2)


def _options(trainer: PrivateSgd, **changes: Any) -> Options:
    return {"rounds": 4, **trainer.OPTIONS, "batch-size": 50, **changes}


def _examples(count: int = 200, seed: int = 0) -> Examples:
    source = np.random.default_rng(seed)
    x = source.normal(size=(count, 20)).astype(np.float32)
    return Examples(x, (x[:, 0] > 0).astype(np.int64))


def _job(options: Options, memory: RecordDict | None = None, number: int = 1) -> Job:
    return Job(number, 7, options, memory=memory if memory is not None else RecordDict())


def _flat(weights: Weights) -> torch.Tensor:
    return torch.cat([p.flatten() for p in weights.parameters.values()])


def test_a_round_charges_the_nodes_own_ledger() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear))
    options, memory = _options(trainer, **{"local-epochs": 2}), RecordDict()
    start = trainer.initial(options, 0)
    trained = trainer.train(start, _examples(), _job(options, memory))
    plan = trainer.schedule(200, options)
    assert (plan.sampling_rate, plan.steps) == (0.25, 8)
    assert StateLedger(memory).spent("record") == {Charge(poisson(plan.noise_multiplier, 0.25)): 8}
    expected = epsilon_of(plan.noise_multiplier, 0.25, 8, 1e-5)
    assert trained.metrics == {"example-epsilon": pytest.approx(expected, rel=0.02)}
    assert trained.examples == 200


def test_all_planned_rounds_fit_the_budget_and_no_further_one_does() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear), example_epsilon=2.0)
    options, memory = _options(trainer), RecordDict()
    weights, spent = trainer.initial(options, 0), 0.0
    for number in range(1, 5):
        result = trainer.train(weights, _examples(), _job(options, memory, number))
        weights, spent = result.weights, result.metrics["example-epsilon"]
    assert 1.9 < spent <= 2.0
    before = StateLedger(memory).spent("record")
    with pytest.raises(RunError, match="takes no further part"):
        trainer.train(weights, _examples(), _job(options, memory, 5))
    assert StateLedger(memory).spent("record") == before
    assert StateLedger(memory).participations("record") == 4


def test_the_noise_has_the_promised_deviation() -> None:
    """Gradients are zero where targets cannot be improved; what moves the model is noise."""
    trainer = PrivateSgd(
        trainer=TorchTrainer(lambda: nn.Linear(2000, 1), loss="mse"),
        example_norm=0.5,
        example_noise=3.0,
    )
    options = _options(trainer, **{"local-steps": 1, "learning-rate": 1.0})
    start = Weights({"weight": torch.zeros(1, 2000), "bias": torch.zeros(1)})
    silent = Examples(np.zeros((200, 2000), np.float32), np.zeros(200, np.float32))
    moved = _flat(trainer.train(start, silent, _job(options)).weights)
    # 2,001 draws: a relative error beyond 0.085 has probability below 1e-6.
    assert float(moved.std()) == pytest.approx(3.0 * 0.5 / 50, rel=0.085)
    assert abs(float(moved.mean())) < 5.5 * 0.03 / math.sqrt(2001)


def test_without_noise_to_speak_of_it_is_sgd_on_clipped_gradients() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear), example_norm=1e3, example_noise=1e-6)
    options = _options(trainer, **{"batch-size": 0, "local-steps": 3, "learning-rate": 0.5})
    start = trainer.initial(options, 1)
    private = trainer.train(start, _examples(), _job(options)).weights
    plain = trainer.trainer.train(start, _examples(), _job(options)).weights
    assert torch.allclose(_flat(private), _flat(plain), atol=1e-4)


def test_a_seeded_run_repeats_and_says_that_it_is_not_private() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear))
    seeded = _options(trainer, **{"insecure-noise-seed": 3})
    start = trainer.initial(seeded, 0)
    one, two = (trainer.train(start, _examples(), _job(seeded)) for _ in range(2))
    assert torch.equal(_flat(one.weights), _flat(two.weights))
    assert one.metrics["example-epsilon"] == math.inf
    free = trainer.train(start, _examples(), _job(_options(trainer))).weights
    other = trainer.train(start, _examples(), _job(_options(trainer))).weights
    assert not torch.equal(_flat(free), _flat(other))


def test_it_learns() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear), example_epsilon=4.0)
    changes = {"learning-rate": 0.5, "insecure-noise-seed": 1}
    options, memory = _options(trainer, **changes), RecordDict()
    weights = trainer.initial(options, 0)
    for number in range(1, 5):
        weights = trainer.train(weights, _examples(2000), _job(options, memory, number)).weights
    accuracy = trainer.evaluate(weights, _examples(1000, seed=1), options).metrics["accuracy"]
    assert accuracy > 0.8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"example-epsilon": 0.0}, "above 0"),
        ({"example-epsilon": math.inf}, "finite"),
        ({"example-delta": 1.0}, "between 0 and 1"),
        ({"example-norm": -1.0}, "above 0"),
        ({"example-noise": -1.0}, "example-noise"),
        ({"example-delta": 1e-300, "example-epsilon": 1e-9}, "no noise meets"),
    ],
)
def test_bad_values_are_one_sentence(changes: dict[str, float], said: str) -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear))
    with pytest.raises(ConfigError, match=said):
        trainer.train(
            trainer.initial(_options(trainer), 0), _examples(), _job(_options(trainer, **changes))
        )


def test_models_that_mix_examples_are_refused() -> None:
    trainer = PrivateSgd(
        trainer=TorchTrainer(lambda: nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 2)))
    )
    options = _options(trainer)
    with pytest.raises(ConfigError, match="GroupNorm"):
        trainer.train(trainer.initial(options, 0), _examples(), _job(options))


def test_a_loss_without_single_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="each record"):
        PrivateSgd(trainer=TorchTrainer(linear, loss=nn.MultiMarginLoss()))
