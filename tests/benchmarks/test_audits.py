"""Audits through the real stack: honest ones stand, broken ones fall."""

from functools import partial

import pytest

from umbel.benchmarks.attack import audits
from umbel.benchmarks.attack.audits import Audit
from umbel.benchmarks.attack.defences import (
    FAULTS,
    Schedule,
    central,
    distributed,
    local,
    nothing,
    promised,
    unbounded_weights,
)
from umbel.benchmarks.attack.jobs import audit_fault
from umbel.core.errors import ConfigError
from umbel.federation import Federation
from umbel.privacy.budget.accounting import epsilon

DELTA = 1e-5


def by_adversary(found: list[Audit]) -> dict[str, Audit]:
    return {audit.adversary: audit for audit in found}


def test_central_noise_keeps_its_promise_to_model_users_and_makes_none_to_the_server() -> None:
    # A correct bound is above the truth in 5 % of runs at most; here it lies near a third of it.
    found = by_adversary(
        audits.audit_clients(
            Federation, "central", partial(central, 4.0), audits.alone(600, DELTA), seed=1
        )
    )
    users, server = found["model-user"], found["server"]
    assert users.claimed == pytest.approx(4.0, rel=1e-3)
    assert not users.refuted
    assert server.claimed is None
    assert server.measured > 4.0


def test_local_noise_keeps_its_promise_to_the_server() -> None:
    found = by_adversary(
        audits.audit_clients(
            Federation, "local", partial(local, 4.0), audits.alone(300, DELTA), seed=1
        )
    )
    assert found["server"].claimed == pytest.approx(4.0, rel=1e-2)
    assert not found["server"].refuted


def test_distributed_noise_keeps_its_promise_to_the_server() -> None:
    found = by_adversary(
        audits.audit_clients(
            Federation, "distributed", partial(distributed, 4.0), audits.alone(30, DELTA), seed=1
        )
    )
    assert found["server"].claimed is not None
    assert found["server"].claimed <= 4.0 * 1.01
    assert not found["server"].refuted


def test_no_defence_claims_nothing_and_shows_everything() -> None:
    found = audits.audit_clients(Federation, "none", nothing, audits.alone(600, DELTA), seed=1)
    assert all(audit.claimed is None and not audit.refuted for audit in found)
    assert all(audit.measured > 4.0 for audit in found)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    # With a quarter of the noise the smallest bound of 20 runs of 1,000 canaries was 1.3.
    found = audit_fault(Federation, fault, epsilon=1.0, canaries=1000, delta=DELTA, seed=2)
    assert [audit.adversary for audit in found] == ["model-user"]
    assert found[0].claimed == pytest.approx(1.0, rel=1e-3)
    assert found[0].refuted


def test_sampled_rounds_are_audited_against_the_ledger() -> None:
    schedule = Schedule(5, 400, 100.0, DELTA, 1.0)
    found = by_adversary(
        audits.audit_clients(Federation, "sampled", partial(central, 2.0), schedule, seed=3)
    )
    assert found["model-user"].claimed == pytest.approx(2.0, rel=1e-2)
    assert not found["model-user"].refuted


def test_an_estimate_refutes_nothing() -> None:
    estimate = audits.estimate_clients(
        Federation, "x", partial(central, 1.0), audits.alone(200, DELTA), size=5000, seed=1
    )
    assert not estimate.is_bound
    assert not estimate.refuted
    assert 0 <= estimate.measured < 8


def test_a_mechanism_alone() -> None:
    loose, tight = audits.audit_mechanism(
        Federation, "x", partial(central, 4.0), audits.alone(400, DELTA), runs=4, seed=1
    )
    assert (loose.method, tight.method) == ("clopper-pearson", "gaussian-dp")
    assert loose.measured < tight.measured < 4.0 == pytest.approx(tight.claimed, rel=1e-3)


def test_promises_are_those_of_the_accountant() -> None:
    schedule = Schedule(10, 100, 20.0, DELTA, 1.0)
    stack = central(3.0, schedule)
    claimed = promised(stack, 50, schedule)
    multiplier = next(
        layer.noise_multiplier for layer in stack.layers if hasattr(layer, "noise_multiplier")
    )
    assert set(claimed) == {"model-user"}
    assert claimed["model-user"] == pytest.approx(epsilon(multiplier, 0.2, 10, DELTA), rel=1e-3)
    assert claimed["model-user"] <= 3.0


def test_faults_need_something_to_break() -> None:
    with pytest.raises(ConfigError, match="no noise"):
        FAULTS["noise x 0.25"](nothing(audits.alone(5, DELTA)))
    with pytest.raises(ConfigError, match="plain sum"):
        unbounded_weights(distributed(4.0, audits.alone(30, DELTA)))
    with pytest.raises(ConfigError, match="there is no fault"):
        audit_fault(Federation, "x", epsilon=1.0, canaries=10, delta=DELTA, seed=0)
