"""Metrics that are not everywhere defined, and those that are no means of batches."""

# ruff: noqa: ARG005 - what is given to a function that a test makes

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from tests.clients.tasks import classes, linear
from tests.fakes import reply
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError
from umbel.server.evaluation import FederatedEvaluation


def judged(metrics: Any, n: int = 600, **more: Any) -> Any:
    trainer = TorchTrainer(linear, metrics=metrics, **more)
    return trainer.evaluate(trainer.initial({}, 1), classes(n), {})


@pytest.mark.parametrize("absent", [{}, {"auc": math.nan}])
def test_a_metric_is_averaged_over_the_batches_that_have_it(absent: dict[str, float]) -> None:
    found = judged(lambda out, y: {"auc": 0.75} if len(y) == 512 else absent)
    assert found.metrics["auc"] == 0.75
    assert found.counted == {"auc": 512}


def test_a_metric_that_no_batch_has_is_not_a_number() -> None:
    found = judged(lambda out, y: {"auc": math.nan})
    assert math.isnan(found.metrics["auc"])
    assert found.counted == {"auc": 0}


def test_a_metric_of_the_whole_set_is_what_the_library_says() -> None:
    def auc(outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {
            "auc": roc_auc_score(targets.numpy(), outputs.softmax(1).numpy(), multi_class="ovr")
        }

    examples = classes(1300)
    trainer = TorchTrainer(linear, metrics=auc, whole=True)
    weights = trainer.initial({}, 1)
    found = trainer.evaluate(weights, examples, {})
    module = trainer.ready(weights, {})
    with torch.no_grad():
        expected = auc(module(torch.as_tensor(examples.x)), torch.as_tensor(examples.y))
    assert found.metrics["auc"] == pytest.approx(expected["auc"], rel=1e-6)
    assert found.counted == {}


def test_left_out_targets_do_not_count() -> None:
    """Half of the second batch is left out (-100): accuracy is of those that are known."""
    y = np.zeros(600, int)
    y[512 + 44 :] = -100
    examples = Examples(np.ones((600, 6), np.float32), y)
    trainer = TorchTrainer(lambda: nn.Linear(6, 3))
    weights = trainer.initial({}, 1)
    found = trainer.evaluate(weights, examples, {})
    known = trainer.evaluate(weights, examples.take(slice(0, 556)), {})
    assert found.metrics["loss"] == pytest.approx(known.metrics["loss"], rel=1e-6)
    assert found.metrics["accuracy"] == known.metrics["accuracy"]
    assert found.counted == {"loss": 556, "accuracy": 556}


def test_a_metric_called_loss_is_the_users() -> None:
    assert judged(lambda out, y: {"loss": 7.0, "a b/c": 1}).metrics == {"loss": 7.0, "a b/c": 1.0}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned None; return a dict"),
        ({"auc": None}, "returned 'auc' as None; a metric is one number"),
        ({"note": "fine"}, "returned 'note' as 'fine'"),
        ({"each": torch.ones(2)}, "returned 'each' as tensor"),
    ],
)
def test_what_is_no_metric_is_a_sentence(returned: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        judged(lambda out, y: returned)
    trainer = FunctionTrainer(
        lambda options: {"w": np.zeros(2)}, lambda *given: None, lambda arrays, examples: returned
    )
    with pytest.raises(ConfigError, match=said):
        trainer.evaluate(trainer.initial({}, 1), [1, 2], {})


def test_over_nodes_a_metric_weighs_what_has_it() -> None:
    rows = [
        {"node": "a", "examples": 100, "loss": 1.0, "recall": 0.5},
        {"node": "b", "examples": 300, "loss": 3.0, "recall": 1.0},
        {"node": "c", "examples": 600, "loss": 2.0, "recall": math.nan},
    ]
    found = FederatedEvaluation(rows, (), [{}, {"recall": 25.0}, {"recall": 0.0}])
    assert found.means() == {"loss": pytest.approx(2.2), "recall": pytest.approx(0.6)}
    assert found.summary()["recall"]["nodes"] == 2
    assert reply(1001, metrics={"num-examples": 1}).has_content()
