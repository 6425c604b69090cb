"""scikit-learn estimators as federated models."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import (
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    Perceptron,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import LinearSVC

from umbel.clients.data.examples import Examples
from umbel.clients.trainers.base import Job, Trained, Weights
from umbel.clients.trainers.sklearn import SklearnTrainer
from umbel.core.errors import ConfigError


def scaled(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x - x.mean(0)) / (x.std(0) + 1e-9)


CANCER = Examples(scaled(load_breast_cancer().data), load_breast_cancer().target)
DIGITS = Examples(load_digits().data[:600] / 16, load_digits().target[:600])
DIABETES = Examples(scaled(load_diabetes().data), scaled(load_diabetes().target))


def average(results: list[Trained]) -> Weights:
    total = sum(r.examples for r in results)
    names = results[0].weights.parameters
    return Weights(
        {n: sum(r.weights.parameters[n] * (r.examples / total) for r in results) for n in names},  # type: ignore[misc]
        results[0].weights.buffers,
    )


def federated(trainer: SklearnTrainer, examples: Examples, nodes: int, rounds: int) -> Weights:
    weights = trainer.initial({}, 1)
    for number in range(1, rounds + 1):
        parts = [examples.take(slice(i, None, nodes)) for i in range(nodes)]
        weights = average(
            [trainer.train(weights, p, Job(number, i, {})) for i, p in enumerate(parts)]
        )
    return weights


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(C=1.0),
        SGDClassifier(loss="log_loss"),
        SGDClassifier(loss="hinge"),
        Perceptron(),
        RidgeClassifier(),
        LinearSVC(),
        MLPClassifier((16,), learning_rate_init=0.01),
    ],
)
def test_classifiers_learn(estimator: Any) -> None:
    trainer = SklearnTrainer(estimator, features=30, classes=2, local_epochs=3)
    result = trainer.evaluate(federated(trainer, CANCER, 4, 8), CANCER, {})
    assert result.examples == len(CANCER)
    assert result.metrics["accuracy"] > 0.93
    assert result.metrics["loss"] > 0


@pytest.mark.parametrize(
    "estimator",
    [
        LinearRegression(),
        Ridge(),
        ElasticNet(0.01),
        SGDRegressor(),
        MLPRegressor(hidden_layer_sizes=(8,), learning_rate_init=0.01),
    ],
)
def test_regressions_learn(estimator: Any) -> None:
    trainer = SklearnTrainer(estimator, features=10, local_epochs=10)
    metrics = trainer.evaluate(federated(trainer, DIABETES, 3, 10), DIABETES, {}).metrics
    assert metrics["r2"] > 0.4
    assert metrics["loss"] == pytest.approx(metrics["rmse"] ** 2)


def test_one_node_to_convergence_is_scikit_learn_itself() -> None:
    trainer = SklearnTrainer(LogisticRegression(max_iter=500), features=30, classes=2)
    weights = trainer.initial({}, 0)
    job = Job(1, 1, {"local-iterations": 0})
    trained = trainer.train(weights, CANCER, job).weights.parameters
    own = LogisticRegression(max_iter=500).fit(CANCER.x, CANCER.y)
    np.testing.assert_allclose(trained["coef"].numpy(), own.coef_, rtol=1e-6)
    np.testing.assert_allclose(trained["intercept"].numpy(), own.intercept_, rtol=1e-6)
    assert trained["coef"].dtype == torch.float64


def test_iterations_go_on_from_the_weights_that_were_sent() -> None:
    trainer = SklearnTrainer(LogisticRegression(), features=30, classes=2, local_iterations=2)
    weights = trainer.initial({}, 0)
    losses = []
    for number in range(6):
        trained = trainer.train(weights, CANCER, Job(number, 1, {}))
        weights = trained.weights
        losses.append(trained.metrics["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), SGDClassifier(), Perceptron(), LinearSVC(), MLPClassifier((8,))],
)
@pytest.mark.parametrize("held", [[3], [2, 7]])
def test_a_node_may_lack_classes(estimator: Any, held: list[int]) -> None:
    trainer = SklearnTrainer(estimator, features=64, classes=10)
    weights = trainer.initial({}, 1)
    node = DIGITS.take(np.isin(DIGITS.y, held))
    trained = trainer.train(weights, node, Job(1, 1, {}))
    assert trained.examples == len(node)
    for name, value in trained.weights.parameters.items():
        assert value.shape == weights.parameters[name].shape
    result = trainer.evaluate(trained.weights, node, {})
    assert result.metrics["accuracy"] >= (0.9 if isinstance(estimator, LogisticRegression) else 0)


@pytest.mark.parametrize("estimator", [SGDClassifier(), MLPClassifier((8,)), LogisticRegression()])
def test_the_same_job_gives_the_same_bits(estimator: Any) -> None:
    trainer = SklearnTrainer(estimator, features=64, classes=10, local_epochs=2)
    weights = trainer.initial({}, 5)
    before = {name: value.clone() for name, value in weights.parameters.items()}
    one = trainer.train(weights, DIGITS, Job(1, 9, {}))
    trainer.train(one.weights, DIGITS.take(slice(50)), Job(2, 3, {}))
    np.random.rand(3)
    again = SklearnTrainer(estimator, features=64, classes=10, local_epochs=2)
    other = again.train(again.initial({}, 5), DIGITS, Job(1, 9, {}))
    for name, value in one.weights.parameters.items():
        assert torch.equal(value, other.weights.parameters[name])
        assert torch.equal(weights.parameters[name], before[name])


def test_sgd_counts_its_steps_on_the_node() -> None:
    trainer = SklearnTrainer(SGDClassifier(), features=64, classes=10)
    weights = trainer.initial({}, 0)
    assert weights.buffers["steps"].item() == 1
    assert trainer.train(weights, DIGITS, Job(1, 1, {})).weights.buffers["steps"] == 601


def test_a_fitted_estimator_is_where_training_starts() -> None:
    own = LogisticRegression(max_iter=300).fit(CANCER.x, CANCER.y)
    trainer = SklearnTrainer(own)
    assert (trainer.features, trainer.classes) == (30, 2)
    result = trainer.evaluate(trainer.initial({}, 0), CANCER, {})
    assert result.metrics["accuracy"] == own.score(CANCER.x, CANCER.y)


def test_a_rounds_learning_rate_wins() -> None:
    trainer = SklearnTrainer(
        SGDClassifier(learning_rate="constant", eta0=0.5), features=64, classes=10
    )
    assert trainer.OPTIONS["learning-rate"] == 0.5
    weights = trainer.initial({}, 0)
    small = trainer.train(weights, DIGITS, Job(1, 1, {}, learning_rate=1e-9)).weights
    assert small.parameters["coef"].abs().max() < 1e-5
    assert "learning-rate" not in SklearnTrainer(Ridge(), features=3).OPTIONS


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda: SklearnTrainer(Ridge()), "features=N"),
        (lambda: SklearnTrainer(LogisticRegression(), features=3), "classes=N"),
        (lambda: SklearnTrainer(Ridge(), features=3, classes=2), "leave out"),
        (lambda: SklearnTrainer(SGDClassifier(average=True), 3, 2), "average=False"),
        (lambda: SklearnTrainer(MLPClassifier(solver="lbfgs"), 3, 2), "solver='adam'"),
        (lambda: SklearnTrainer(MLPClassifier(early_stopping=True), 3, 2), "early_stopping"),
        (lambda: SklearnTrainer(RandomForestClassifier(4), 3, 2), "no coefficients"),
    ],
)
def test_a_wrong_estimator_is_a_sentence(make: Any, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        make()


@pytest.mark.parametrize(
    ("examples", "cure"),
    [
        (Examples(np.zeros((3, 4)), np.zeros(3)), "features=64"),
        (Examples(np.zeros((3, 64)), np.array([0, 1, 10])), "from 0 to 9"),
        (Examples(np.zeros((3, 64)), np.array([0, 1, 0.5])), "whole numbers"),
        (Examples(np.zeros((0, 64)), np.zeros(0)), "no examples"),
        ([1, 2], "Examples"),
    ],
)
def test_wrong_examples_are_a_sentence(examples: Any, cure: str) -> None:
    trainer = SklearnTrainer(LogisticRegression(), features=64, classes=10)
    with pytest.raises(ConfigError, match=cure):
        trainer.train(trainer.initial({}, 0), examples, Job(1, 1, {}))
