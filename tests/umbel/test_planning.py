"""The planner knows every mechanism that a run can have, and agrees with what runs are charged."""

from typing import Any

import pytest

from umbel.core.errors import ConfigError
from umbel.planning import schedule
from umbel.privacy.budget.accounting import epsilon, spent
from umbel.privacy.budget.calibrate import calibrate

NODES, SIZE, ROUNDS, DELTA = 1000, 2000, 20, 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "capped": {"cohort-cap": 150},
    "all": {"sampling": "all"},
    "fixed": {"sampling": "fixed"},
    "tree": {"mechanism": "tree", "separation": 10},
    "banded": {"mechanism": "banded", "separation": 10},
    "secure": {"secure": True},
    "secure, discrete Gaussian": {"secure": True, "secure-noise": "discrete-gaussian"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_noise_for_a_budget_costs_that_budget(name: str) -> None:
    plan = schedule(OPTIONS[name], rounds=ROUNDS, sampling_rate=0.1, nodes=NODES, parameters=SIZE)
    found = calibrate(plan.charges, 3.0, DELTA)
    assert spent(plan.charges(found), DELTA).epsilon == pytest.approx(3.0, rel=5e-3)
    assert spent(plan.charges(found), DELTA).epsilon <= 3.0
    assert plan.noise_over_norm(2 * found) == pytest.approx(2 * plan.noise_over_norm(found))


def test_the_general_plan_is_the_special_one_where_both_apply() -> None:
    plan = schedule({}, rounds=ROUNDS, sampling_rate=0.1, nodes=NODES, parameters=SIZE)
    found = spent(plan.charges(1.0), DELTA).epsilon
    assert found == pytest.approx(epsilon(1.0, 0.1, ROUNDS, DELTA), rel=1e-6)
    assert plan.noise_over_norm(1.0) == pytest.approx(SIZE**0.5 / 100)


def test_local_noise_follows_from_epsilon_and_is_louder() -> None:
    options = {"mechanism": "local", "epsilon": 3.0}
    plan = schedule(options, rounds=ROUNDS, sampling_rate=0.1, nodes=NODES, parameters=SIZE)
    assert spent(plan.charges(0.0), DELTA).epsilon == pytest.approx(3.0, rel=1e-2)
    assert plan.own_noise is not None
    assert plan.own_noise > 1
    assert plan.noise_over_norm(plan.own_noise) > 10


def test_what_cannot_be_planned_is_said() -> None:
    for options, said in (
        ({"mechanism": "tre"}, "it can be gaussian, local, tree, banded"),
        ({"learning-rate": 0.1}, "there is no option 'learning-rate'"),
        ({"mechanism": "tree"}, "needs separation"),
    ):
        with pytest.raises(ConfigError, match=said):
            schedule(options, rounds=2, sampling_rate=0.1, nodes=10, parameters=10)
