"""One of several trainers: everything is asked of the one that the option names."""

import numpy as np
import pytest
import torch
from torch import nn

from umbel.clients.chosen_trainer import ChosenTrainer, bundling
from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.one_step import OneStep
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job
from umbel.core.errors import ConfigError

many, one = TorchTrainer(lambda: nn.Linear(3, 2)), OneStep(TorchTrainer(lambda: nn.Linear(3, 2)))
either = ChosenTrainer("how", {"many": many, "one": one})


def given(how: str) -> dict[str, bool | int | float | str]:
    return {**either.OPTIONS, "how": how, "seed": 0}


@pytest.mark.parametrize(("how", "trainer"), [("many", many), ("one", one)])
def test_the_option_names_who_trains(how: str, trainer: TorchTrainer | OneStep) -> None:
    options = given(how)
    start = either.initial(options, 3)
    x = Examples(np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]))
    job = Job(1, 5, options)
    found, expected = either.train(start, x, job), trainer.train(start, x, job)
    for name, value in expected.weights.parameters.items():
        assert torch.equal(found.weights.parameters[name], value)
    assert either.evaluate(start, x, options) == trainer.evaluate(start, x, options)


def test_what_the_chosen_one_cannot_do_is_not_done() -> None:
    assert bundling(either, given("one")) is one
    with pytest.raises(ConfigError, match="as one bundle"):
        bundling(either, given("many"))
    assert either.group_size(given("one")) == 1
    assert either.group_size(given("many")) == many.group_size(given("many"))
    start = either.initial(given("one"), 0)
    assert either.train_cohort([start], [None], [Job(1, 0, given("one"))]) is None


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="how is 'two'; it can be many, one"):
        either.initial(given("two"), 0)
