"""Learning-rate schedules start at 1, end where they should, and never leave [gamma, 1]."""

import doctest
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.core.errors import ConfigError
from umbel.strategies import schedules
from umbel.strategies.run_options import RunOptions
from umbel.strategies.schedules import checked_rate, factor

NAMES = ("constant", "cosine", "linear", "step", "exponential")


@given(
    st.sampled_from(NAMES),
    st.integers(1, 50),
    st.integers(0, 10),
    st.floats(0.0, 1.0),
    st.integers(1, 9),
)
def test_after_the_warmup_it_falls_from_one(
    name: str, rounds: int, warmup: int, gamma: float, every: int
) -> None:
    values = [
        factor(name, n, rounds + warmup, gamma=gamma, every=every, warmup=warmup)
        for n in range(1, rounds + warmup + 1)
    ]
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(rising) and all(0 < value < 1 for value in rising)
    assert falling[0] == 1.0
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    least = gamma if name in ("cosine", "linear") else 0.0
    assert all(least - 1e-12 <= value <= 1.0 for value in falling)


def test_known_values() -> None:
    def at(name: str, number: int, **changes: float) -> float:
        given_ = {"gamma": 0.5, "every": 2, "warmup": 0} | changes
        return factor(name, number, 10, **given_)  # type: ignore[arg-type]

    assert [at("step", n) for n in range(1, 6)] == [1, 1, 0.5, 0.5, 0.25]
    assert [at("exponential", n) for n in range(1, 4)] == [1, 0.5, 0.25]
    assert at("linear", 6, gamma=0.0) == 0.5
    assert at("cosine", 6, gamma=0.0) == pytest.approx(0.5)
    assert at("cosine", 11, gamma=0.2) == pytest.approx(0.2), "the round after the last"
    assert at("linear", 40, gamma=0.2) == pytest.approx(0.2), "a run that goes on beyond its plan"
    assert [at("constant", n, warmup=3) for n in range(1, 6)] == [0.25, 0.5, 0.75, 1, 1]
    assert math.isfinite(factor("cosine", 1, 1, gamma=0.0, every=1, warmup=0))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'cosin'; it can be constant, cosine"):
        factor("cosin", 1, 10, gamma=0.0, every=1, warmup=0)


def test_the_examples_in_the_documentation_are_true() -> None:
    assert doctest.testmod(schedules).failed == 0


@pytest.mark.parametrize(("name", "second"), [("step", 0.1), ("exponential", 0.95)])
def test_a_factor_that_nobody_gave_does_not_end_the_training(name: str, second: float) -> None:
    options = RunOptions(rounds=50, schedule=name, schedule_every=1)
    assert options.learning_rate_factor(2) == second
    assert all(options.learning_rate_factor(number) > 0 for number in range(1, 51))


def test_a_warmup_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup-rounds is 4 of 4 rounds"):
        RunOptions(rounds=4, warmup_rounds=4)
    assert RunOptions(rounds=4, warmup_rounds=3).learning_rate_factor(4) == 1.0


@pytest.mark.parametrize("rate", [-0.1, math.inf, math.nan, "fast", True])
def test_a_learning_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(ConfigError, match=r"learning-rate is .*at least 0"):
        checked_rate({"learning-rate": rate})


def test_a_schedule_without_a_learning_rate_is_refused() -> None:
    for options in ({"schedule": "cosine"}, {"warmup-rounds": 2}):
        with pytest.raises(ConfigError, match="the option learning-rate, which this trainer"):
            checked_rate(options)
    assert checked_rate({"schedule": "constant"}) is None
    assert checked_rate({"learning-rate": 1, "schedule": "cosine"}) == 1.0
