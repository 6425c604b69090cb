"""Audits: a claim against what canaries measure, through the stack that makes it.

Canary nodes send a direction of their own, as long as the stack lets through and ten times
longer before clipping, or nothing, by a coin. The attacker reads each coin from a view. Whatever
epsilon the stack claims for that run, the lower bound must stay below it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from umbel.benchmarks.attack.defences import Schedule, finite, promised
from umbel.benchmarks.attack.tasks import CanaryTrainer, Coins
from umbel.benchmarks.attack.views import Adversary, Attackable, Played, View, play
from umbel.privacy.attacks.audit import (
    Scores,
    clopper_pearson_bound,
    errors_at,
    gaussian_bound,
    one_run_audit,
    one_shot_estimate,
)
from umbel.strategies.stack import Stack

LONGER = 10.0
"""A canary's update before clipping, in clipping norms."""
WEIGHT = 10
"""Examples that a canary says it has."""

ADVERSARIES: tuple[Adversary, ...] = ("model-user", "server")
"""Against whom claims are made."""

Make = Callable[..., Attackable]
"""`umbel.Federation`, or what takes the same arguments."""


@dataclass(frozen=True)
class Audit:
    """A claim and a measurement of it.

    Attributes:
        subject: the stack that was audited.
        adversary: whose view was used.
        unit: whose presence the claim hides.
        method: the estimator.
        claimed: epsilon; None where nothing is claimed.
        measured: the lower bound, or the estimate.
        delta: of both.
        confidence: of the bound; None for an estimate.
        canaries: or runs, that it rests on.
    """

    subject: str
    adversary: str
    unit: str
    method: str
    claimed: float | None
    measured: float
    delta: float
    confidence: float | None
    canaries: int

    @property
    def is_bound(self) -> bool:
        """An estimate may lie above the truth and refutes nothing."""
        return self.confidence is not None

    @property
    def refuted(self) -> bool:
        """A claim was made, and a bound lies above it."""
        return self.is_bound and self.claimed is not None and self.measured > self.claimed

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "bound": self.is_bound, "refuted": self.refuted}


@dataclass(frozen=True)
class CanaryRun:
    """A run of canary nodes.

    Attributes:
        played: the run.
        coins: which canaries were in.
        schedule: of the run.
        trainer: knows the directions.
    """

    played: Played
    coins: np.ndarray[Any, np.dtype[np.bool_]]
    schedule: Schedule
    trainer: CanaryTrainer

    def scores(self, adversary: Adversary) -> Scores:
        """How much of its direction each canary left in what this adversary sees."""
        return read_canaries(self.played.view(adversary), self.trainer, len(self.coins))


def alone(canaries: int, delta: float, norm: float = 1.0) -> Schedule:
    """One round in which all canary nodes take part."""
    return Schedule(1, canaries, float(canaries), delta, norm)


def run_canaries(
    make: Make,
    build: Callable[[Schedule], Stack],
    schedule: Schedule,
    *,
    seed: int,
    size: int | None = None,
    random: bool = False,
    everyone: bool = False,
) -> CanaryRun:
    """One run of `schedule.nodes` canary nodes under a stack.

    Args:
        make: makes a federation.
        build: the stack.
        schedule: of the run.
        seed: of the coins.
        size: coordinates of an update; one a canary if None.
        random: random directions in place of coordinates.
        everyone: all coins are heads, for estimates that compare with fresh directions.
    """
    canaries = schedule.nodes
    coins = np.random.default_rng([seed, 7]).random(canaries) < 0.5
    coins |= everyone
    trainer = CanaryTrainer(size or canaries, LONGER * schedule.norm, WEIGHT, random)
    federation = make(
        trainer=trainer,
        data=Coins(coins),
        stack=build(schedule),
        name="canaries",
        options={"client-eval-every": -1},
    )
    played = play(federation, canaries, {**schedule.options(), "seed": seed})
    return CanaryRun(played, coins, schedule, trainer)


def read_canaries(view: View, trainer: CanaryTrainer, canaries: int) -> Scores:
    """Each canary's score: from its own reply where that can be read, else from the models."""
    scores = np.zeros(canaries)
    if view.replies and view.replies[0]:
        for replies in view.replies:
            for node, reply in replies.items():
                scores[node] += float(reply @ trainer.direction(node).double())
        return scores
    change = view.final.double()  # the first model is public, and zero
    if not trainer.random:
        return np.asarray(change[:canaries].numpy(), dtype=np.float64)
    return np.array([float(change @ trainer.direction(node).double()) for node in range(canaries)])


