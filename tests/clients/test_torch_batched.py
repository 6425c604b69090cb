"""Nodes trained together get what each would get alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import CohortTrainer, Job, Trained, Weights
from umbel.core.errors import ConfigError


def linear() -> nn.Module:
    return nn.Linear(5, 3)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


def classes(sizes: Sequence[int], seed: int = 0) -> list[Examples]:
    rng = np.random.default_rng(seed)
    return [
        Examples(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, 3, n)) for n in sizes
    ]


def jobs(count: int, **options: Any) -> list[Job]:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return [Job(round=1, seed=100 + i, options=named) for i in range(count)]


def both(
    trainer: TorchTrainer, examples: Sequence[Any], work: Sequence[Job]
) -> tuple[list[Trained], list[Trained]]:
    weights = trainer.initial(work[0].options, 3)
    together = trainer.train_cohort([weights] * len(work), examples, work)
    assert together is not None
    return together, [trainer.train(weights, e, j) for e, j in zip(examples, work, strict=True)]


def assert_same(together: Sequence[Trained], alone: Sequence[Trained]) -> None:
    for one, other in zip(together, alone, strict=True):
        assert one.examples == other.examples
        assert list(one.weights.parameters) == list(other.weights.parameters)
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-4, abs=1e-6)
        for name, value in one.weights.parameters.items():
            torch.testing.assert_close(value, other.weights.parameters[name], rtol=1e-4, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=9),
    batch=st.integers(0, 6),
    epochs=st.integers(1, 3),
    steps=st.sampled_from([0, 0, 1, 5]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.01]),
    mu=st.sampled_from([0.0, 0.5]),
    clip=st.sampled_from([0.0, 0.3]),
    model=st.sampled_from([linear, perceptron]),
)
def test_a_cohort_trains_as_its_nodes_do_alone(
    sizes: list[int],
    batch: int,
    epochs: int,
    steps: int,
    momentum: float,
    decay: float,
    mu: float,
    clip: float,
    model: Callable[[], nn.Module],
) -> None:
    work = jobs(
        len(sizes),
        batched="on",
        batch_size=batch,
        local_epochs=epochs,
        local_steps=steps,
        momentum=momentum,
        weight_decay=decay,
        proximal_mu=mu,
        clip_gradient=clip,
    )
    assert_same(*both(TorchTrainer(model, learning_rate=0.1), classes(sizes), work))


@pytest.mark.parametrize("loss", ["mse", "binary-cross-entropy"])
def test_losses_of_real_targets(loss: str) -> None:
    rng = np.random.default_rng(1)
    examples = [
        Examples(rng.normal(size=(n, 5)), rng.integers(0, 2, n).astype(np.float64))
        for n in (3, 8, 5)
    ]
    trainer = TorchTrainer(lambda: nn.Linear(5, 1), loss, batch_size=4, local_epochs=2)
    assert_same(*both(trainer, examples, jobs(3, batched="on")))


def test_sequences_with_positions_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in (3, 6, 7):
        x = torch.randint(0, 11, (n, 4), generator=generator)
        y = x.roll(1, 1)
        y[:, -1] = -100
        examples.append(Examples(x, y))
    trainer = TorchTrainer(tokens, batch_size=4, learning_rate=0.5)
    assert_same(*both(trainer, examples, jobs(3, batched="on")))


def test_pixels_from_read_only_memory() -> None:
    rng = np.random.default_rng(2)
    examples = []
    for n in (4, 9):
        pixels = rng.integers(0, 256, (n, 5), dtype=np.uint8)
        pixels.flags.writeable = False
        examples.append(Examples(pixels, rng.integers(0, 3, n)))
    assert_same(*both(TorchTrainer(linear, batch_size=4), examples, jobs(2, batched="on")))


def test_convolutions_are_batched_when_asked() -> None:
    trainer = TorchTrainer(convolution, batch_size=3)
    assert_same(*both(trainer, classes([5, 7, 2]), jobs(3, batched="on")))


def test_frozen_parameters_stay() -> None:
    def frozen() -> nn.Module:
        model = perceptron()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    together, alone = both(TorchTrainer(frozen), classes([5, 7]), jobs(2, batched="on"))
    assert_same(together, alone)
    assert list(together[0].weights.buffers) == ["0.weight", "0.bias"]


class Spare(nn.Module):
    """Has a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_parameters_that_are_not_used() -> None:
    trainer = TorchTrainer(Spare, batch_size=3, proximal_mu=0.2, clip_gradient=0.5)
    assert_same(*both(trainer, classes([5, 7, 2]), jobs(3, batched="on")))


