"""The banded factor: what it protects, by brute force, and that it is the best for its rounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.budget.banded import BandedSchedule, _log_error, _workload


def factor(schedule: BandedSchedule, rounds: int) -> np.ndarray:  # type: ignore[type-arg]
    """C itself, shape (rounds, rounds)."""
    matrix = np.zeros((rounds, rounds))
    for lag, value in enumerate(schedule.diagonals[:rounds]):
        matrix += value * np.eye(rounds, k=-lag)
    return matrix


def squared_sensitivity(matrix: np.ndarray, separation: int) -> float:  # type: ignore[type-arg]
    """The worst of all participations: at each, an update of length 1 or -1.

    Updates of other directions are covered: rows of C are linear in them, and for factors whose
    participations touch no common row their lengths are all that counts.
    """
    rounds, worst = len(matrix), 0.0
    for pattern in itertools.product((0, 1, -1), repeat=rounds):
        places = [i for i, value in enumerate(pattern) if value]
        if all(b - a >= separation for a, b in itertools.pairwise(places)):
            worst = max(worst, float(np.sum((matrix @ np.array(pattern)) ** 2)))
    return worst


@pytest.mark.parametrize(("bands", "separation"), [(1, 1), (2, 2), (2, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_participation_shows_more_than_is_charged(
    bands: int, separation: int, momentum: float
) -> None:
    rounds = 7
    schedule = BandedSchedule(bands, separation, rounds, momentum)
    found = squared_sensitivity(factor(schedule, rounds), separation)
    charged = sum(schedule.growth(step) for step in range(1, rounds + 1))
    assert found <= charged
    if separation == 1:
        assert found == pytest.approx(charged, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    bands=st.integers(1, 24),
    rounds=st.integers(1, 200),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_the_factor_is_never_worse_than_the_square_root(
    bands: int, rounds: int, momentum: float
) -> None:
    best = BandedSchedule(bands, bands, rounds, momentum)
    plain = BandedSchedule(bands, bands, momentum=momentum)
    assert best.error(rounds) <= plain.error(rounds) * (1 + 1e-12)
    assert np.linalg.norm(best.diagonals) <= 1
    assert len(best.diagonals) == bands


def test_it_is_clearly_better_where_bands_are_few_for_the_rounds() -> None:
    # Computed once more below, by matrices.
    best, plain = BandedSchedule(20, 20, 300), BandedSchedule(20, 20)
    assert best.error(300) < 0.95 * plain.error(300)
    fast, slow = BandedSchedule(20, 20, 300, momentum=0.9), BandedSchedule(20, 20, momentum=0.9)
    assert fast.error(300) < 0.85 * slow.error(300)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_error_is_that_of_the_matrices(momentum: float) -> None:
    rounds = 40
    schedule = BandedSchedule(5, 7, rounds, momentum)
    decay = np.array(
        [[momentum ** (i - j) if i >= j else 0.0 for j in range(40)] for i in range(40)]
    )
    models = np.tril(np.ones((rounds, rounds))) @ decay
    noise = models @ np.linalg.inv(factor(schedule, rounds))
    assert schedule.error(rounds) == pytest.approx(np.sqrt(np.sum(noise**2) / rounds), rel=1e-9)


def test_nothing_near_the_factor_is_better() -> None:
    source, workload = np.random.default_rng(5), _workload(60, 0.0)
    best = np.array(BandedSchedule(6, 6, 60).diagonals)
    value, gradient = _log_error(best, workload)
    assert np.abs(gradient).max() < 1e-3
    for _ in range(50):
        near = best + source.normal(size=6) * 1e-2
        assert _log_error(near, workload)[0] >= value - 1e-9


def test_the_gradient_is_the_slope() -> None:
    at, workload = np.array([1.0, 0.4, 0.3, 0.2]), _workload(30, 0.5)
    value, gradient = _log_error(at, workload)
    for place in range(4):
        moved = at.copy()
        moved[place] += 1e-6
        slope = (_log_error(moved, workload)[0] - value) / 1e-6
        assert slope == pytest.approx(gradient[place], abs=1e-4)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_that_never_ends_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="from 0 up to 1"):
        BandedSchedule(2, 2, 10, momentum)
