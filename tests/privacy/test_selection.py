"""The price of a search: against the formulas, against dp-accounting's, against the truth."""

import math
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from umbel.privacy.budget.accounting import epsilon, spent
from umbel.privacy.budget.calibrate import calibrate
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, Charge, from_json, to_json
from umbel.privacy.budget.selection import (
    ORDERS,
    SHAPES,
    SelectionDpEvent,
    _log_probability,
    draw_number,
    selection_epsilon,
    selection_rdp,
)
from umbel.privacy.noise.entropy import Entropy

RUN = ((PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 50),)


@pytest.mark.parametrize("distribution", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 10.0, 100.0])
def test_it_is_what_dp_accounting_computes(distribution: str, mean: float) -> None:
    """An implementation that nobody here wrote, of the same theorems."""
    mine = selection_epsilon({SelectionDpEvent(RUN, mean, distribution): 1}, ADD_OR_REMOVE, 1e-5)
    theirs = RdpAccountant(ORDERS, ADD_OR_REMOVE)
    (event, times), *_ = RUN
    repeated = RepeatAndSelectDpEvent(
        SelfComposedDpEvent(event, times), mean, SHAPES_OF_THEIRS[distribution]
    )
    assert mine == pytest.approx(theirs.compose(repeated).get_epsilon(1e-5), rel=1e-6)


SHAPES_OF_THEIRS = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}


