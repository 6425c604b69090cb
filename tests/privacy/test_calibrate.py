"""Noise for a budget: within it, and not much more than needed."""

import pytest

from umbel.privacy.budget.accounting import epsilon, poisson, spent
from umbel.privacy.budget.calibrate import calibrate, noise_multiplier
from umbel.privacy.budget.events import Charge


@pytest.mark.parametrize(
    ("eps", "delta", "q", "rounds", "z"),
    [
        (1, 1e-5, 0.1, 100, 3.9418),
        pytest.param(2, 1e-5, 0.1, 100, 2.2477, marks=pytest.mark.slow),
        (4, 1e-5, 0.1, 100, 1.3860),
        pytest.param(8, 1e-5, 0.1, 100, 0.9359, marks=pytest.mark.slow),
        pytest.param(8, 1e-3, 0.2, 30, 0.8051, marks=pytest.mark.slow),
        pytest.param(1, 1e-5, 0.01, 1000, 1.4147, marks=pytest.mark.slow),
    ],
)
def test_reference_values(eps: float, delta: float, q: float, rounds: int, z: float) -> None:
    found = noise_multiplier(eps, delta, q, rounds)
    assert found == pytest.approx(z, rel=5e-3)
    assert epsilon(found, q, rounds, delta) <= eps


def test_what_was_spent_before_leaves_less() -> None:
    before = {Charge(poisson(6.0, 0.1)): 30}

    def plan(z: float) -> dict[Charge, int]:
        return {Charge(poisson(z, 0.1)): 30}

    found = calibrate(plan, 1.0, 1e-5, before=before)
    assert found > calibrate(plan, 1.0, 1e-5)
    assert spent({**before, **plan(found)}, 1e-5).epsilon <= 1.0


def test_a_budget_that_is_gone_is_said() -> None:
    before = {Charge(poisson(2.0, 0.1)): 100}
    with pytest.raises(ValueError, match="is spent"):
        calibrate(lambda z: {Charge(poisson(z, 0.1)): 1}, 1.0, 1e-5, before=before)


def test_a_budget_that_no_noise_meets_is_said() -> None:
    with pytest.raises(ValueError, match="no noise meets"):
        noise_multiplier(1e-6, 1e-9, 1.0, 1_000_000)


@pytest.mark.parametrize(
    ("eps", "delta", "q", "rounds", "word"),
    [
        (0.0, 1e-5, 0.1, 10, "epsilon"),
        (float("inf"), 1e-5, 0.1, 10, "epsilon"),
        (float("nan"), 1e-5, 0.1, 10, "epsilon"),
        (1.0, 0.0, 0.1, 10, "delta"),
        (1.0, 1.0, 0.1, 10, "delta"),
        (1.0, 1e-5, 0.0, 10, "sampling-rate"),
        (1.0, 1e-5, 1.1, 10, "sampling-rate"),
        (1.0, 1e-5, 0.1, 0, "rounds"),
    ],
)
def test_bad_values_are_named(eps: float, delta: float, q: float, rounds: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        noise_multiplier(eps, delta, q, rounds)