def test_one_example_and_one_full_step_is_the_gradient() -> None:
    trainer = TorchTrainer(linear, learning_rate=0.25, batch_size=0)
    examples = classes([1] * 16)
    work = jobs(16)
    weights = trainer.initial({}, 1)
    trained = trainer.train_cohort([weights] * 16, examples, work)
    assert trained is not None
    for node, result in zip(examples, trained, strict=True):
        x, y = torch.as_tensor(node.x), torch.as_tensor(node.y)
        logits = x @ weights.parameters["weight"].T + weights.parameters["bias"]
        error = logits.softmax(1) - nn.functional.one_hot(y, 3)
        expected = weights.parameters["weight"] - 0.25 * error.T @ x
        torch.testing.assert_close(result.weights.parameters["weight"], expected)


def test_the_group_does_not_change_a_node() -> None:
    trainer = TorchTrainer(perceptron, batch_size=4)
    examples, work = classes([9, 4, 13, 6]), jobs(4, batched="on")
    weights = trainer.initial({}, 1)
    whole = trainer.train_cohort([weights] * 4, examples, work)
    half = trainer.train_cohort([weights] * 2, examples[:2], work[:2])
    assert whole is not None
    assert half is not None
    assert_same(whole[:2], half)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x[..., None])[0][:, -1])  # type: ignore[no-any-return]


class Centred(nn.Module):
    """Looks at the whole batch, so padding would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Keeps a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (batch_norm, r"the layer 1 \(BatchNorm1d\)"),
        (dropout, "torch.func cannot batch it"),
        (Recurrent, r"the layer rnn \(LSTM\)"),
        (Centred, "depends on the others of its batch"),
        (Counting, "torch.func cannot batch it"),
    ],
)
def test_models_that_cannot_be_batched_are_left_to_train(
    model: Callable[[], nn.Module], why: str
) -> None:
    trainer = TorchTrainer(model)
    weights = trainer.initial({}, 1)
    state = torch.get_rng_state()
    work = jobs(3, batched="on")
    assert trainer.train_cohort([weights] * 3, classes([5, 7, 6]), work) is None
    assert trainer.train_cohort([weights] * 3, classes([5, 7, 6]), work) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.train(weights, classes([5])[0], jobs(1)[0]).examples == 5
    # What was asked for and cannot be had is said, by every node.
    with pytest.raises(ConfigError, match=f"batched=on cannot be had: .*{why}"):
        trainer.train(weights, classes([5])[0], work[0])


def test_what_does_not_apply() -> None:
    trainer = TorchTrainer(linear)
    weights, other = trainer.initial({}, 1), trainer.initial({}, 2)
    examples = classes([4] * 8)
    start = [weights] * 8
    assert isinstance(trainer, CohortTrainer)
    assert trainer.train_cohort(start, examples, jobs(8)) is not None
    assert trainer.train_cohort(start[:7], examples[:7], jobs(7)) is None
    assert trainer.train_cohort(start, examples, jobs(8, batched="off")) is None
    assert trainer.train_cohort([*start[:7], other], examples, jobs(8)) is None
    pairs = [list(zip(torch.zeros(4, 5), [0] * 4, strict=True))] * 8
    assert trainer.train_cohort(start, pairs, jobs(8)) is None
    adam = TorchTrainer(linear, optimizer=torch.optim.Adam)
    assert adam.train_cohort(start, examples, jobs(8)) is None
    assert TorchTrainer(convolution).train_cohort(start, examples, jobs(8)) is None
    wide = TorchTrainer(lambda: nn.Linear(1 << 16, 3))
    assert wide.train_cohort([Weights({})] * 8, examples, jobs(8)) is None


def test_one_bad_node_does_not_fail_the_others() -> None:
    trainer = TorchTrainer(linear)
    weights, examples = trainer.initial({}, 1), classes([4] * 8)
    examples[3] = Examples(examples[3].x, np.array([0, 1, 2, 7]))
    assert trainer.train_cohort([weights] * 8, examples, jobs(8)) is None
    with pytest.raises(ConfigError, match="class labels go from 0"):
        trainer.train(weights, examples[3], jobs(1)[0])
    examples[3] = classes([4])[0]
    assert trainer.train_cohort([weights] * 8, examples, jobs(8)) is not None


def test_batching_that_was_asked_for_is_refused_before_a_run_where_that_is_known() -> None:
    with pytest.raises(ConfigError, match="an optimizer of its own"):
        TorchTrainer(linear, optimizer=torch.optim.Adam).group_size({"batched": "on"})
    with pytest.raises(ConfigError, match=r"the layer 1 \(BatchNorm1d\)"):
        TorchTrainer(batch_norm).group_size({"batched": "on"})
    assert TorchTrainer(batch_norm).group_size({"batched": "auto"}) == 1
    assert TorchTrainer(linear).group_size({"batched": "on"}) > 1
    pairs = [list(zip(torch.zeros(4, 5), [0] * 4, strict=True))] * 8
    trainer = TorchTrainer(linear)
    work = jobs(8, batched="on")
    assert trainer.train_cohort([trainer.initial({}, 1)] * 8, pairs, work) is None
    with pytest.raises(ConfigError, match="read row by row"):
        trainer.train(trainer.initial({}, 1), pairs[0], work[0])