def claims_of(played: Played, stack: Stack, schedule: Schedule) -> dict[str, float]:
    """Epsilon by adversary: as the run itself reported it, else as the stack's claims come to."""
    reported: Mapping[str, Any] = played.result.get("epsilon_against") or {}
    if reported:  # infinite where nothing is promised
        return {who: value for who, value in reported.items() if finite(value) is not None}
    return promised(stack, played.manifest.size, schedule)


def audit_clients(
    make: Make, name: str, build: Callable[[Schedule], Stack], schedule: Schedule, *, seed: int
) -> list[Audit]:
    """One run and its one-run bounds, through the whole stack, for both adversaries."""
    run = run_canaries(make, build, schedule, seed=seed)
    claimed = claims_of(run.played, build(schedule), schedule)
    found = []
    for adversary in ADVERSARIES:
        bound = one_run_audit(run.scores(adversary), run.coins, delta=schedule.delta)
        found.append(
            Audit(
                subject=name,
                adversary=adversary,
                unit="client",
                method=bound.method,
                claimed=claimed.get(adversary),
                measured=bound.epsilon,
                delta=schedule.delta,
                confidence=bound.confidence,
                canaries=schedule.nodes,
            )
        )
    return found


def estimate_clients(
    make: Make,
    name: str,
    build: Callable[[Schedule], Stack],
    schedule: Schedule,
    *,
    size: int,
    seed: int,
) -> Audit:
    """One run with random canary clients: Andrew et al.'s estimate, which is no bound."""
    run = run_canaries(make, build, schedule, seed=seed, size=size, random=True, everyone=True)
    cosines = run.scores("model-user") / float(run.played.final.double().norm())
    estimate = one_shot_estimate(cosines, size=size, delta=schedule.delta)
    return Audit(
        subject=name,
        adversary="model-user",
        unit="client",
        method=estimate.method,
        claimed=claims_of(run.played, build(schedule), schedule).get("model-user"),
        measured=estimate.epsilon,
        delta=schedule.delta,
        confidence=None,
        canaries=schedule.nodes,
    )


def audit_mechanism(
    make: Make,
    name: str,
    build: Callable[[Schedule], Stack],
    schedule: Schedule,
    *,
    runs: int,
    seed: int,
) -> list[Audit]:
    """Clopper-Pearson and Gaussian-DP bounds for a noise mechanism alone.

    Coordinates of one release carry independent noise, so each canary is a trial of its own; the
    threshold is chosen on the first half of the runs and judged on the second.
    """
    with_: list[Scores] = []
    without: list[Scores] = []
    claimed: dict[str, float] = {}
    for at in range(runs):
        run = run_canaries(make, build, schedule, seed=seed + at)
        scores = run.scores("model-user")
        with_.append(scores[run.coins])
        without.append(scores[~run.coins])
        claimed = claims_of(run.played, build(schedule), schedule)
    half = runs // 2
    threshold = _best_threshold(with_[:half], without[:half], schedule.delta)
    held = np.concatenate(with_[half:]), np.concatenate(without[half:])
    errors = errors_at(*held, threshold)
    bounds = (
        clopper_pearson_bound(errors, schedule.delta),
        gaussian_bound(errors, schedule.delta),
    )
    return [
        Audit(
            subject=name,
            adversary="model-user",
            unit="client",
            method=bound.method,
            claimed=claimed.get("model-user"),
            measured=bound.epsilon,
            delta=schedule.delta,
            confidence=bound.confidence,
            canaries=bound.trials,
        )
        for bound in bounds
    ]


def _best_threshold(with_: list[Scores], without: list[Scores], delta: float) -> float:
    """Where the Gaussian bound of these scores is largest; for use on other scores."""
    inside, outside = np.concatenate(with_), np.concatenate(without)
    places = np.quantile(np.concatenate([inside, outside]), np.linspace(0.02, 0.98, 49))
    bounds = [gaussian_bound(errors_at(inside, outside, float(t)), delta) for t in places]
    return float(places[int(np.argmax([bound.epsilon for bound in bounds]))])
