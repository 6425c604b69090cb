"""Lattice noise has the law that it claims. False alarms of the statistics: below 1e-7 each."""

import itertools
import math
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import ClassVar

import mpmath
import numpy as np
import pytest
from scipy import stats

from umbel.benchmarks.speed.noise import exact
from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.lattice import LatticeGaussian, _table, _tilt

ALARM = 1e-7


def law(low: int, high: int, steps: float, at: float = 0.0) -> np.ndarray:
    """P(round(at + N) = k) for k in [low, high], the ends taking the tails."""
    edges = (np.arange(low, high) + 0.5 - at) / steps
    return np.diff(np.concatenate([[0.0], stats.norm.cdf(edges), [1.0]]))


def chi_square(draws: np.ndarray, probabilities: np.ndarray, low: int) -> float:
    high = low + len(probabilities) - 1
    counts = np.bincount(np.clip(draws, low, high).astype(int) - low, minlength=len(probabilities))
    return float(stats.chisquare(counts, probabilities * len(draws)).pvalue)


@pytest.mark.parametrize("steps", [8.0, 64.0, 100.5, 128.0, 1024.0])
def test_draws_follow_the_rounded_gaussian(steps: float) -> None:
    draws = LatticeGaussian(steps).sample(400_000)
    low, high = round(-3 * steps), round(3 * steps)
    assert chi_square(draws, law(low, high, steps), low) > ALARM


def test_the_far_tail_is_drawn_as_often_as_it_should() -> None:
    """Beyond 3.3 deviations the guide leaves every draw to the search."""
    draws = LatticeGaussian(128).sample(4_000_000)
    for edge in (3.3, 4.0, 4.5):
        probability = 2 * stats.norm.sf((math.ceil(edge * 128) - 0.5) / 128)
        found = int((np.abs(draws) >= math.ceil(edge * 128)).sum())
        assert stats.binomtest(found, len(draws), probability).pvalue > ALARM


def test_mean_and_deviation() -> None:
    draws = LatticeGaussian(128).sample(4_000_000)
    deviation = math.sqrt(128**2 + 1 / 12)
    assert abs(draws.mean()) < 5.5 * deviation / 2000
    assert abs(draws.std() / deviation - 1) < 5.5 / math.sqrt(2 * len(draws))
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5.5 / 2000


def test_total_variation_of_the_table_is_what_it_says() -> None:
    for steps in (8.0, 128.0, 1024.0):
        table = _table(steps)
        with mpmath.workprec(200):
            edges = [
                mpmath.ncdf((table.lowest + i + mpmath.mpf(0.5)) / mpmath.mpf(steps))
                for i in range(len(table.limits))
            ]
            exact = [b - a for a, b in zip([0, *edges], [*edges, 1], strict=True)]
            limits = [0, *(int(limit) for limit in table.limits), 2**64]
            drawn = [mpmath.mpf(b - a) / 2**64 for a, b in itertools.pairwise(limits)]
            away = mpmath.fsum(abs(a - b) for a, b in zip(exact, drawn, strict=True)) / 2
        assert away <= table.tv <= 2.0**-50
        assert table.tv <= len(limits) * 2.0**-64


def test_the_guide_agrees_with_the_table_for_every_cell() -> None:
    """The draw from a word is the table's, whatever the word."""

    class Fixed(Entropy):
        queue: ClassVar[list[np.ndarray]] = []

        def fill(self, words: np.ndarray) -> None:
            words[:] = self.queue.pop(0)[: len(words)]

    rng = np.random.default_rng(0)
    source = Fixed()
    noise = LatticeGaussian(128, source)
    limits = noise._table.limits
    near = (limits >> np.uint64(32)).astype(np.uint32)
    words = np.concatenate(
        [near, near + 1, near - 1, rng.integers(0, 2**32, 2**16 - 3 * len(near), dtype=np.uint32)]
    ).astype(np.uint32)
    for rest in (0, 2**32 - 1):
        source.queue.extend([words, np.full(len(words), rest, np.uint32)])
        drawn = noise.sample(len(words))
        full = (words.astype(np.uint64) << np.uint64(32)) | np.uint64(rest)
        expected = np.searchsorted(limits, full, side="right") + noise._table.lowest
        assert np.array_equal(expected, drawn)


