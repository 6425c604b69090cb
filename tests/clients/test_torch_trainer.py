"""Local training with PyTorch."""

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.clients.tasks import classes, close, job, linear, same
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.batches import plan
from umbel.clients.pytorch.loop import PlainSgd
from umbel.clients.pytorch.settings import TorchSettings
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Options, Weights
from umbel.core.errors import ConfigError


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A language model with tied input and output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5), False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(x), src_mask=self.mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Dropping, Normed])
def test_the_same_job_gives_the_same_bits_after_any_other_work(
    model: Callable[[], nn.Module],
) -> None:
    examples = classes(23, (6,) if model is Dropping else (1, 4, 4))
    trainer = TorchTrainer(model, batch_size=4, local_epochs=2)
    weights = trainer.initial({}, 3)
    first = trainer.train(weights, examples, job())
    trainer.train(first.weights, examples.take(slice(9)), job(seed=8, momentum=0.9))
    trainer.evaluate(first.weights, examples, {})
    torch.rand(10), np.random.rand(10), random.random()
    assert same(trainer.train(weights, examples, job()).weights, first.weights)
    fresh = TorchTrainer(model, batch_size=4, local_epochs=2)
    assert same(fresh.initial({}, 3), weights)
    assert same(fresh.train(weights, examples, job()).weights, first.weights)
    assert not same(trainer.train(weights, examples, job(seed=8)).weights, first.weights)
    assert not same(trainer.initial({}, 4), weights)


def test_training_leaves_no_trace() -> None:
    trainer = TorchTrainer(Dropping)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr, index]
    weights = trainer.initial({}, 1)
    before = {name: value.clone() for name, value in weights.parameters.items()}
    trained = trainer.train(weights, classes(20), job())
    trainer.evaluate(weights, classes(20), {})
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    kept = {name: value.clone() for name, value in trained.weights.parameters.items()}
    trainer.train(trained.weights, classes(20), job(seed=9))
    for name, value in before.items():
        assert torch.equal(weights.parameters[name], value)
        assert torch.equal(trained.weights.parameters[name], kept[name])


def test_a_trainer_can_be_sent_to_another_process() -> None:
    trainer = TorchTrainer(linear, batch_size=4)
    weights = trainer.initial({}, 1)
    copied = pickle.loads(pickle.dumps(trainer))
    one, other = (t.train(weights, classes(9), job()).weights for t in (trainer, copied))
    assert same(one, other)


# --- the steps


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    batch=st.integers(0, 15),
    epochs=st.integers(1, 3),
    steps=st.integers(0, 12),
    least=st.integers(1, 2),
)
def test_every_epoch_visits_every_example_once(
    size: int, batch: int, epochs: int, steps: int, least: int
) -> None:
    wanted = TorchSettings(batch_size=batch, local_epochs=epochs, local_steps=steps)
    everything = torch.arange(size)
    taken = [everything if r is None else r for r in plan(size, wanted, 5, least=least)]
    per_epoch = sum(1 for _ in plan(size, TorchSettings(batch_size=batch), 5, least=least))
    assert len(taken) == (steps or epochs * per_epoch)
    for start in range(0, len(taken) - per_epoch + 1, per_epoch):
        epoch = torch.cat(taken[start : start + per_epoch])
        assert torch.equal(epoch.sort().values, everything)
    assert all(len(rows) >= min(least, size, batch or size) for rows in taken)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_plain_sgd_is_pytorchs(momentum: float, decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = linear(), linear()
    theirs.load_state_dict(ours.state_dict())
    plain = PlainSgd(list(ours.parameters()), 0.1, momentum, decay)
    reference = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=decay)
    for _ in range(5):
        x = torch.randn(4, 6)
        for module, optimizer in ((ours, plain), (theirs, reference)):
            optimizer.zero_grad()  # type: ignore[attr-defined]
            module(x).square().sum().backward()
            optimizer.step()  # type: ignore[attr-defined]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_full_batch_step_is_gradient_descent() -> None:
    examples = classes(12)
    trainer = TorchTrainer(linear, batch_size=0)
    weights = trainer.initial({}, 2)
    trained = trainer.train(weights, examples, job(learning_rate=0.3, learning_rate_=9))
    module = linear()
    module.load_state_dict(weights.parameters)
    x, y = torch.as_tensor(examples.x), torch.as_tensor(examples.y)
    loss = nn.functional.cross_entropy(module(x), y)
    loss.backward()
    assert trained.metrics["loss"] == pytest.approx(loss.item())
    for name, parameter in module.named_parameters():
        expected = weights.parameters[name] - 0.3 * parameter.grad  # type: ignore[operator]
        torch.testing.assert_close(trained.weights.parameters[name], expected)


