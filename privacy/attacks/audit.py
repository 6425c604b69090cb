"""Lower bounds on epsilon from what an attack measured; and one estimate, marked as such.

A *bound* holds with the stated confidence whatever the mechanism is: where it lies above the
epsilon that is claimed, the claim is wrong. An *estimate* may lie on either side of the truth.

    clopper_pearson_bound   many runs, one canary, any mechanism
    gaussian_bound          many runs, one canary, a mechanism that acts like a Gaussian one
    one_run_audit           one run, many canaries, any mechanism
    one_shot_estimate       one run, many random canary clients: an estimate

The inverse question, what an attacker may reach under a claimed (epsilon, delta), is answered by
`true_positive_ceiling`, `advantage_ceiling` and `auc_ceiling`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from umbel.privacy.noise.gaussian import gaussian_epsilon

Scores = NDArray[np.float64]
"""One number a canary or an example; larger means "I think it took part"."""

EPSILON_LIMIT = 200.0
"""Searches end here; no attack that can be run measures more."""

GUESS_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""How many of the canaries are guessed, as fractions. The confidence is shared among them."""


@dataclass(frozen=True)
class LowerBound:
    """With probability `confidence`, the mechanism is not (epsilon, delta)-DP for less than this.

    Attributes:
        epsilon: the bound; 0 where nothing was learnt.
        delta: at which it holds.
        confidence: of the statement, e.g. 0.95.
        trials: canaries or runs that it rests on.
        method: the estimator's name.
    """

    epsilon: float
    delta: float
    confidence: float
    trials: int
    method: str

    def refutes(self, claimed: float) -> bool:
        """Whether a claim of epsilon = `claimed` (at the same delta) is shown to be wrong."""
        return self.epsilon > claimed


@dataclass(frozen=True)
class Estimate:
    """A point estimate of epsilon. It is no bound: it may lie above or below the truth."""

    epsilon: float
    delta: float
    canaries: int
    method: str


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a binomial proportion (Clopper and Pearson 1934).

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        confidence: of the interval.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: successes do not fit trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = (
        stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    )
    return float(low), float(high)


@dataclass(frozen=True)
class Errors:
    """What a two-hypothesis attack got wrong in independent runs.

    Attributes:
        false_positives: runs without the canary in which the attack said that it was there.
        without: runs without the canary.
        false_negatives: runs with the canary in which the attack said that it was not there.
        with_: runs with the canary.
    """

    false_positives: int
    without: int
    false_negatives: int
    with_: int

    def upper(self, confidence: float) -> tuple[float, float]:
        """Upper ends of the false positive and the false negative rate's intervals."""
        _, positive = clopper_pearson(self.false_positives, self.without, confidence)
        _, negative = clopper_pearson(self.false_negatives, self.with_, confidence)
        return positive, negative


def errors_at(with_: Scores, without: Scores, threshold: float) -> Errors:
    """The errors of the attack that says "there" above `threshold`.

    The threshold must not have been chosen on these same scores.
    """
    return Errors(
        int(np.sum(without > threshold)), len(without), int(np.sum(with_ <= threshold)), len(with_)
    )


def clopper_pearson_bound(
    errors: Errors, delta: float = 0.0, confidence: float = 0.95
) -> LowerBound:
    """The bound from error rates that any (epsilon, delta)-DP mechanism forces on an attack.

    Kairouz, Oh, Viswanath 2015: FPR + e^eps FNR >= 1 - delta, and the same with both exchanged.
    Both rates are replaced by the upper ends of two-sided intervals, as in Nasr et al. 2021,
    section V: 100 runs of each kind without an error give 3.28 at most.
    """
    positive, negative = errors.upper(confidence)
    ratios = [
        (1 - delta - missed) / wrong
        for wrong, missed in ((positive, negative), (negative, positive))
        if 1 - delta - missed > 0
    ]
    epsilon = max([0.0, *(math.log(ratio) for ratio in ratios)])
    return LowerBound(epsilon, delta, confidence, errors.with_ + errors.without, "clopper-pearson")


