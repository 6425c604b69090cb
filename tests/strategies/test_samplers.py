"""Who takes part: sizes, probabilities, seeds and the cap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from umbel.core.errors import ConfigError
from umbel.strategies.samplers import Everyone, FixedSize, Poisson, make_sampler

FALSE_ALARM = 1e-7
"""Of each statistical test below, when the code is right."""

COHORTS: list[Everyone | FixedSize | Poisson] = [
    Everyone(),
    FixedSize(7),
    Poisson(7.5),
    Poisson(7.5, cap=9),
]


@given(st.sampled_from(COHORTS), st.integers(1, 60), st.lists(st.integers(0, 2**64), min_size=1))
def test_positions_are_ascending_distinct_and_seeded(
    cohort: Everyone | FixedSize | Poisson, population: int, entropy: list[int]
) -> None:
    drawn = cohort.draw(population, entropy)
    assert drawn == sorted(set(drawn))
    assert all(type(i) is int and 0 <= i < population for i in drawn)
    assert drawn == cohort.draw(population, entropy)
    assert len(drawn) <= cohort.bounds(population)[1]


@given(st.integers(1, 80), st.integers(1, 60))
def test_a_fixed_cohort_has_its_size(size: int, population: int) -> None:
    assert len(FixedSize(size).draw(population, [1])) == min(size, population)
    assert FixedSize(size).bounds(population) == (min(size, population), min(size, population))
    assert len(FixedSize(size).draw(population, None)) == min(size, population)


def test_rounds_and_seeds_differ() -> None:
    draws = [tuple(FixedSize(10).draw(1000, [seed, n, 1])) for seed in (0, 1) for n in range(50)]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("entropy", ["seeded", "operating system"])
def test_every_node_is_as_likely_as_any_other(entropy: str) -> None:
    """Chi-square over how often each of 50 nodes is in one of 4,000 fixed cohorts of 10."""
    counts = np.zeros(50)
    for number in range(4000):
        counts[FixedSize(10).draw(50, [5, number] if entropy == "seeded" else None)] += 1
    expected = 4000 * 10 / 50
    # drawn without replacement, counts vary 40/49 as much as a multinomial's
    statistic = float(((counts - expected) ** 2 / expected).sum()) / (40 / 49)
    assert statistic < stats.chi2.ppf(1 - FALSE_ALARM, 49)


@pytest.mark.parametrize("entropy", ["seeded", "operating system"])
def test_poisson_sizes_are_binomial_and_nodes_independent(entropy: str) -> None:
    """4,000 rounds over 40 nodes at rate 0.2: size histogram, and pairs of nodes."""
    rounds, population, rate = 4000, 40, 0.2
    cohort = Poisson(rate * population)
    drawn = np.zeros((rounds, population), dtype=bool)
    for number in range(rounds):
        drawn[number, cohort.draw(population, [9, number] if entropy == "seeded" else None)] = True
    sizes = drawn.sum(1)
    edges = np.arange(4, 13)
    observed = [(sizes < 4).sum(), *((sizes == k).sum() for k in edges), (sizes > 12).sum()]
    law = stats.binom(population, rate)
    expected = rounds * np.array([law.cdf(3), *law.pmf(edges), law.sf(12)])
    statistic = float(((np.array(observed) - expected) ** 2 / expected).sum())
    assert statistic < stats.chi2.ppf(1 - FALSE_ALARM, len(expected) - 1)
    together = (drawn.T.astype(int) @ drawn.astype(int))[np.triu_indices(population, 1)]
    pairs = len(together)
    limit = stats.binom.ppf([FALSE_ALARM / pairs / 2, 1 - FALSE_ALARM / pairs / 2], rounds, rate**2)
    assert limit[0] <= together.min() and together.max() <= limit[1]


def test_poisson_expects_a_public_number() -> None:
    assert Poisson(7.5).bounds(100) == (7.5, 100)
    assert Poisson(7.5, cap=9).bounds(100) == (7.5, 9)
    assert Poisson(7.5).bounds(5) == (5.0, 5)
    assert Poisson(200).draw(5, [1]) == [0, 1, 2, 3, 4], "a rate of 1 takes everyone"


def test_a_cap_keeps_a_uniform_part_and_only_of_rounds_that_drew_more() -> None:
    counts, free, capped = np.zeros(30), Poisson(6), Poisson(6, cap=6)
    for number in range(3000):
        all_, kept = free.draw(30, [2, number]), capped.draw(30, [2, number])
        assert len(kept) == min(6, len(all_))
        assert set(kept) <= set(all_)
        assert len(all_) > 6 or kept == all_
        counts[kept] += 1
    expected = counts.mean()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < stats.chi2.ppf(1 - FALSE_ALARM, 29)


def test_unseeded_draws_differ() -> None:
    """Each draw has 100 bits or more: equal ones are beyond any chance."""
    for cohort in (FixedSize(50), Poisson(50)):
        assert cohort.draw(1000, None) != cohort.draw(1000, None)


def test_names_and_sizes_are_checked() -> None:
    assert make_sampler("all", 0) == Everyone()
    assert make_sampler("fixed", 9.2) == FixedSize(10)
    assert make_sampler("poisson", 9.5, 20) == Poisson(9.5, 20)
    assert make_sampler("poisson", 9.5) == Poisson(9.5, None)
    with pytest.raises(ConfigError, match="'fxied'; it can be all, fixed, poisson"):
        make_sampler("fxied", 3)
    for size in (0.0, math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="needs cohort-size"):
            make_sampler("fixed", size)
    with pytest.raises(
        ConfigError, match=r"cohort-cap is 5, below cohort-size 9.5; .* at least 19"
    ):
        make_sampler("poisson", 9.5, 5)
