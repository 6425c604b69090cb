"""Noise in shares: the exact law of each, the law of their sum, and its Renyi divergence.

Statistical tests have a false-alarm rate below 1e-6 each.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, ZCDpEvent
from scipy import special, stats

from umbel.privacy.budget.accounting import spent
from umbel.privacy.budget.events import REPLACE, ZERO_OUT, Charge, from_json, to_json
from umbel.privacy.budget.renyi import renyi_epsilon
from umbel.privacy.noise.discrete_gaussian import (
    concentrated_rho,
    discrete_gaussian_slack,
    discrete_gaussian_table,
    sample_discrete_gaussian,
)
from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.integer_table import IntegerTable
from umbel.privacy.noise.skellam import (
    sample_skellam,
    skellam_event,
    skellam_slack,
    skellam_table,
)


def cumulative(table: IntegerTable) -> list[Fraction]:
    pairs = zip(table.upper.tolist(), table.lower.tolist(), strict=True)
    return [Fraction((high << 64) + low, 1 << 128) for high, low in pairs]


@pytest.mark.parametrize("variance", [0.25, 1.0, 9.5, 400.0])
def test_the_skellam_table_is_the_law(variance: float) -> None:
    table = skellam_table(Fraction(variance))
    masses = cumulative(table)
    values = np.arange(len(masses)) + table.lowest
    law = stats.skellam.cdf(values, variance / 2, variance / 2)
    # scipy's own error is what limits this; the tails that it gets wrong are left out.
    middle = np.abs(values) < 8 * math.sqrt(variance) + 3
    error = np.abs(np.array([float(m) for m in masses]) - law)[middle]
    assert float(error.max()) < (3e-4 if variance < 1 else 1e-12)
    assert masses == sorted(masses) and table.tv < 1e-30


@pytest.mark.parametrize("deviation", [0.4, 1.0, 3.7, 50.0])
def test_the_discrete_gaussian_table_is_the_law(deviation: float) -> None:
    table = discrete_gaussian_table(deviation)
    masses = cumulative(table)
    support = np.arange(-600, 601)
    weights = np.exp(-(support**2) / (2 * deviation**2))
    law = dict(zip(support.tolist(), (np.cumsum(weights) / weights.sum()).tolist(), strict=True))
    for place, mass in enumerate(masses):
        if abs(place + table.lowest) < 500:
            assert float(mass) == pytest.approx(law[place + table.lowest], abs=1e-13)


def chi_squared(draws: np.ndarray, table: IntegerTable) -> float:  # type: ignore[type-arg]
    """The p-value of draws against the table, with cells of at least 50 expected draws."""
    masses = np.diff([0.0, *(float(m) for m in cumulative(table)), 1.0])
    counts = np.bincount(draws - table.lowest, minlength=len(masses)).astype(float)
    cells: list[tuple[float, float]] = [(0.0, 0.0)]
    for count, mass in zip(counts, masses, strict=True):
        seen, expected = cells[-1]
        if expected >= 50:
            cells.append((count, mass * len(draws)))
        else:
            cells[-1] = (seen + count, expected + mass * len(draws))
    last = cells.pop()
    cells[-1] = (cells[-1][0] + last[0], cells[-1][1] + last[1])
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return float(stats.chi2.sf(statistic, len(cells) - 1))


def test_draws_follow_the_table() -> None:
    skellam = sample_skellam(30.0, 300_000, Entropy())
    assert chi_squared(skellam, skellam_table(Fraction(30))) > 1e-7
    gaussian = sample_discrete_gaussian(4.0, 300_000, Entropy())
    assert chi_squared(gaussian, discrete_gaussian_table(4.0)) > 1e-7


def test_shares_add_up_to_the_law_of_the_whole() -> None:
    """Seven shares of variance 30/7 are one draw of variance 30, exactly; six are not enough."""
    whole = skellam_table(Fraction(30))
    shares = [sample_skellam(30 / 7, 200_000, Entropy()) for _ in range(7)]
    assert chi_squared(sum(shares), whole) > 1e-7  # type: ignore[arg-type]
    assert chi_squared(sum(shares[:6]), whole) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("variance", [100.0, 5e7, 3e9])
def test_moments_of_narrow_and_of_wide_noise(variance: float) -> None:
    """3e9 is drawn in parts; mean and variance within six standard errors."""
    draws = sample_skellam(variance, 400_000, Entropy()).astype(float)
    assert abs(draws.mean()) < 6 * math.sqrt(variance / len(draws))
    assert abs(draws.var() / variance - 1) < 6 * math.sqrt(2 / len(draws))
    assert abs(float(stats.kurtosis(draws)) - 1 / variance) < 6 * math.sqrt(24 / len(draws))


def test_two_draws_are_unlike_and_a_seed_repeats_them() -> None:
    first, second = (sample_skellam(1e4, 100, Entropy()) for _ in range(2))
    assert not np.array_equal(first, second)
    again = [sample_skellam(1e4, 100, Entropy(insecure_seed=3)) for _ in range(2)]
    assert np.array_equal(*again)


def test_a_tie_of_the_upper_words_is_settled_by_the_lower_ones() -> None:
    upper = np.array([5, 5, 9], np.uint64)
    table = IntegerTable(0, upper, np.array([10, 20, 0], np.uint64), 0.0)

    class Fixed(Entropy):
        def __init__(self, words: list[int]) -> None:
            super().__init__(insecure_seed=0)
            self.left = list(words)

        def words64(self, size: int) -> np.ndarray:  # type: ignore[type-arg]
            taken, self.left = self.left[:size], self.left[size:]
            return np.array(taken, np.uint64)

    for words, value in (([4], 0), ([5, 3], 0), ([5, 10], 1), ([5, 25], 2), ([7], 2), ([9, 0], 3)):
        assert table.sample(1, Fixed(words)).tolist() == [value]


@pytest.mark.parametrize("variance", [2.0, 20.0, 300.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_bound_covers_the_exact_renyi_divergence(variance: float, shift: int) -> None:
    """In one dimension the divergence is a sum that can be done; the bound is above and near."""
    reach = 100 if variance < 100 else 300
    values = np.abs(np.arange(-reach, reach + 1))
    logs = np.log(special.ive(values, variance))  # the law itself: exp(-mu) I_k(mu)
    for order in (2, 3, 8):
        terms = order * logs[:-shift] + (1 - order) * logs[shift:]
        exact = float(special.logsumexp(terms) / (order - 1))
        bound = skellam_event(variance, shift, 1).rdp(order)
        assert exact <= bound * (1 + 1e-9)
        if variance > 100:
            assert bound < 1.1 * exact


REFERENCE = [
    (20, 2**16, 1, [4.9036, 4.7405, 4.7295, 4.7286, 4.7285, 4.7285]),
    (100, 2**17, 1, [5.0921, 4.7527, 4.7303, 4.7287, 4.7285, 4.7285]),
    (100, 2**20, 1, [7.1059, 4.8993, 4.7395, 4.7293, 4.7286, 4.7285]),
    (1000, 2**20, 1, [8.9417, 5.0549, 4.7496, 4.7299, 4.7286, 4.7285]),
    (50, 2**20, 4, [4.9031, 1.4798, 1.0466, 1.0148, 1.0127, 1.0126]),
]


@pytest.mark.parametrize(("nodes", "size", "z", "expected"), REFERENCE)
def test_epsilon_by_modulus(nodes: int, size: int, z: float, expected: list[float]) -> None:
    """Independent values at delta 1e-5, one round, for 12 to 24 bits, over all real orders.

    Whole orders cost up to 0.8 %, and never gain.
    """
    for bits, epsilon in zip((12, 14, 16, 18, 20, 24), expected, strict=True):
        step = 1e-3
        for _ in range(100):
            wide = math.sqrt(nodes**2 / size + z**2 + nodes * step**2 / 4)
            step = 8 * wide / 2**bits
        square = 1 + step**2 * size / 4 + step * (1 + step * math.sqrt(size) / 2)
        l2 = min(math.sqrt(square), 1 + step * math.sqrt(size)) / step
        skellam = renyi_epsilon({skellam_event((z / step) ** 2, l2, size): 1}, 1e-5)
        assert epsilon * 0.9999 <= skellam <= epsilon * 1.008
        rho = concentrated_rho(z / step / math.sqrt(nodes), nodes, l2, size)
        if bits >= 16:
            assert renyi_epsilon({ZCDpEvent(rho): 1}, 1e-5) == pytest.approx(skellam, rel=1e-3)


def test_noise_that_is_too_fine_for_the_grid_costs_and_is_counted() -> None:
    few, many = (concentrated_rho(s, 100, 10.0, 10_000) / (50 / 100 / s**2) for s in (0.5, 5.0))
    assert few > 10 and many == pytest.approx(1, rel=1e-9)


def test_the_accountant_adds_rounds_and_writes_them_down() -> None:
    event = skellam_event(1e8, 1e4, 10**6)
    charge = Charge(event, ZERO_OUT, 1e-20)
    assert from_json(to_json(event)) == event
    assert from_json(to_json(ZCDpEvent(0.5))) == ZCDpEvent(0.5)
    one = spent({charge: 1}, 1e-5)
    ten = spent({charge: 10}, 1e-5)
    assert one.relation is ZERO_OUT and one.accountant == "renyi"
    assert one.epsilon < ten.epsilon < 10 * one.epsilon
    assert ten.epsilon == pytest.approx(renyi_epsilon({event: 10}, 1e-5))
    gaussian = Charge(GaussianDpEvent(5.0))
    both = spent({charge: 1, gaussian: 1}, 1e-5)
    assert both.relation is ZERO_OUT and both.epsilon > one.epsilon
    with pytest.raises(ValueError, match="two populations"):
        spent({charge: 1, Charge(GaussianDpEvent(5.0), REPLACE): 1}, 1e-5)


def test_the_tables_slack_is_nothing_even_over_a_long_run() -> None:
    assert 10**4 * 10**6 * 1000 * skellam_slack(1e9) < 1e-18
    assert 10**4 * 10**6 * 1000 * discrete_gaussian_slack(1e4) < 1e-18


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_values_out_of_range(bad: float) -> None:
    for work in (
        lambda: sample_skellam(bad, 1, Entropy()),
        lambda: skellam_event(bad, 1.0, 1),
        lambda: skellam_event(1.0, bad, 1),
        lambda: concentrated_rho(bad, 2, 1.0, 1),
        lambda: sample_discrete_gaussian(bad, 1, Entropy()),
    ):
        with pytest.raises(ValueError):
            work()
    with pytest.raises(ValueError, match="Skellam"):
        sample_discrete_gaussian(1e6, 1, Entropy())