def gaussian_bound(errors: Errors, delta: float, confidence: float = 0.95) -> LowerBound:
    """The bound for a mechanism whose trade-off curve is a Gaussian one (mu-GDP).

    mu >= Phi^-1(1 - FPR) - Phi^-1(FNR), turned to epsilon at `delta` (Nasr et al. 2023,
    arXiv:2302.07956, section 4). Much tighter than Clopper-Pearson's, but it holds only for
    Gaussian mechanisms (and their compositions), not for subsampled ones.
    """
    positive, negative = errors.upper(confidence)
    mu = float(stats.norm.isf(positive) - stats.norm.ppf(negative))
    return LowerBound(
        gaussian_epsilon(1 / mu, delta) if mu > 0 else 0.0,
        delta,
        confidence,
        errors.with_ + errors.without,
        "gaussian-dp",
    )


def one_run_p_value(
    epsilon: float, *, canaries: int, guesses: int, right: int, delta: float
) -> float:
    """How likely `right` or more right guesses are under (epsilon, delta)-DP, at most.

    Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), theorem 5.2: a guess is right with
    probability q = e^eps / (1 + e^eps) at most, independently; delta adds
    2 m delta max_i P[v > Bin(r, q) >= v - i] / i.
    """
    q = 1 / (1 + math.exp(-epsilon))
    tail = 1.0 if right == 0 else float(special.bdtrc(right - 1, guesses, q))
    if delta == 0 or right == 0:
        return tail
    below = np.arange(
        right - 1, -1, -1
    )  # v - 1, v - 2, ... 0: their first i are P[v > Bin >= v - i]
    ways = special.gammaln(guesses + 1) - special.gammaln(below + 1)
    ways -= special.gammaln(guesses - below + 1)
    mass = np.exp(
        ways + below * math.log(q) - (guesses - below) * (epsilon + math.log1p(math.exp(-epsilon)))
    )
    between = float(np.max(np.cumsum(mass) / np.arange(1, right + 1)))
    return min(1.0, tail + 2 * canaries * delta * between)


