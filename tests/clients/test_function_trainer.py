"""Plain functions of arrays as a trainer."""

from typing import Any

import numpy as np
import pytest
import torch

from umbel.clients.data.examples import Examples
from umbel.clients.trainers import function as function_trainer
from umbel.clients.trainers.base import Job, Options
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError
from umbel.testing import check_trainer

EXAMPLES = Examples(np.arange(4.0), np.array([1.0, 3.0, 5.0, 7.0]))


def initial(options: Options) -> dict[str, Any]:
    return {"line": np.array([float(options["slope"]), 0.0]), "calls": np.array(0)}


def train(arrays: dict[str, Any], examples: Examples, job: Job) -> Any:
    slope, offset = arrays["line"]
    error = slope * examples.x + offset - examples.y
    step = np.array([(error * examples.x).mean(), error.mean()])
    arrays["line"] -= job.options["rate"] * step
    arrays["calls"] += 1
    return arrays, len(examples), {"loss": (error**2).mean(), "noise": np.random.rand()}


def evaluate(arrays: dict[str, Any], examples: Examples) -> dict[str, float]:
    slope, offset = arrays["line"]
    return {"loss": float(((slope * examples.x + offset - examples.y) ** 2).mean())}


TRAINER = FunctionTrainer(initial, train, evaluate, options={"rate": 0.2, "slope": 0.0})


def test_training_finds_the_line() -> None:
    weights = TRAINER.initial({}, 0)
    for number in range(1, 200):
        weights = TRAINER.train(weights, EXAMPLES, Job(number, number, {})).weights
    np.testing.assert_allclose(weights.parameters["line"].numpy(), [2.0, 1.0], atol=1e-3)
    assert weights.buffers["calls"].item() == 199
    assert weights.buffers["calls"].dtype == torch.int64
    assert TRAINER.evaluate(weights, EXAMPLES, {}).metrics["loss"] < 1e-5


def test_a_job_is_repeatable_and_leaves_no_trace() -> None:
    weights = TRAINER.initial({"slope": 3.0}, 0)
    assert weights.parameters["line"].tolist() == [3.0, 0.0]
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    one = TRAINER.train(weights, EXAMPLES, Job(1, 7, {}))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    np.random.rand(5)
    other = TRAINER.train(weights, EXAMPLES, Job(1, 7, {}))
    assert one.metrics == other.metrics
    assert weights.parameters["line"].tolist() == [3.0, 0.0]
    assert one.examples == 4


@pytest.mark.parametrize(
    ("answer", "cure"),
    [
        (({"line": np.zeros(2)}, 4, {}), "return all of them"),
        (({"line": np.zeros(3), "calls": 0}, 4, {}), "shapes have to stay"),
        (({"line": np.zeros(2), "calls": 0}, 0, {}), "needs one"),
        (({"line": ["a", "b"], "calls": 0}, 4, {}), "use numbers"),
        (None, "three values"),
    ],
)
def test_a_wrong_answer_is_a_sentence(answer: Any, cure: str) -> None:
    trainer = FunctionTrainer(lambda _: {"line": np.zeros(2), "calls": 0}, lambda *_: answer)
    with pytest.raises(ConfigError, match=cure):
        trainer.train(trainer.initial({}, 0), EXAMPLES, Job(1, 1, {}))


def test_a_model_without_real_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        FunctionTrainer(lambda _: {"n": 1}, train).initial({}, 0)
    with pytest.raises(ConfigError, match="a dict of names"):
        FunctionTrainer(lambda _: np.zeros(2), train).initial({}, 0)  # type: ignore[arg-type, return-value]
    assert (
        FunctionTrainer(initial, train)
        .evaluate(TRAINER.initial({"slope": 1.0}, 0), EXAMPLES, {})
        .metrics
        == {}
    )


def test_whether_all_are_finite_is_told_also_where_their_sum_is_not() -> None:
    huge = torch.full((4,), 3e38)
    bad = (np.inf, -np.inf, np.nan)
    assert function_trainer._finite(huge)
    assert function_trainer._finite(torch.tensor([1 + 2j, 3.0]))
    assert not any(function_trainer._finite(torch.tensor([1.0, value])) for value in bad)
    assert not function_trainer._finite(torch.tensor([np.inf, -np.inf]))
    assert not function_trainer._finite(torch.tensor([complex(0.0, np.nan), 1.0]))


def _carrying(arrays: Any, examples: Any, job: Job) -> Any:  # noqa: ARG001
    return {"w": arrays["w"] + 1, "bn/moving_mean": arrays["bn/moving_mean"] + 2}, 5, {}


def _first(_: Any) -> Any:
    return {"w": np.zeros(2), "bn/moving_mean": np.zeros(3)}


def test_carried_state_is_no_parameter() -> None:
    trainer = FunctionTrainer(_first, _carrying, state=["*moving_mean"])
    first = trainer.initial({}, 0)
    assert list(first.parameters) == ["w"]
    assert list(first.buffers) == ["bn/moving_mean"]
    trained = trainer.train(first, range(5), Job(1, 1, {})).weights
    assert trained.parameters["w"].tolist() == [1, 1]
    assert trained.buffers["bn/moving_mean"].tolist() == [2, 2, 2]
    assert trainer.statistics({}) == ("bn/moving_mean",)
    assert FunctionTrainer(_first, _carrying).statistics({}) == ()
    check_trainer(trainer, range(5))


def test_state_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"state names 'moving_var'.*w, bn/moving_mean"):
        FunctionTrainer(_first, _carrying, state=["moving_var"]).initial({}, 0)
    with pytest.raises(ConfigError, match="a list of names"):
        FunctionTrainer(_first, _carrying, state="w")
    with pytest.raises(ConfigError, match="nothing to train"):
        FunctionTrainer(_first, _carrying, state=["*"]).initial({}, 0)
