"""Fifteen ways in which private federated averaging goes wrong elsewhere, and does not here.

Each was reproduced in another framework; the test is named by what is right. False alarms of the
statistics: below 1e-7 each.
"""

import inspect
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from flwr.app import RecordDict
from scipy import stats

from tests.strategies.test_private_layers import FIXED, Run
from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import clip, l2_norm
from umbel.privacy.budget.accounting import epsilon, spent
from umbel.privacy.budget.events import Charge
from umbel.privacy.noise.gaussian import gaussian_delta
from umbel.server.private.ledger import Ledger
from umbel.server.private.plan import charge_for, claims_of
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import MARGIN, Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.samplers import Poisson
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts


def adapted(start: float, lengths: list[float], rounds: int, **options: Any) -> list[float]:
    run = Run(Stack((AdaptiveClip(start, **options),), FIXED), cohort=len(lengths))
    norms = []
    for _ in range(rounds):
        config = run.config()
        sent = [
            run.stack.encode(torch.full((6,), n / math.sqrt(6)), config, RecordDict())[0]
            for n in lengths
        ]
        norms.append(run.round(*sent)[1]["adaptive-clip.norm"])
    return norms


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_d1_adaptive_clipping_moves_toward_the_quantile(start: float) -> None:
    """Elsewhere the sign is inverted: 0.1 shrinks to 4.5e-6 and 10 grows to 2.2e5."""
    lengths = [0.75, 0.85, 0.94, 0.96, 1.05, 1.15]
    norms = adapted(start, lengths, rounds=100)
    assert 0.9 < norms[-1] < 1.0
    distances = [abs(math.log(norm / 0.95)) for norm in norms[:10]]
    assert distances == sorted(distances, reverse=True)


def test_d2_noise_is_for_the_norm_that_the_round_was_clipped_to() -> None:
    """Elsewhere it is for the next round's norm."""
    size = 100_000
    run = Run(Stack((AdaptiveClip(1.0, rate=2.0), Gaussian(1.0)), FIXED), cohort=1, size=size)
    for _ in range(2):
        norm = run.states[0]["norm"]
        average, metrics = run.round(run.encode(torch.full((size,), 100.0)) * 0)
        assert metrics["gaussian.noise"] == pytest.approx(norm * math.sqrt(1.01) * MARGIN)
        deviation = float(average.std())
        assert deviation == pytest.approx(norm * math.sqrt(1.01), rel=5.5 / math.sqrt(2 * size))
    assert run.states[0]["norm"] != norm


def test_d3_a_node_counts_once_whatever_it_says_of_itself() -> None:
    """Elsewhere noise is for a plain mean, and the mean is weighted by numbers of examples."""
    with pytest.raises(StackError, match="weighting='fixed'"):
        stack = Stack((Clip(1.0), Gaussian(1.0)), PlainSum(weighting="examples"))
        stack.claims(stack.check(Facts(size=6), stack.init(6)))
    private = Stack((Clip(1.0), Gaussian(1.0)), FIXED)
    assert private.check(Facts(size=6), private.init(6)).weight_bound == 1.0


def test_d4_missing_replies_do_not_raise_the_others_influence() -> None:
    """Elsewhere noise is for those who were asked, and the mean is over those who answered."""
    run = Run(Stack((Clip(1.0), Gaussian(1e-6)), FIXED), cohort=10)
    sent = run.encode(torch.full((6,), 5.0))
    average, _ = run.round(sent, torch.zeros(6))
    assert float(average.norm()) == pytest.approx(1.0 / 10, rel=1e-3)


def test_d5_a_zero_update_is_an_update() -> None:
    """Elsewhere it divides by zero, and one node ends the round of all."""
    assert clip(torch.zeros(6), 1.0).length == 0
    for layers in ((Clip(1.0),), (AdaptiveClip(1.0),), (Clip(1.0), LocalGaussian(1.0, 1e-5))):
        run = Run(Stack(layers, FIXED))
        assert bool(torch.isfinite(run.encode(torch.zeros(6))).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_d6_what_is_not_finite_never_leaves_clipping(bad: float) -> None:
    """Elsewhere NaN survives it and becomes the model. (Nodes that send it all the same are
    rejected by name: `tests/server/test_private_run.py`.)"""
    update = torch.full((6,), 0.1)
    update[3] = bad
    for layer in (Clip(1.0), AdaptiveClip(1.0)):
        with pytest.raises(ValueError, match="not finite"):
            Run(Stack((layer,), FIXED)).encode(update)


def test_d7_no_seed_repeats_the_noise() -> None:
    """Elsewhere all noise comes from numpy's global generator."""
    draws = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        run = Run(Stack((Clip(1.0), Gaussian(1.0)), FIXED))
        central = run.round()[0]
        local = Run(Stack((Clip(1.0), LocalGaussian(1.0, 1e-5)), FIXED))
        draws.append((central, local.encode(torch.zeros(6))))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])


def test_d8_the_lattice_of_outputs_does_not_depend_on_the_value() -> None:
    """Elsewhere a float32 sum betrays x by its low bits, and integers swallow the noise.

    Among small outputs of x + N in float32, 83 % are off the grid of 2**-24 for x = 0 and none
    for x = 1. Here every output is a whole number of steps, and outputs that both values can
    give are told apart no better than the mechanism allows.
    """
    size = 50_000
    step = MARGIN / 128
    places = []
    for value in (0.0, 1.0):
        run = Run(Stack((Clip(2 * math.sqrt(size)), Gaussian(1.0)), FIXED), cohort=1, size=size)
        deviation = 2 * math.sqrt(size)
        average, _ = run.round(run.encode(torch.full((size,), value)))
        found = average.numpy() / (step * deviation)
        assert np.abs(found - np.round(found)).max() < 1e-6
        places.append(np.round(found).astype(int))
    low_bits = [np.bincount(found % 16, minlength=16) for found in places]
    assert stats.chi2_contingency(low_bits).pvalue > 1e-7
    with pytest.raises(ValueError, match="integer buffers"):
        clip(torch.ones(6, dtype=torch.int64), 1.0)


