"""Estimators against published and independently computed values, and against known mechanisms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from umbel.privacy.attacks.audit import (
    Errors,
    Normal,
    advantage_ceiling,
    auc_ceiling,
    clopper_pearson,
    clopper_pearson_bound,
    epsilon_of_normals,
    errors_at,
    gaussian_bound,
    hockey_stick,
    one_run_audit,
    one_run_bound,
    one_shot_estimate,
    true_positive_ceiling,
)
from umbel.privacy.noise.gaussian import gaussian_delta, gaussian_epsilon, gaussian_noise

DELTA = 1e-5


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "expected"),
    [
        (1000, 1000, 500, 1e-5, 0.0),
        (1000, 1000, 600, 1e-5, 0.2972),
        (1000, 1000, 750, 1e-5, 0.9764),
        (1000, 100, 100, 1e-5, 3.4654),
        (1000, 100, 95, 1e-5, 2.1652),
        (1000, 100, 90, 0.0, 1.6308),
        (5000, 500, 450, 1e-5, 1.9414),
        (1000, 1000, 1000, 1e-5, 5.7823),
        (100, 100, 100, 0.0, 3.4930),
    ],
)
def test_one_run_values(
    canaries: int, guesses: int, right: int, delta: float, expected: float
) -> None:
    bound = one_run_bound(canaries=canaries, guesses=guesses, right=right, delta=delta)
    assert bound.epsilon == pytest.approx(expected, abs=0.002)


def dirac_run(sigma: float, seed: int, canaries: int = 1000) -> float:
    """The lower bound from one run of a Gaussian mechanism on canaries of one coordinate each."""
    rng = np.random.default_rng(seed)
    coins = rng.random(canaries) < 0.5
    released = coins + sigma * rng.normal(size=canaries)
    return one_run_audit(released, coins, delta=DELTA).epsilon


def test_a_correct_gaussian_is_never_refuted() -> None:
    # The mean bound is 1.4 and its deviation 0.3: 4 lies eight deviations away.
    sigma = gaussian_noise(4.0, DELTA)
    assert max(dirac_run(sigma, seed) for seed in range(100)) <= 4.0


def test_quartered_noise_is_caught() -> None:
    sigma = gaussian_noise(1.0, DELTA)
    caught = sum(dirac_run(sigma / 4, seed) > 1.0 for seed in range(20))
    assert caught >= 19


def test_perfect_attacks_give_the_clopper_pearson_limits() -> None:
    assert clopper_pearson_bound(Errors(0, 100, 0, 100)).epsilon == pytest.approx(3.281, abs=1e-3)
    assert clopper_pearson_bound(Errors(0, 1000, 0, 1000)).epsilon == pytest.approx(5.601, abs=1e-3)


def test_bounds_of_a_gaussian_stay_below_it_and_the_gaussian_one_is_tighter() -> None:
    # mu = 2: epsilon is 9.9 at delta 1e-5. The interval's miss rate is 5 %, so one draw is fixed.
    rng = np.random.default_rng(3)
    errors = errors_at(2 + rng.normal(size=4000), rng.normal(size=4000), threshold=1.0)
    loose, tight = clopper_pearson_bound(errors, DELTA), gaussian_bound(errors, DELTA)
    truth = gaussian_epsilon(0.5, DELTA)
    assert 1.0 < loose.epsilon < 0.5 * truth
    assert 0.9 * truth < tight.epsilon <= truth
    assert not tight.refutes(truth)
    assert tight.refutes(truth / 2)


@given(
    st.floats(-3, 3),
    st.floats(0.2, 3),
    st.floats(-3, 3),
    st.floats(0.2, 3),
    st.floats(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_hockey_stick_is_the_integral(
    p_mean: float, p_std: float, q_mean: float, q_std: float, epsilon: float
) -> None:
    p, q = Normal(p_mean, p_std), Normal(q_mean, q_std)
    grid = np.linspace(-25, 25, 400_001)
    gap = stats.norm.pdf(grid, p_mean, p_std) - math.exp(epsilon) * stats.norm.pdf(
        grid, q_mean, q_std
    )
    expected = integrate.trapezoid(np.maximum(gap, 0), grid)
    assert hockey_stick(p, q, epsilon) == pytest.approx(expected, abs=1e-5)


def test_two_normals_of_one_spread_are_the_gaussian_mechanism() -> None:
    p, q = Normal(1.0, 1.0), Normal(0.0, 1.0)
    assert hockey_stick(p, q, 2.0) == pytest.approx(gaussian_delta(2.0, 1.0), rel=1e-9)
    assert epsilon_of_normals(p, q, 1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-9)
    nearly = Normal(1.0, 1.0 + 1e-9)
    assert epsilon_of_normals(nearly, q, 1e-5) == pytest.approx(4.3772, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "low", "high"), [(4.22, 0.3, 1.8), (1.54, 2.5, 3.9), (0.541, 9.0, 11.2)]
)
def test_one_shot_estimates_the_gaussian_mechanism(sigma: float, low: float, high: float) -> None:
    # True epsilons 1, 3 and 10 at delta 1e-6. Of cosines of random directions only inner
    # products matter: <c, sum of canaries> is 1 + N(0, (k - 1) / d), <c, noise> is N(0, 1).
    rng = np.random.default_rng(11)
    size, canaries = 100_000, 1000
    length = math.sqrt(canaries + sigma**2 * size)
    products = 1 + rng.normal(size=canaries) * math.sqrt((canaries - 1) / size + sigma**2)
    estimate = one_shot_estimate(products / length, size=size, delta=1e-6)
    assert low < estimate.epsilon < high
    assert "estimate" in estimate.method


def test_one_shot_on_real_directions() -> None:
    size, canaries, sigma = 20_000, 200, 0.541
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(
        torch.randn(canaries, size, generator=generator), dim=1
    )
    released = directions.sum(dim=0) + sigma * torch.randn(size, generator=generator)
    cosines = (directions @ released / released.norm()).double().numpy()
    estimate = one_shot_estimate(cosines, size=size, delta=1e-6)
    assert 7.0 < estimate.epsilon < 13.0


def test_ceilings() -> None:
    for epsilon, expected in ((0.5, 0.2449), (1, 0.4621), (2, 0.7616), (4, 0.9640)):
        assert advantage_ceiling(epsilon, DELTA) == pytest.approx(expected, abs=1e-4)
    assert auc_ceiling(0.0, 0.0) == pytest.approx(0.5)
    assert auc_ceiling(math.inf, DELTA) == 1.0
    assert advantage_ceiling(math.inf, DELTA) == 1.0
    rates = np.linspace(0, 1, 101)
    ceiling = true_positive_ceiling(rates, 1.0, DELTA)
    assert np.all(np.diff(ceiling) >= -1e-12)
    assert np.max(ceiling - rates) == pytest.approx(advantage_ceiling(1.0, DELTA), abs=5e-3)
    assert np.trapezoid(ceiling, rates) == pytest.approx(auc_ceiling(1.0, DELTA), abs=1e-3)


@given(st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_clopper_pearson_holds_the_proportion(trials: int, share: float) -> None:
    successes = round(share * trials)
    low, high = clopper_pearson(successes, trials)
    assert low <= successes / trials <= high
    if successes > 0:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: one_run_bound(canaries=10, guesses=11, right=3), "guesses <= canaries"),
        (lambda: clopper_pearson(3, 2), "not a proportion"),
        (lambda: one_shot_estimate(np.zeros(1), size=10, delta=1e-5), "at least 2"),
        (
            lambda: one_run_audit(np.full(4, np.nan), np.ones(4, bool), delta=1e-5),
            "NaN",
        ),
    ],
)
def test_mistakes_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
