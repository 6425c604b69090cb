"""Softmax regression on features: the step is the gradient, a bundle is its nodes' steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from umbel.clients.data.datasets import DataSet
from umbel.clients.data.examples import Examples, Node, each_of
from umbel.clients.data.features import PART, FeatureMap, PrecomputedFeatures, Rows, features_of
from umbel.clients.trainers.base import Job, Weights
from umbel.clients.trainers.softmax import SoftmaxTrainer
from umbel.privacy.bounds.bundle import UNIT_STEP, Vectors

WIDTH, COUNT = 7, 2 * PART + 300
OPTIONS = {"learning-rate": 2.0, "seed": 0}


@pytest.fixture
def data(tmp_path: Path) -> PrecomputedFeatures:
    source = np.random.default_rng(1)
    x = source.normal(size=(COUNT, WIDTH)).astype(np.float32)
    y = (x[:, :3].argmax(1)).astype(np.uint8)
    held = DataSet("blobs", Examples(x, y), Examples(x[:50], y[:50]))
    return PrecomputedFeatures(held, FeatureMap("blobs", WIDTH, torch.from_numpy), cache=tmp_path)


def _start() -> Weights:
    weight = torch.randn(3, WIDTH + 1, generator=torch.Generator().manual_seed(2))
    return Weights({"weight": weight}, {})


def _job() -> Job:
    return Job(1, 0, OPTIONS, learning_rate=2.0)


def test_a_step_is_the_gradient_of_the_loss(data: PrecomputedFeatures) -> None:
    trainer = SoftmaxTrainer(WIDTH, classes=3)
    examples = data(Node(0, 100, {}), OPTIONS).train
    assert len(examples) == 23
    start = _start()
    weight = start.parameters["weight"].clone().requires_grad_()
    whole = trainer._prepared(features_of(examples), {}).float() * UNIT_STEP
    loss = cross_entropy(whole @ weight.T, torch.as_tensor(examples.y))
    (gradient,) = torch.autograd.grad(loss, weight)
    trained = trainer.train(start, examples, _job())
    moved = trained.weights.parameters["weight"] - start.parameters["weight"]
    assert torch.allclose(moved, -2.0 * gradient, atol=1e-5)
    assert trained.examples == 23
    assert trained.metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_bundle_is_what_its_nodes_do_alone(data: PrecomputedFeatures) -> None:
    trainer, start = SoftmaxTrainer(WIDTH, classes=3), _start()
    members = [3, 5, PART - 1, PART, 2 * PART + 7, COUNT - 1]
    pooled = data.pool(members, COUNT, OPTIONS)
    assert pooled is not None
    bundles = list(trainer.bundles(start, pooled, _job()))
    assert sum(bundle.count for bundle in bundles) == len(members)
    total: Tensor = sum((bundle.total() for bundle in bundles), torch.zeros(()))
    alone = torch.zeros(3, WIDTH + 1)
    for member in members:
        examples = data(Node(member, COUNT, {}), OPTIONS).train
        alone += trainer.train(start, examples, _job()).weights.parameters["weight"]
        alone -= start.parameters["weight"]
    assert torch.allclose(total.view(3, -1).float(), alone, atol=1e-4)


def test_arrays_work_as_well_as_stored_rows(data: PrecomputedFeatures) -> None:
    trainer, start = SoftmaxTrainer(WIDTH, classes=3), _start()
    stored = data.central_test(OPTIONS)
    plain = Examples(features_of(stored).numpy(), stored.y)
    assert isinstance(stored.x, Rows)
    assert trainer.evaluate(start, stored, OPTIONS) == trainer.evaluate(start, plain, OPTIONS)


def test_what_is_prepared_is_kept_for_the_buffers_that_made_it(data: PrecomputedFeatures) -> None:
    def shifted(features: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return features - buffers["shift"]

    trainer = SoftmaxTrainer(WIDTH, classes=3, prepare=shifted)
    stored = data.central_test(OPTIONS)
    results = [
        trainer.evaluate(
            Weights(_start().parameters, {"shift": torch.full((WIDTH,), value)}), stored, OPTIONS
        ).metrics["loss"]
        for value in (0.0, 5.0, 0.0)
    ]
    assert results[0] == results[2] != results[1]


def test_features_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def counted(x: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        made.append(len(x))
        return torch.from_numpy(x)

    x = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)
    held = DataSet("blobs", Examples(x, np.zeros(COUNT)), Examples(x[:5], np.zeros(5)))
    for _ in range(2):
        data = PrecomputedFeatures(held, FeatureMap("blobs", WIDTH, counted), cache=tmp_path)
        rows = data.pool([0, PART, COUNT - 1], COUNT, OPTIONS)
        assert rows is not None
        assert torch.allclose(features_of(rows), torch.from_numpy(x[[0, PART, -1]]), rtol=1e-3)
    assert made == [PART, PART, 300]


def test_nodes_with_several_examples_are_a_pool_of_equal_shares(data: PrecomputedFeatures) -> None:
    assert data.pool([0], 99, OPTIONS) is None  # 2,300 examples do not divide evenly
    trainer, start, members = SoftmaxTrainer(WIDTH, classes=3), _start(), [4, 99, 0, 57]
    pooled = data.pool(members, 100, OPTIONS)
    assert pooled is not None
    assert each_of(pooled) == 23
    rows = torch.cat([bundle.values for bundle in _vectors(trainer, start, pooled)])
    for row, member in zip(rows, members, strict=True):
        alone = data(Node(member, 100, {}), OPTIONS).train
        after = trainer.train(start, alone, _job()).weights.parameters["weight"]
        step = (after - start.parameters["weight"]).flatten()
        torch.testing.assert_close(row, step, atol=1e-5, rtol=1e-3)


def _vectors(trainer: SoftmaxTrainer, start: Weights, pooled: Examples) -> list[Vectors]:
    found = list(trainer.bundles(start, pooled, _job()))
    assert all(isinstance(bundle, Vectors) for bundle in found)
    return found  # type: ignore[return-value]


def test_every_node_has_its_own_examples(data: PrecomputedFeatures) -> None:
    parts = [data(Node(i, 100, {}), OPTIONS).train for i in range(100)]
    assert sum(len(part) for part in parts) == COUNT