def test_it_is_the_formula_of_the_paper_for_one_gaussian() -> None:
    """Written down once more from the theorems, for rdp(a) = a/2 s^2, without any code of Umbel."""
    sigma, mean = 3.0, 20.0
    orders = [1.5, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    rdp = [a / (2 * sigma**2) for a in orders]
    pairs = list(zip(orders, rdp, strict=True))
    gamma = 1 / mean  # geometric: the mean is 1/gamma
    other = min(2 * ((1 - 1 / a) * r + math.log(1 / gamma) / a) for a, r in pairs)
    wanted = [r + other + math.log(mean) / (a - 1) for a, r in pairs]
    wanted = [min(wanted[i:]) for i in range(len(wanted))]
    assert selection_rdp(orders, rdp, mean, "geometric") == pytest.approx(wanted)
    poisson = []
    for a, r in pairs:
        hat = math.log(1 + 1 / (a - 1))
        delta = min(
            min(1.0, math.exp((b - 1) * (s - hat + math.log(1 - 1 / b)) - math.log(b)))
            for b, s in pairs
        )
        poisson.append(r + mean * delta + math.log(mean) / (a - 1))
    poisson = [min(poisson[i:]) for i in range(len(poisson))]
    assert selection_rdp(orders, rdp, mean, "poisson") == pytest.approx(poisson)


def test_the_best_of_many_is_never_said_to_cost_less_than_one() -> None:
    one = epsilon(2.0, 0.1, 50, 1e-5)
    costs = [
        selection_epsilon({SelectionDpEvent(RUN, mean, d): 1}, ADD_OR_REMOVE, 1e-5)
        for d in SHAPES
        for mean in (1.0, 3.0, 30.0)
    ]
    assert all(cost >= one - 1e-9 for cost in costs)
    for place in range(0, 9, 3):
        assert all(a <= b for a, b in pairwise(costs[place : place + 3]))


def test_the_bound_holds_for_a_selection_that_can_be_computed() -> None:
    """The best of a geometric number of Gaussian releases, as its density says it is.

    Released is the largest of K draws of N(m, s^2), m = 0 or 1. With P(K <= k) geometric, the
    largest has the distribution function G(F(x)), G the generating function of K: an exact curve
    of epsilon and delta, which the bound has to cover.
    """
    sigma, mean, delta = 4.0, 8.0, 1e-4
    gamma = 1 / mean
    x = np.linspace(-12 * sigma, 12 * sigma, 400_001)

    def density(shift: float) -> np.ndarray:
        below = norm.cdf(x, shift, sigma)
        return gamma / (1 - (1 - gamma) * below) ** 2 * norm.pdf(x, shift, sigma)

    bound = selection_epsilon(
        {SelectionDpEvent(((GaussianDpEvent(sigma), 1),), mean, "geometric"): 1},
        ADD_OR_REMOVE,
        delta,
    )
    for p, q in ((density(0), density(1)), (density(1), density(0))):
        lost = np.trapezoid(np.maximum(p - math.exp(bound) * q, 0), x)
        assert lost <= delta
        assert abs(np.trapezoid(p, x) - 1) < 1e-6


@pytest.mark.parametrize("distribution", SHAPES)
@pytest.mark.parametrize("mean", [1.0, 4.0, 30.0])
def test_numbers_of_trials_have_the_mean_that_is_accounted(distribution: str, mean: float) -> None:
    """The probabilities sum to 1 with that mean; 2,000 draws are within 5.5 deviations: < 1e-6."""
    from umbel.privacy.budget.selection import _gamma

    shape = SHAPES[distribution]
    gamma = 0.0 if math.isinf(shape) else _gamma(mean, shape)
    numbers = np.arange(0 if distribution == "poisson" else 1, 20_000)
    with np.errstate(divide="ignore"):
        chances = np.exp([_log_probability(int(n), mean, shape, gamma) for n in numbers])
    assert chances.sum() == pytest.approx(1, abs=1e-6)
    found = float((chances * numbers).sum())
    assert found == pytest.approx(mean, rel=1e-3)
    spread = math.sqrt(max(0.0, float((chances * numbers**2).sum()) - found**2))
    source = Entropy(insecure_seed=1)
    drawn = [draw_number(mean, distribution, source) for _ in range(2000)]
    assert abs(float(np.mean(drawn)) - mean) <= 5.5 * spread / math.sqrt(2000) + 1e-9


@given(st.sampled_from(sorted(SHAPES)), st.floats(1, 1000))
def test_it_is_written_down_and_read_again(distribution: str, mean: float) -> None:
    event = SelectionDpEvent(RUN, mean, distribution)
    assert from_json(to_json(event)) == event


def test_a_ledger_adds_a_search_to_other_releases() -> None:
    search = Charge(SelectionDpEvent(RUN, 10.0, "poisson"))
    plain = Charge(GaussianDpEvent(5.0))
    both = spent({search: 1, plain: 3}, 1e-5)
    assert both.epsilon >= max(spent({search: 1}, 1e-5).epsilon, spent({plain: 3}, 1e-5).epsilon)
    assert spent({search: 2}, 1e-5).epsilon > spent({search: 1}, 1e-5).epsilon
    with pytest.raises(ValueError, match="add-or-remove only"):
        spent({search: 1, Charge(GaussianDpEvent(5.0), REPLACE): 1}, 1e-5)


def test_noise_is_found_for_the_whole_search() -> None:
    def plan(multiplier: float) -> dict[Charge, int]:
        run = ((PoissonSampledDpEvent(0.1, GaussianDpEvent(multiplier)), 20),)
        return {Charge(SelectionDpEvent(run, 10.0, "poisson")): 1}

    multiplier = calibrate(plan, 4.0, 1e-5)
    assert spent(plan(multiplier), 1e-5).epsilon <= 4.0
    assert spent(plan(multiplier * 0.99), 1e-5).epsilon > 4.0
    assert epsilon(multiplier, 0.1, 20, 1e-5) < 4.0  # one trial alone costs less


def test_nonsense_is_refused() -> None:
    for wrong in (
        lambda: SelectionDpEvent(RUN, 10.0, "fixed"),
        lambda: SelectionDpEvent(RUN, 0.5, "poisson"),
        lambda: SelectionDpEvent((), 10.0, "poisson"),
    ):
        with pytest.raises(ValueError, match=r"distribution is|mean is|without releases"):
            wrong()
