"""DP-SGD inside a node: the noise is what was promised, the ledger is charged, the budget holds."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.ledger.node_ledger import StateLedger
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Options, Weights
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.errors import ConfigError, RunError
from umbel.privacy.budget.accounting import epsilon as epsilon_of
from umbel.privacy.budget.accounting import poisson
from umbel.privacy.budget.events import Charge
from umbel.strategies.objective import Correction


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


class Centred(nn.Module):
    """Mixes the examples of a batch without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(20, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x)
        return self.head(inner - inner.mean(0))


def test_a_model_that_mixes_unseen_is_refused_and_not_charged() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(Centred))
    options, memory = _options(trainer), RecordDict()
    with pytest.raises(ConfigError, match=r"between inner and head.*GroupNorm"):
        trainer.train(trainer.initial(options, 0), _examples(), _job(options, memory))
    assert not memory


def test_layers_that_mix_by_their_kind_are_refused_before_any_message() -> None:
    trainer = PrivateSgd(
        trainer=TorchTrainer(lambda: nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 2)))
    )
    with pytest.raises(ConfigError, match="GroupNorm"):
        trainer.initial(_options(trainer), 0)


class Frozen(nn.Sequential):
    """Batch normalisation that keeps the statistics that it came with."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(20), nn.Linear(20, 2))

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self[0].eval()
        return self


def test_frozen_statistics_are_no_mixing() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(Frozen), example_noise=1e-6, example_norm=1e3)
    options = _options(trainer, **{"batch-size": 0, "local-steps": 2})
    start = trainer.initial(options, 1)
    private = trainer.train(start, _examples(), _job(options)).weights
    plain = trainer.trainer.train(start, _examples(), _job(options)).weights
    assert torch.allclose(_flat(private), _flat(plain), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip-gradient": 1.0},
        {"accumulate": 2},
        {"local-processes": 2},
        {"precision": "bf16"},
        {"batched": "on"},
    ],
)
def test_options_that_would_be_ignored_are_refused(changes: dict[str, Any]) -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(linear))
    start = trainer.initial(_options(trainer), 0)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        trainer.initial(_options(trainer, **changes), 0)
    with pytest.raises(ConfigError, match=next(iter(changes))):  # a node, whoever told it
        trainer.train(start, _examples(), _job(_options(trainer, **changes)))


def test_corrections_are_added_to_noised_gradients() -> None:
    """With hardly any noise and no clipping, DP-SGD is SGD, also with a pull and an offset."""
    trainer = PrivateSgd(trainer=TorchTrainer(linear), example_noise=1e-6, example_norm=1e3)
    options = _options(trainer, **{"batch-size": 0, "local-steps": 3})
    start = trainer.initial(options, 1)
    size = len(_flat(start))
    offset = torch.linspace(-1, 1, size)
    correction = Correction(offset, torch.ones(size), 0.5)
    job = replace(_job(options), correction=correction)
    private = trainer.train(start, _examples(), job)
    plain = trainer.trainer.train(start, _examples(), job)
    assert private.steps == plain.steps == 3
    assert torch.allclose(_flat(private.weights), _flat(plain.weights), atol=1e-4)
    free = trainer.trainer.train(start, _examples(), _job(options)).weights
    assert not torch.allclose(_flat(free), _flat(plain.weights), atol=1e-2)


class Averaging(nn.Linear):
    """A moving average of its inputs, in a buffer."""

    def __init__(self) -> None:
        super().__init__(20, 2)
        self.register_buffer("average", torch.zeros(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.5).add_(x.mean(0) * 0.5)
        return super().forward(x)


def test_statistics_never_travel_beside_hidden_records() -> None:
    trainer = PrivateSgd(trainer=TorchTrainer(Averaging))
    kept, sent = _options(trainer), _options(trainer, buffers="mean")
    start = trainer.initial(kept, 0)
    trained = trainer.train(start, _examples(), _job(kept)).weights
    assert trained.buffers["average"].any()  # which stays on the node
    with pytest.raises(ConfigError, match=r"send average .*buffers=local"):
        trainer.initial(sent, 0)
    with pytest.raises(ConfigError, match=r"send average .*buffers=local"):
        trainer.train(start, _examples(), _job(sent))


def test_the_check_changes_no_seeded_result() -> None:
    """Whether a process has checked the model before or not, the job gives the same bits."""
    options: dict[str, Any] = {"insecure-noise-seed": 3, "local-steps": 2}
    results = []
    for _ in range(2):
        trainer = PrivateSgd(
            trainer=TorchTrainer(
                lambda: nn.Sequential(nn.Linear(20, 4), nn.Dropout(), nn.Linear(4, 2))
            )
        )
        given = _options(trainer, **options)
        start = trainer.initial(given, 0)
        results += [trainer.train(start, _examples(), _job(given)).weights for _ in range(2)]
    assert all(torch.equal(_flat(results[0]), _flat(other)) for other in results)


def test_a_low_precision_model_gets_the_promised_noise() -> None:
    trainer = PrivateSgd(
        trainer=TorchTrainer(lambda: nn.Linear(2000, 1).bfloat16(), loss="mse"),
        example_norm=0.5,
        example_noise=3.0,
    )
    options = _options(trainer, **{"local-steps": 1, "learning-rate": 1.0})
    zeros = {"weight": torch.zeros(1, 2000), "bias": torch.zeros(1)}
    start = Weights({name: value.bfloat16() for name, value in zeros.items()})
    silent = Examples(np.zeros((200, 2000), np.float32), np.zeros(200, np.float32))
    moved = _flat(trainer.train(start, silent, _job(options)).weights).float()
    # 2,001 draws: a relative error beyond 0.085 has probability below 1e-6.
    assert float(moved.std()) == pytest.approx(3.0 * 0.5 / 50, rel=0.085)
