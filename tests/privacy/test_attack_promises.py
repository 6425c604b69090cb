"""Tests of noise and sampling: correct mechanisms pass, others are seen; both at stated rates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.attacks.audit import EPSILON_LIMIT
from umbel.privacy.attacks.promises import (
    FALSE_ALARM,
    deviation_ceiling,
    gaussian_loss,
    participation,
    rounds_needed,
    shift_floor,
)
from umbel.privacy.noise.gaussian import gaussian_epsilon


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), sigma=st.floats(0.01, 100))
def test_the_ceiling_lies_above_the_truth_and_near_it(seed: int, sigma: float) -> None:
    """Each case is wrong with a probability of 1e-7, and beyond 15 % with one below 1e-9."""
    source = np.random.default_rng(seed)
    common = source.normal(size=3000) * 50  # what both runs share does not matter
    one, two = (common + sigma * source.normal(size=3000) for _ in range(2))
    assert sigma <= deviation_ceiling(one, two) <= 1.15 * sigma
    scores = sigma * source.normal(size=200) + 1.0
    assert shift_floor(scores, sigma) <= 1.0


def test_noise_that_repeats_is_none() -> None:
    values = np.random.default_rng(0).normal(size=100)
    assert deviation_ceiling(values, values.copy()) == 0
    assert gaussian_loss(0.0, 1.0, 1e-5) == EPSILON_LIMIT
    assert gaussian_loss(2.0, 1.0, 1e-5) == pytest.approx(gaussian_epsilon(2.0, 1e-5))
    with pytest.raises(ValueError, match="compared"):
        deviation_ceiling(values, values[:50])


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.7])
def test_independent_draws_pass(rate: float) -> None:
    """300 tests of a false alarm of 1e-7 each."""
    source, rounds = np.random.default_rng(1), rounds_needed(rate, 40)
    for _ in range(100):
        drawn = source.random((rounds, 40)) < rate
        assert participation(drawn, rate, fixed=False).p_value >= FALSE_ALARM


def test_a_fixed_number_without_replacement_passes() -> None:
    source = np.random.default_rng(2)
    drawn = np.zeros((30, 40), dtype=bool)
    for row in drawn:
        row[source.choice(40, 10, replace=False)] = True
    assert participation(drawn, 0.25, fixed=True).p_value >= FALSE_ALARM
    equal = participation(drawn, 0.25, fixed=False)
    assert equal.p_value < FALSE_ALARM
    assert "every round has 10 units" in equal.words


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.7])
def test_units_that_are_always_or_never_drawn_are_named(rate: float) -> None:
    drawn = np.random.default_rng(3).random((60, 40)) < rate
    drawn[:, [4, 9]] = True
    found = participation(drawn, rate, fixed=False)
    assert found.p_value < FALSE_ALARM
    assert found.odd == (4, 9)
    few = np.random.default_rng(4).random((60, 40)) < 0.7
    few[:, 5] = False
    assert participation(few, 0.7, fixed=False).odd == (5,)


def test_another_rate_than_the_claimed_one_is_seen() -> None:
    drawn = np.random.default_rng(5).random((60, 40)) < 0.3
    found = participation(drawn, 0.2, fixed=False)
    assert found.p_value < FALSE_ALARM
    assert "are claimed" in found.words


def test_no_rounds_say_nothing() -> None:
    with pytest.raises(ValueError, match="say nothing"):
        participation(np.zeros((0, 3), dtype=bool), 0.5, fixed=False)