@settings(max_examples=15, deadline=None)
@given(mu=st.floats(0.01, 5.0), rate=st.floats(0.01, 0.3))
def test_the_proximal_term_pulls_to_the_model_that_was_sent(mu: float, rate: float) -> None:
    examples = classes(10)
    trainer = TorchTrainer(linear, batch_size=0, learning_rate=rate)
    start = trainer.initial({}, 2)
    one = trainer.train(start, examples, job(local_steps=1)).weights.parameters
    plain = trainer.train(start, examples, job(local_steps=2)).weights.parameters
    pulled = trainer.train(start, examples, job(local_steps=2, proximal_mu=mu)).weights.parameters
    for name, first in start.parameters.items():
        expected = plain[name] - rate * mu * (one[name] - first)
        torch.testing.assert_close(pulled[name], expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 30), batch=st.integers(0, 12), parts=st.integers(1, 15))
def test_accumulated_batches_are_whole_batches(size: int, batch: int, parts: int) -> None:
    trainer = TorchTrainer(linear, batch_size=batch, local_epochs=2, learning_rate=0.2)
    weights = trainer.initial({}, 1)
    whole = trainer.train(weights, classes(size), job(momentum=0.5))
    parted = trainer.train(weights, classes(size), job(momentum=0.5, accumulate=parts))
    close(whole.weights, parted.weights)
    assert parted.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


def test_the_gradient_is_limited() -> None:
    trainer = TorchTrainer(linear, batch_size=0, learning_rate=1.0)
    weights = trainer.initial({}, 1)
    trained = trainer.train(weights, classes(10), job(clip_gradient=0.01)).weights
    moved = [trained.parameters[n] - weights.parameters[n] for n in weights.parameters]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_any_optimizer_and_any_loss() -> None:
    def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)

    def top_two(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"top-two": (outputs.topk(2).indices == targets[:, None]).any(1).float().mean()}

    trainer = TorchTrainer(
        linear, smoothed, torch.optim.Adam, top_two, learning_rate=0.05, local_epochs=10
    )
    weights = trainer.initial({}, 1)
    trained = trainer.train(weights, classes(60), job())
    before, after = (trainer.evaluate(w, classes(60), {}) for w in (weights, trained.weights))
    assert after.metrics["loss"] < before.metrics["loss"]
    assert after.metrics["top-two"] > before.metrics["top-two"]
    with pytest.raises(ConfigError, match="optimizer of its own"):
        trainer.train(weights, classes(6), job(momentum=0.5))


# --- models


@pytest.mark.parametrize("model", [Recurrent, Transformer])
def test_models_of_sequences_train(model: Callable[[], nn.Module]) -> None:
    x = torch.randint(0, 9, (60, 5), generator=torch.Generator().manual_seed(1))
    y = x[:, -1] % 3 if model is Recurrent else x.roll(1, 1)
    trainer = TorchTrainer(model, optimizer=torch.optim.Adam, learning_rate=0.02, local_epochs=30)
    weights = trainer.initial({}, 1)
    trained = trainer.train(weights, Examples(x, y), job())
    before, after = (trainer.evaluate(w, Examples(x, y), {}) for w in (weights, trained.weights))
    assert after.metrics["loss"] < 0.7 * before.metrics["loss"]
    assert after.metrics["accuracy"] > before.metrics["accuracy"] + 0.2