def one_run_bound(
    *, canaries: int, guesses: int, right: int, delta: float = 0.0, confidence: float = 0.95
) -> LowerBound:
    """The bound of a one-run audit whose number of guesses was fixed before it was seen.

    Args:
        canaries: m, each included by its own fair coin.
        guesses: r, canaries that the attacker guessed; it abstained on the others.
        right: v, guesses that were right.
        delta: of the claim.
        confidence: of the bound.

    Raises:
        ValueError: right <= guesses <= canaries does not hold.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            f"{right} right of {guesses} guesses on {canaries} canaries cannot be: "
            "right <= guesses <= canaries"
        )
    p_limit = 1 - confidence
    epsilon = _largest(
        lambda eps: (
            one_run_p_value(eps, canaries=canaries, guesses=guesses, right=right, delta=delta)
            < p_limit
        )
    )
    return LowerBound(epsilon, delta, confidence, canaries, "one-run")


def one_run_audit(
    scores: Scores,
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
    fractions: Sequence[float] = GUESS_FRACTIONS,
) -> LowerBound:
    """Guess which canaries were in one run, and bound epsilon by how often that was right.

    The r/2 canaries with the largest scores are guessed in, the r/2 smallest out. The best of
    several r is reported, so each is tested at a share of 1 - confidence (Bonferroni).

    Args:
        scores: shape (m,), larger for canaries that look included.
        included: shape (m,), the coins.
        delta: of the claim.
        confidence: of the bound.
        fractions: the r to try, as fractions of m.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(f"{scores.shape} scores do not fit {included.shape} coins")
    if not np.isfinite(scores).all():
        raise ValueError("a canary's score is NaN or infinite; the attack must give numbers")
    order = np.argsort(scores, kind="stable")
    single = 1 - (1 - confidence) / len(fractions)
    best = 0.0
    for fraction in fractions:
        half = max(1, int(fraction * len(scores)) // 2)
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        bound = one_run_bound(
            canaries=len(scores),
            guesses=2 * half,
            right=right,
            delta=delta,
            confidence=single,
        )
        best = max(best, bound.epsilon)
    return LowerBound(best, delta, confidence, len(scores), "one-run")


@dataclass(frozen=True)
class Normal:
    """A normal distribution."""

    mean: float
    std: float


def hockey_stick(p: Normal, q: Normal, epsilon: float) -> float:
    """sup over events S of p(S) - e^epsilon q(S), for two normal distributions; exact.

    The best event is where log p - log q > epsilon: the inside or outside of the roots of a
    quadratic.
    """
    a = 0.5 / q.std**2 - 0.5 / p.std**2
    b = p.mean / p.std**2 - q.mean / q.std**2
    c = (
        0.5 * (q.mean / q.std) ** 2
        - 0.5 * (p.mean / p.std) ** 2
        - math.log(p.std / q.std)
        - epsilon
    )
    event = _where_positive(a, b, c)
    factor = math.exp(epsilon)
    return max(0.0, sum(_mass(p, *part) - factor * _mass(q, *part) for part in event))


def epsilon_of_normals(p: Normal, q: Normal, delta: float) -> float:
    """The epsilon at which p and q are (epsilon, delta)-indistinguishable, both ways."""
    return _largest(lambda eps: max(hockey_stick(p, q, eps), hockey_stick(q, p, eps)) > delta)


def one_shot_estimate(cosines: Scores, *, size: int, delta: float) -> Estimate:
    """Epsilon of one training run from the cosines of random canary clients with its result.

    Andrew et al. 2023 (arXiv:2302.03098), algorithm 1. A direction that did not take part has a
    cosine of N(0, 1/d); those that did are fitted by a normal distribution.

    Args:
        cosines: shape (k,), of each canary's unit update with the sum of the released updates.
        size: d, coordinates of an update.
        delta: at which epsilon is wanted.

    Raises:
        ValueError: fewer than 2 canaries.
    """
    if len(cosines) < 2:
        raise ValueError("an estimate needs at least 2 canary clients; 1000 are recommended")
    inside = Normal(float(np.mean(cosines)), float(np.std(cosines, ddof=1)))
    outside = Normal(0.0, 1 / math.sqrt(size))
    return Estimate(
        epsilon_of_normals(inside, outside, delta), delta, len(cosines), "one-shot (estimate)"
    )


def true_positive_ceiling(rate: Any, epsilon: float, delta: float) -> NDArray[np.float64]:
    """The largest true positive rate that (epsilon, delta)-DP allows at a false positive rate."""
    rate = np.asarray(rate, dtype=np.float64)
    grown = np.exp(min(epsilon, EPSILON_LIMIT)) * rate + delta
    mirrored = 1 - (1 - delta - rate) * np.exp(-min(epsilon, EPSILON_LIMIT))
    ceiling: NDArray[np.float64] = np.clip(np.minimum(grown, mirrored), 0.0, 1.0)
    return ceiling


def advantage_ceiling(epsilon: float, delta: float) -> float:
    """The largest TPR - FPR under (epsilon, delta)-DP: (e^eps - 1 + 2 delta) / (e^eps + 1)."""
    if epsilon >= EPSILON_LIMIT:
        return 1.0
    return (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)


def auc_ceiling(epsilon: float, delta: float) -> float:
    """The largest area under a ROC curve under (epsilon, delta)-DP; 1 without a guarantee."""
    if epsilon >= EPSILON_LIMIT:
        return 1.0
    corner = (1 - delta) / (1 + math.exp(epsilon))
    rates = np.array([0.0, corner, 1 - delta, 1.0])
    return float(np.trapezoid(true_positive_ceiling(rates, epsilon, delta), rates))


def _largest(holds: Any) -> float:
    """The end of the interval from 0 on which a monotone condition holds; 0 where it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        if high >= EPSILON_LIMIT:
            return EPSILON_LIMIT
        low, high = high, min(2 * high, EPSILON_LIMIT)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _where_positive(a: float, b: float, c: float) -> list[tuple[float, float]]:
    """The intervals on which a x^2 + b x + c > 0."""
    if a == 0:
        if b == 0:
            return [(-math.inf, math.inf)] if c > 0 else []
        return [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    inner = b * b - 4 * a * c
    if inner <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    # The root that does not cancel first; the other from the product of both.
    big = -0.5 * (b + math.copysign(math.sqrt(inner), b))
    low, high = sorted((big / a, c / big if big else 0.0))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]


def _mass(normal: Normal, low: float, high: float) -> float:
    """The probability of (low, high), taken on the side where it does not cancel."""
    left, right = (low - normal.mean) / normal.std, (high - normal.mean) / normal.std
    if left > 0:
        return float(stats.norm.sf(left) - stats.norm.sf(right))
    return float(stats.norm.cdf(right) - stats.norm.cdf(left))
