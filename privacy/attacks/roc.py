"""How well a score tells those who took part from those who did not, with intervals.

Every attack of the house ends in two sets of scores; larger means "took part".
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from umbel.privacy.attacks.audit import Scores, clopper_pearson


@dataclass(frozen=True)
class Interval:
    """A measured value and its confidence interval.

    Attributes:
        value: the point.
        low: lower end.
        high: upper end.
        confidence: of the interval.
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Roc:
    """A receiver operating characteristic: one point a threshold, from (0, 0) to (1, 1).

    Attributes:
        false_positives: shape (t,), rates in ascending order.
        true_positives: shape (t,), rates in ascending order.
        without: scores of non-members that it was made of.
        with_: scores of members that it was made of.
    """

    false_positives: Scores
    true_positives: Scores
    without: int
    with_: int


@dataclass(frozen=True)
class Attacked:
    """What one attack reached, against members it should not be able to tell apart.

    Attributes:
        auc: area under the curve; 0.5 is chance.
        tpr_at_1_percent: true positive rate where 1 % of non-members are accused.
        tpr_at_01_percent: the same at 0.1 %.
        roc: the whole curve.
    """

    auc: Interval
    tpr_at_1_percent: Interval
    tpr_at_01_percent: Interval
    roc: Roc


def attacked(with_: Scores, without: Scores) -> Attacked:
    """Judge an attack by its scores of members and of non-members."""
    return Attacked(
        auc(with_, without),
        true_positive_rate(with_, without, 0.01),
        true_positive_rate(with_, without, 0.001),
        roc(with_, without),
    )


def roc(with_: Scores, without: Scores) -> Roc:
    """The curve over all thresholds; tied scores make one step."""
    with_, without = _checked(with_), _checked(without)
    thresholds = np.unique(np.concatenate([with_, without]))[::-1]
    hits = len(with_) - np.searchsorted(np.sort(with_), thresholds, side="left")
    alarms = len(without) - np.searchsorted(np.sort(without), thresholds, side="left")
    return Roc(
        np.concatenate([[0.0], alarms / len(without)]),
        np.concatenate([[0.0], hits / len(with_)]),
        len(without),
        len(with_),
    )


def percentiles(scores: Scores) -> Scores:
    """Each score's rank among all of them, in (0, 1); ties share the middle of their ranks.

    It keeps every threshold of one run, and makes the scores of several runs comparable.
    """
    scores = _checked(scores)
    ranks: Scores = (stats.rankdata(scores) - 0.5) / len(scores)
    return ranks


def auc(with_: Scores, without: Scores, confidence: float = 0.95) -> Interval:
    """Area under the curve with the interval of DeLong et al. 1988; ties count one half.

    Edge cases: where the samples do not overlap the variance vanishes; the interval then is the
    Clopper-Pearson one of as many trials as the smaller sample has.
    """
    with_, without = _checked(with_), _checked(without)
    ranks = stats.rankdata(np.concatenate([with_, without]))
    above = (ranks[: len(with_)] - stats.rankdata(with_)) / len(without)
    below = 1 - (ranks[len(with_) :] - stats.rankdata(without)) / len(with_)
    value = float(above.mean())
    variance = _variance(above) + _variance(below)
    if variance == 0:
        trials = min(len(with_), len(without))
        return Interval(value, *clopper_pearson(round(value * trials), trials, confidence))
    reach = float(stats.norm.isf((1 - confidence) / 2)) * math.sqrt(variance)
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach), confidence)


def true_positive_rate(
    with_: Scores, without: Scores, rate: float, confidence: float = 0.95
) -> Interval:
    """Members accused by the threshold that accuses at most `rate` of the non-members.

    The interval is Clopper and Pearson's for the threshold that was found; it does not cover the
    threshold's own uncertainty, which matters where rate * len(without) is only a few.
    """
    with_, without = _checked(with_), _checked(without)
    allowed = int(rate * len(without))
    threshold = np.sort(without)[::-1][allowed] if allowed < len(without) else -math.inf
    hits = int(np.sum(with_ > threshold))
    low, high = clopper_pearson(hits, len(with_), confidence)
    return Interval(hits / len(with_), low, high, confidence)


def above_ceiling(curve: Roc, epsilon: float, delta: float) -> float:
    """By how many standard errors the curve rises above e^epsilon FPR + delta, at most.

    Rates are smoothed (Agresti and Coull) before the error is taken, so that a curve's first
    steps are not credited with certainty. Negative where the curve stays below.
    """
    if not math.isfinite(epsilon):
        return -math.inf
    factor = math.exp(epsilon)
    excess = curve.true_positives - factor * curve.false_positives - delta
    spread = np.sqrt(
        _smoothed_variance(curve.true_positives, curve.with_)
        + factor**2 * _smoothed_variance(curve.false_positives, curve.without)
    )
    return float(np.max(excess / spread))


def _smoothed_variance(rate: Scores, trials: int) -> Scores:
    smooth: NDArray[np.float64] = (rate * trials + 2) / (trials + 4)
    variance: NDArray[np.float64] = smooth * (1 - smooth) / (trials + 4)
    return variance


def _variance(values: Scores) -> float:
    """Variance of a mean; 0 for a single value."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def _checked(scores: Scores) -> Scores:
    """Scores as floats; infinities are ranks too, NaN and emptiness are mistakes."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(
            f"an attack needs scores of members and of non-members without NaN, in one dimension "
            f"each; one of them has shape {scores.shape}"
        )
    return scores
