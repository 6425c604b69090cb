"""Curves, areas and rates against direct counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.attacks.roc import (
    above_ceiling,
    attacked,
    auc,
    percentiles,
    roc,
    true_positive_rate,
)

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=30).map(
    lambda values: np.array(values, dtype=float)
)


@given(scores, scores)
@settings(max_examples=60, deadline=None)
def test_auc_counts_pairs_and_is_the_area_of_the_curve(
    with_: np.ndarray, without: np.ndarray
) -> None:
    pairs = np.mean(
        (with_[:, None] > without) + 0.5 * (with_[:, None] == without), dtype=np.float64
    )
    area = auc(with_, without)
    assert area.value == pytest.approx(pairs)
    assert area.low <= area.value <= area.high
    curve = roc(with_, without)
    assert np.trapezoid(curve.true_positives, curve.false_positives) == pytest.approx(pairs)


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_rate_is_the_curve_at_that_rate(
    with_: np.ndarray, without: np.ndarray, rate: float
) -> None:
    curve = roc(with_, without)
    allowed = curve.false_positives <= rate + 1e-12
    best = curve.true_positives[allowed].max()
    assert true_positive_rate(with_, without, rate).value == pytest.approx(best)


def test_interval_of_the_area_holds_the_truth() -> None:
    # N(1, 1) against N(0, 1): AUC is Phi(1 / sqrt 2) = 0.76025. Of 200 intervals of 95 %, fewer
    # than 174 hold it with a probability of 1e-6.
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        area = auc(1 + rng.normal(size=150), rng.normal(size=120))
        held += area.low <= 0.76025 <= area.high
    assert held >= 174


def test_perfect_separation_is_not_certain() -> None:
    area = auc(np.arange(10.0) + 100, np.arange(20.0))
    assert area.value == 1.0
    assert 0.6 < area.low < 0.75
    assert area.high == 1.0


def test_the_best_attack_on_a_mechanism_stays_at_its_ceiling() -> None:
    # Randomised response with epsilon = 1 is the mechanism that reaches e^eps FPR exactly.
    rng = np.random.default_rng(0)
    keep = np.e / (1 + np.e)
    said = (rng.random(20_000) < keep).astype(float)
    other = (rng.random(20_000) >= keep).astype(float)
    curve = roc(said, other)
    assert abs(above_ceiling(curve, 1.0, 0.0)) < 4.5
    assert above_ceiling(curve, 0.5, 0.0) > 5
    assert above_ceiling(curve, np.inf, 0.0) == -np.inf


def test_chance_is_not_above_zero_epsilon() -> None:
    # The area's deviation is 0.0105; five of them. The curve's largest crossing of 300 such
    # curves was 3.9 standard errors.
    rng = np.random.default_rng(1)
    result = attacked(rng.normal(size=1500), rng.normal(size=1500))
    assert 0.4475 < result.auc.value < 0.5525
    assert result.tpr_at_1_percent.low < 0.03
    assert above_ceiling(result.roc, 0.0, 1e-5) < 5.5


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="without NaN"):
        auc(np.array([np.nan]), np.array([1.0]))


@given(scores)
def test_percentiles_keep_the_order_and_are_the_same_for_any_scale(values: np.ndarray) -> None:
    ranks = percentiles(values)
    assert ranks.min() > 0
    assert ranks.max() < 1
    assert ranks.mean() == pytest.approx(0.5)
    order = np.argsort(values, kind="stable")
    assert np.array_equal(np.sign(np.diff(ranks[order])), np.sign(np.diff(values[order])))
    assert np.array_equal(percentiles(3 * values - 1), ranks)