def test_d9_the_server_measures_every_update_itself() -> None:
    """Elsewhere a node that does not clip moves the mean by whatever it likes.

    `PlainSum` gets the bound from the stack's facts; the rejection of long, huge and off-grid
    updates by name is in `tests/server/test_private_run.py`.
    """
    stack = Stack((Clip(0.5), PrivateMetrics({"loss": 1.0}), Gaussian(1.0)), FIXED)
    facts = stack.check(Facts(size=6), stack.init(6))
    assert facts.l2_bound == pytest.approx(0.5 * math.sqrt(1.01))
    assert facts.grid is not None


@pytest.mark.parametrize(("eps", "delta"), [(8.0, 0.01), (20.0, 1e-5), (0.5, 1e-6)])
def test_d10_local_noise_is_exact_for_any_epsilon_and_a_replaced_update(
    eps: float, delta: float
) -> None:
    """Elsewhere: a formula for epsilon below 1 at any epsilon (real delta 150 times the promised
    one at epsilon 20), a free sensitivity, and zeros accepted."""
    z = LocalGaussian(eps, delta).noise_multiplier
    real = gaussian_delta(eps, z / 2)  # two updates of length 1 are 2 apart
    assert 0.99 * delta < real <= delta
    assert "sensitivity" not in inspect.signature(LocalGaussian).parameters
    for bad in ((0.0, delta), (eps, 0.0), (-1.0, delta), (eps, 1.0), (math.nan, delta)):
        with pytest.raises(StackError):
            LocalGaussian(*bad)


def test_d11_every_layer_is_accounted_with_its_amplification() -> None:
    """Elsewhere only fixed clipping is, without sampling, by RDP: 35.1 in place of 2.34."""
    for layers in ((Clip(1.0), Gaussian(2.0)), (AdaptiveClip(1.0), Gaussian(2.0))):
        (claim,) = claims_of(Stack(layers, FIXED), Facts(size=6), 1)
        charge = charge_for(claim, Poisson(100), nodes=1000)
        assert spent({charge: 100}, 1e-5).epsilon == pytest.approx(2.3374, rel=5e-3)


def test_d12_cohorts_are_what_the_accountant_takes_them_for() -> None:
    """Elsewhere a fixed number of the nodes that happen to be connected."""
    (claim,) = claims_of(Stack((Clip(1.0), Gaussian(2.0)), FIXED), Facts(size=6), 1)
    charge = charge_for(claim, Poisson(100), nodes=1000)
    assert charge.event == PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0))
    sizes = [len(Poisson(100).draw(1000, None)) for _ in range(400)]
    # a Poisson cohort's size varies: binomial, deviation 9.5
    assert abs(np.mean(sizes) - 100) < 5.5 * 9.487 / 20
    assert 6.5 < np.std(sizes) < 13
    random.seed(3)
    np.random.seed(3)
    first = Poisson(100).draw(1000, None)
    random.seed(3)
    np.random.seed(3)
    assert Poisson(100).draw(1000, None) != first


def test_d13_metrics_are_inside_the_one_bound_or_nowhere() -> None:
    """Elsewhere metrics travel in the clear, and k records are clipped to k norms."""
    layers = (AdaptiveClip(1.0), PrivateMetrics({"loss": 2.0, "accuracy": 1.0}), Gaussian(1.0))
    stack = Stack(layers, FIXED)
    run = Run(stack)
    update, beside = stack.encode(
        torch.full((6,), 9.0), run.config(), RecordDict(), {"loss": 1e9, "accuracy": 1.0, "x": 3.0}
    )
    assert beside == {}
    assert l2_norm(update) <= math.sqrt(1.01) * math.sqrt(1.01)
    assert len(claims_of(stack, Facts(size=6), 1)) == 1


def test_d14_the_charge_is_on_disk_before_the_release(tmp_path: Path) -> None:
    """Elsewhere the accountant is in memory and composes after the release, so a restart is free.

    The order of charge and decode under real kills: `tests/server/test_private_run.py`.
    """
    charge = Charge(GaussianDpEvent(2.0))
    first = Ledger(tmp_path / "ledger.sqlite", "people")
    first.charge("run", "round 1", "model-user", [charge], round=1)
    with Ledger(tmp_path / "ledger.sqlite", "people") as second:  # the first is never closed well
        assert spent(second.spent("model-user"), 1e-5).epsilon == pytest.approx(
            epsilon(2.0, 1.0, 1, 1e-5)
        )
    first.close()


def test_d15_an_empty_round_is_a_round() -> None:
    """Elsewhere replies are counted by using them up, and none of them divides by zero."""
    run = Run(Stack((AdaptiveClip(1.0), PrivateMetrics({"loss": 1.0}), Gaussian(1.0)), FIXED))
    average, metrics = run.round()
    assert bool(torch.isfinite(average).all())
    assert math.isfinite(metrics["private-metrics.loss"])
    assert 0 <= metrics["adaptive-clip.unclipped"] <= 1
