"""What the PyTorch trainer takes, and the sentence for what it does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.clients.tasks import classes, close, job, linear, same
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Options, Trained
from umbel.core.errors import ConfigError, RunError


class Pairs(Dataset[tuple[Tensor, int]]):
    """A map-style data set with a random augmentation."""

    def __init__(self, examples: Examples, noise: float = 0.0) -> None:
        self.examples, self.noise = examples, noise

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        x = torch.as_tensor(self.examples.x[row])
        return x + self.noise * torch.randn(x.shape), int(self.examples.y[row])


def test_arrays_tensors_and_data_sets_are_alike() -> None:
    trainer = TorchTrainer(linear, batch_size=4)
    weights = trainer.initial({}, 1)
    examples = classes(11)
    arrays = trainer.train(weights, examples, job())
    tensors = Examples(torch.as_tensor(examples.x), torch.as_tensor(examples.y))
    assert same(trainer.train(weights, tensors, job()).weights, arrays.weights)
    assert same(trainer.train(weights, (examples.x, examples.y), job()).weights, arrays.weights)
    assert same(trainer.train(weights, Pairs(examples), job()).weights, arrays.weights)
    noisy = [trainer.train(weights, Pairs(examples, 0.5), job()).weights for _ in range(2)]
    assert same(*noisy)
    assert not same(noisy[0], arrays.weights)
    assert trainer.evaluate(weights, Pairs(examples), {}) == trainer.evaluate(weights, tensors, {})


def test_mapped_pixels_are_scaled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 6), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    y = classes(10).y
    trainer = TorchTrainer(linear, batch_size=4)
    weights = trainer.initial({}, 1)
    one = trainer.train(weights, Examples(mapped, y), job())
    other = trainer.train(weights, Examples(pixels.astype(np.float32) / 255, y), job())
    close(one.weights, other.weights)
    np.testing.assert_array_equal(pixels, mapped)


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.dtype(">f4"), np.int32])
def test_inputs_of_any_numeric_type(kind: Any) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(18, 3))

    x = np.random.default_rng(0).integers(0, 4, (9, 6))
    trainer = TorchTrainer(model if kind is np.int32 else linear)
    weights = trainer.initial({}, 1)
    examples = Examples(x.astype(kind)[::-1], classes(9).y.astype(np.uint8))
    assert trainer.train(weights, examples, job()).examples == 9


def test_regression_is_judged_by_rmse_and_r2() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 6))
    y = x @ np.arange(6.0) + 2 + 0.1 * rng.normal(size=700)
    trainer = TorchTrainer(lambda: nn.Linear(6, 1), "mse", learning_rate=0.05, local_epochs=5)
    weights = trainer.initial({}, 1)
    trained = trainer.train(weights, Examples(x, y), job()).weights
    result = trainer.evaluate(trained, Examples(x, y), {})
    predicted = x @ trained.parameters["weight"].numpy()[0] + trained.parameters["bias"].item()
    assert result.examples == 700
    assert result.metrics["loss"] == pytest.approx(((predicted - y) ** 2).mean(), rel=1e-3)
    assert result.metrics["rmse"] == pytest.approx(result.metrics["loss"] ** 0.5, rel=1e-5)
    assert result.metrics["r2"] == pytest.approx(1 - ((predicted - y) ** 2).mean() / y.var(), 1e-3)
    constant = trainer.evaluate(trained, Examples(x, np.ones(700)), {})
    assert "r2" not in constant.metrics


def test_binary_classification() -> None:
    examples = classes(200)
    y = (examples.y > 0).astype(np.int64)
    trainer = TorchTrainer(lambda: nn.Linear(6, 1), "binary-cross-entropy", local_epochs=5)
    trained = trainer.train(trainer.initial({}, 1), Examples(examples.x, y), job()).weights
    assert trainer.evaluate(trained, Examples(examples.x, y), {}).metrics["accuracy"] > 0.8


# --- mistakes


def diverging() -> Trained:
    trainer = TorchTrainer(lambda: nn.Linear(6, 1), "mse", learning_rate=1e20, local_epochs=9)
    return trainer.train(trainer.initial({}, 1), classes(20), job())


def test_divergence_names_the_learning_rate() -> None:
    with pytest.raises(RunError, match=r"diverged at learning-rate=1e\+20"):
        diverging()


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"batch-size": "many"}, "batch-size is 'many'"),
        ({"learning-rate": -1.0}, "at least 0"),
        ({"accumulate": 0}, "at least 1"),
        ({"local-epochs": 0}, "both 0"),
        ({"precision": "int4"}, "can be auto, float32"),
        ({"device": "abacus"}, "choose auto"),
        ({"device": "cuda:99"}, "does not have"),
        ({"gpus": 99}, "this node has"),
    ],
)
def test_wrong_options_are_a_sentence(options: Options, cure: str) -> None:
    trainer = TorchTrainer(linear)
    with pytest.raises(ConfigError, match=cure):
        trainer.train(trainer.initial({}, 1), classes(5), Job(1, 1, options))


@pytest.mark.parametrize(
    ("examples", "cure"),
    [
        (Examples(np.zeros((0, 6)), np.zeros(0, int)), "no examples"),
        (Examples(np.zeros((3, 6)), np.zeros(3)), "integer class labels"),
        (Examples(np.zeros((3, 6)), np.array([0, 1, 3])), "from 0 to the number of outputs"),
        (Examples(np.array([["a"] * 6] * 3), np.zeros(3, int)), "give numbers"),
        (iter([]), "that has a length"),
    ],
)
def test_wrong_examples_are_a_sentence(examples: Any, cure: str) -> None:
    trainer = TorchTrainer(linear)
    with pytest.raises(ConfigError, match=cure):
        trainer.train(trainer.initial({}, 1), examples, job())


@pytest.mark.parametrize(
    ("model", "cure"),
    [
        (lambda: "net", "returns a torch.nn.Module"),
        (lambda: nn.LazyLinear(3), "input sizes"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "requires_grad"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_wrong_model_is_a_sentence(model: Any, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        TorchTrainer(model).initial({}, 1)


def test_an_unknown_loss_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="choose one of cross-entropy"):
        TorchTrainer(linear, "hinge")


def test_targets_of_another_shape_are_a_sentence() -> None:
    trainer = TorchTrainer(linear, "mse")
    with pytest.raises(ConfigError, match="one target for each output"):
        trainer.train(trainer.initial({}, 1), classes(5), job())


def test_every_setting_is_an_option() -> None:
    options = TorchTrainer(linear, batch_size=17).OPTIONS
    assert options["batch-size"] == 17
    assert set(options) >= {"learning-rate", "local-steps", "proximal-mu", "accumulate", "gpus"}
