"""One step a node: the gradient of its mean loss; a bundle is what its nodes do alone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from umbel.clients.data.examples import Examples, Shares
from umbel.clients.pytorch.one_step import PIECE, OneStep
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Weights
from umbel.core.errors import ConfigError

OPTIONS = {"learning-rate": 0.5, "seed": 0}
JOB = Job(1, 0, OPTIONS, learning_rate=2.0)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 3, 3, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


@pytest.fixture
def trainer() -> OneStep:
    return OneStep(TorchTrainer(small_net))


@pytest.fixture
def examples() -> Examples:
    source = np.random.default_rng(3)
    count = 2 * PIECE + 9
    return Examples(
        source.normal(size=(count, 36)).astype(np.float32), source.integers(0, 4, count)
    )


def flat(weights: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in weights.parameters.values()])


def test_a_step_is_the_gradient_of_the_loss(trainer: OneStep, examples: Examples) -> None:
    start = trainer.initial(OPTIONS, 1)
    module = small_net()
    module.load_state_dict(start.parameters)
    x, y = torch.as_tensor(examples.x), torch.as_tensor(examples.y)
    cross_entropy(module(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    trained = trainer.train(start, examples, JOB)
    assert trained.examples == len(examples)
    torch.testing.assert_close(flat(trained.weights) - flat(start), -2.0 * expected)


def test_a_bundle_is_what_its_nodes_do_alone(trainer: OneStep, examples: Examples) -> None:
    start = trainer.initial(OPTIONS, 1)
    rows = torch.cat([bundle.values for bundle in trainer.bundles(start, examples, JOB)])
    assert len(rows) == len(examples)
    for i in (0, PIECE - 1, PIECE, len(examples) - 1):
        alone = trainer.train(start, examples.take(slice(i, i + 1)), JOB)
        torch.testing.assert_close(rows[i], flat(alone.weights) - flat(start), atol=1e-6, rtol=1e-4)


def test_nodes_with_several_examples_send_the_mean_of_their_steps(
    trainer: OneStep, examples: Examples
) -> None:
    start, each = trainer.initial(OPTIONS, 1), 7
    shares = Shares(examples.x[:70], examples.y[:70], each)
    rows = torch.cat([bundle.values for bundle in trainer.bundles(start, shares, JOB)])
    assert len(rows) == 10
    alone = trainer.train(start, examples.take(slice(21, 28)), JOB)
    torch.testing.assert_close(rows[3], flat(alone.weights) - flat(start), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_broken_example_moves_the_sum_by_one_norm_at_most(
    trainer: OneStep, examples: Examples, bad: float
) -> None:
    start, norm = trainer.initial(OPTIONS, 1), 0.1

    def total(rows: Examples) -> Tensor:
        bundles = trainer.bundles(start, rows, JOB)
        return torch.stack([bundle.clipped(norm).total() for bundle in bundles]).sum(0)

    x = np.array(examples.x)
    x[5] = bad
    rest = [i for i in range(len(x)) if i != 5]
    moved = total(Examples(x, examples.y)) - total(examples.take(rest))
    assert float(moved.norm()) <= norm


def test_what_cannot_be_bounded_is_refused() -> None:
    mixing = OneStep(TorchTrainer(lambda: nn.Sequential(nn.BatchNorm1d(36), nn.Linear(36, 4))))
    x = Examples(np.zeros((2, 36), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ConfigError, match="GroupNorm"):
        mixing.train(mixing.initial(OPTIONS, 0), x, JOB)
    with pytest.raises(ConfigError, match="no examples"):
        mixing.train(mixing.initial(OPTIONS, 0), x.take(slice(0, 0)), JOB)
    with pytest.raises(ConfigError, match="only their mean"):
        OneStep(TorchTrainer(small_net, loss=lambda outputs, targets: (outputs - targets).sum()))
