"""What an app leaves to the options: who trains, and options under their former names."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

import umbel
from umbel import Federation, OneStep, TorchTrainer
from umbel import former as former_names
from umbel.clients.data.examples import Examples
from umbel.clients.given import trainer_of
from umbel.clients.trainers.base import Job, Trainer
from umbel.core.errors import ConfigError
from umbel.core.options import renamed, renaming_notes

MANY = TorchTrainer(lambda: nn.Linear(3, 2), learning_rate=0.3)
ONE = OneStep(TorchTrainer(lambda: nn.Linear(3, 2), learning_rate=0.5))


def chosen(options: Any) -> Trainer:
    trainers: dict[str, Trainer] = {"many": MANY, "one": ONE}
    return trainers[options["how"]]


def data(node: Any, options: Any) -> Examples:  # noqa: ARG001
    x = np.random.default_rng(node.partition).normal(size=(8, 3)).astype(np.float32)
    return Examples(x, (x[:, 0] > 0).astype(np.int64))


either = Federation(chosen, data, options={"how": "many"})


def test_the_options_say_who_trains() -> None:
    many, one = either.complete({}), either.complete({"how": "one"})
    assert either.trainer_for(many) is MANY and either.trainer_for(one) is ONE
    assert (many["learning-rate"], one["learning-rate"]) == (0.3, 0.5)
    assert "local-epochs" in many and "local-epochs" not in one
    start, x = ONE.initial(one, 3), data(umbel.Node(0, 1, {}), one)
    found = either.trainer_for(one).train(start, x, Job(1, 5, one))
    expected = ONE.train(start, x, Job(1, 5, one))
    assert found.weights.parameters.keys() == expected.weights.parameters.keys()


def test_what_only_the_other_trainer_knows_follows_the_choice() -> None:
    many = either.complete({})
    one = either.override(many, {"how": "one"})
    assert one["learning-rate"] == 0.5 and "local-epochs" not in one
    back = either.override(one, {"how": "many", "local-epochs": 3})
    assert (back["learning-rate"], back["local-epochs"]) == (0.3, 3)
    mine = either.override(either.complete({"learning-rate": 0.01}), {"how": "one"})
    assert mine["learning-rate"] == 0.01, "what is given stays"


def test_a_function_that_gives_no_trainer_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"trainer is the function chosen, .* KeyError"):
        either.complete({"how": "none"})

    def network() -> nn.Module:
        return nn.Linear(3, 2)

    def model(options: Any) -> Any:  # noqa: ARG001
        return nn.Linear(3, 2)

    for wrong, words in ((network, r"TorchTrainer\(network\)"), (model, "it gave a Linear")):
        with pytest.raises(ConfigError, match=words):
            trainer_of(wrong, {})  # type: ignore[arg-type]


def test_the_class_of_earlier_releases_is_such_a_function_now() -> None:
    former = umbel.ChosenTrainer("how", {"many": MANY, "one": ONE})
    federation = replace(either, trainer=former)
    assert federation.trainer_for(federation.complete({"how": "one"})) is ONE
    with pytest.raises(ConfigError, match="how is 'two'; it can be many, one"):
        federation.complete({"how": "two"})


def test_former_names_of_options_are_understood() -> None:
    given = {"tau": 0.5, "federated-every": -1, "federated-nodes": 2, "keep": "best"}
    today = {
        "adaptive-epsilon": 0.5,
        "client-eval-every": -1,
        "client-eval-nodes": 2,
        "keep-model": "best",
    }
    assert renamed(given) == today
    assert renaming_notes(given)[0].startswith("the option tau is now called adaptive-epsilon")
    assert renaming_notes(today) == []
    complete = either.complete(given)
    assert {name: complete[name] for name in today} == today
    changed = either.override(either.complete({}), given)
    assert {name: changed[name] for name in today} == today
    app = replace(either, options={"how": "many", "tau": 0.25})
    assert app.complete({})["adaptive-epsilon"] == 0.25
    with pytest.raises(ConfigError, match="tau and adaptive-epsilon are one option"):
        either.complete({"tau": 0.5, "adaptive-epsilon": 0.1})


def test_former_names_of_the_package_are_understood() -> None:
    for former, today in former_names.NAMES.items():
        assert getattr(umbel, former) is getattr(umbel, today)
    assert replace(either, tuned=lambda _: {"rounds": 4}).complete({})["rounds"] == 4
    assert "Recipe" not in dir(umbel)