def test_tied_weights_travel_once() -> None:
    weights = TorchTrainer(Transformer).initial({}, 1)
    assert "embedding.weight" in weights.parameters
    assert "head.weight" not in {**weights.parameters, **weights.buffers}
    assert not weights.buffers


def test_running_statistics_are_buffers() -> None:
    trainer = TorchTrainer(Normed, batch_size=5)
    weights = trainer.initial({}, 1)
    names = ["layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked"]
    assert list(weights.buffers) == names
    examples = classes(11, (1, 4, 4))
    trained = trainer.train(weights, examples, job()).weights
    assert trained.buffers[names[2]].item() == 2  # the last example joined the second batch
    assert weights.buffers[names[2]].item() == 0
    onwards = trainer.train(trained, examples, job()).weights
    assert onwards.buffers[names[2]].item() == 4
    unsent = trainer.train(Weights(weights.parameters), examples, job()).weights
    assert same(unsent, trained)
    with pytest.raises(ConfigError, match="batch norm needs at least two"):
        TorchTrainer(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))).train(
            Weights(
                {
                    "0.weight": torch.zeros(3, 6),
                    "0.bias": torch.zeros(3),
                    "1.weight": torch.ones(3),
                    "1.bias": torch.zeros(3),
                }
            ),
            classes(1),
            job(),
        )


def test_frozen_parameters_are_carried_not_sent() -> None:
    def tuned() -> nn.Module:
        model = Dropping()
        model.layers[0].requires_grad_(False)
        return model

    trainer = TorchTrainer(tuned)
    weights = trainer.initial({}, 1)
    assert list(weights.parameters) == ["layers.3.weight", "layers.3.bias"]
    assert list(weights.buffers) == ["layers.0.weight", "layers.0.bias"]
    assert same(Weights({}, trainer.initial({}, 2).buffers), Weights({}, weights.buffers))
    trained = trainer.train(weights, classes(20), job()).weights
    assert same(Weights({}, trained.buffers), Weights({}, weights.buffers))
    unsent = trainer.train(Weights(weights.parameters), classes(20), job()).weights
    assert same(unsent, trained)
    other = Weights(weights.parameters, {n: v + 1 for n, v in weights.buffers.items()})
    assert not same(trainer.train(other, classes(20), job()).weights, trained)
    assert same(trainer.train(Weights(weights.parameters), classes(20), job()).weights, trained)


def test_a_model_may_be_built_from_the_options() -> None:
    def sized(options: Options) -> nn.Module:
        return nn.Linear(6, int(options["outputs"]))

    trainer = TorchTrainer(sized)
    assert trainer.initial({"outputs": 4}, 1).parameters["weight"].shape == (4, 6)
    weights = trainer.initial({"outputs": 3}, 1)
    assert trainer.train(weights, classes(9), job(outputs=3)).examples == 9
    assert trainer.evaluate(weights, classes(9), {"outputs": 3}).examples == 9
    with pytest.raises(ConfigError, match="do not belong to this model"):
        trainer.train(weights, classes(9), job(outputs=4))


def test_sparse_gradients_go_with_everything_that_shapes_a_gradient() -> None:
    def trained(sparse: bool) -> torch.Tensor:
        trainer = TorchTrainer(
            lambda: nn.Sequential(
                nn.Embedding(20, 4, sparse=sparse), nn.Flatten(), nn.Linear(24, 3)
            )
        )
        source = np.random.default_rng(0)
        examples = Examples(source.integers(0, 20, (40, 6)), source.integers(0, 3, 40))
        shaping = {"momentum": 0.9, "clip-gradient": 1.0, "proximal-mu": 0.1, "weight-decay": 0.01}
        options = {**trainer.OPTIONS, **shaping, "seed": 0, "rounds": 1, "batch-size": 8}
        start = trainer.initial(options, 0)
        return trainer.train(start, examples, Job(1, 0, options)).weights.parameters["0.weight"]

    assert torch.equal(trained(True), trained(False))