def test_the_exact_discrete_gaussian_cannot_be_told_apart() -> None:
    """At 64 steps the rounded and the discrete Gaussian differ by 3e-5 in total variation."""
    theirs = np.array([exact(64) for _ in range(4000)])
    ours = LatticeGaussian(64).sample(400_000)
    assert stats.ks_2samp(theirs, ours).pvalue > ALARM


@pytest.mark.parametrize("at", [0.0, 0.25, 0.5, 0.999, -3.3])
def test_noise_on_a_real_value_is_the_rounded_sum(at: float) -> None:
    low, high = -24, 24
    out = LatticeGaussian(8).add(np.full(600_000, at))
    assert np.array_equal(out, np.round(out))
    assert chi_square(out, law(low, high, 8, at), low) > ALARM


@pytest.mark.parametrize("steps", [8.0, 128.0])
def test_the_carry_is_as_exact_as_tv_per_sample_says(steps: float) -> None:
    rng = np.random.default_rng(1)
    rest = np.concatenate([rng.random(12), [0.5, 2.0**-30, 1 - 2.0**-30]])
    noise = rng.integers(-int(9 * steps), int(9 * steps), len(rest)).astype(float)
    found = _tilt(rest, noise, steps)
    for r, k, tilt in zip(rest, noise, found, strict=True):
        with mpmath.workprec(200):
            top = mpmath.ncdf((k + mpmath.mpf(0.5)) / steps)
            cut = mpmath.ncdf((k + mpmath.mpf(0.5) - mpmath.mpf(r)) / steps)
            bottom = mpmath.ncdf((k - mpmath.mpf(0.5)) / steps)
            exact = (top - cut) / (top - bottom) - mpmath.mpf(r)
        bound = (abs(k) + 1) / (4 * steps**2)
        assert abs(tilt) <= bound
        assert abs(tilt - exact) < 2.0**-51 * bound


def test_values_that_have_no_place_are_refused() -> None:
    for bad in (np.nan, np.inf, 1e30):
        with pytest.raises(ValueError, match="2\\*\\*52"):
            LatticeGaussian().add(np.array([0.0, bad]))


@pytest.mark.parametrize("steps", [0.0, 7.9, 2049.0, math.nan])
def test_steps_out_of_range_are_refused(steps: float) -> None:
    with pytest.raises(ValueError, match="steps"):
        LatticeGaussian(steps)


def test_only_an_insecure_seed_repeats() -> None:
    def draw(entropy: Entropy) -> list[int]:
        return LatticeGaussian(128, entropy).sample(50).tolist()

    np.random.seed(0)
    first = draw(Entropy())
    np.random.seed(0)
    assert draw(Entropy()) != first
    assert draw(Entropy(insecure_seed=1)) == draw(Entropy(insecure_seed=1))
    assert Entropy().secure
    assert not Entropy(insecure_seed=1).secure


def _draw(noise: LatticeGaussian, answers: Connection) -> None:
    answers.send(noise.sample(50).tolist())


def _draw_and_fork(answers: Connection) -> None:
    noise = LatticeGaussian(128)
    noise.sample(10)
    child = multiprocessing.get_context("fork").Process(target=_draw, args=(noise, answers))
    child.start()
    child.join()
    _draw(noise, answers)


def test_a_forked_process_does_not_repeat_its_parents_noise(
    fresh_processes: ForkServerContext,
) -> None:
    answers, ours = fresh_processes.Pipe(duplex=False)
    with answers, ours:
        parent = fresh_processes.Process(target=_draw_and_fork, args=(ours,))
        parent.start()
        parent.join(60)
        assert parent.exitcode == 0
        assert answers.recv() != answers.recv()
