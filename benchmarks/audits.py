"""Audits: a claim against what canaries measure, through the stack that makes it.

Canary nodes send a direction of their own, as long as the stack lets through and ten times
longer before clipping, or nothing, by a coin. The attacker reads each coin from a view. Whatever
epsilon the stack claims for that run, the lower bound must stay below it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from umbel.benchmarks.defences import Schedule, promised
from umbel.benchmarks.tasks import CanaryTrainer, Coins
from umbel.benchmarks.views import Adversary, Attackable, Played, View, play
from umbel.privacy.audit import (
    Errors,
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


def run_canaries(
    make: Make,
    build: Callable[[Schedule], Stack],
    *,
    canaries: int,
    delta: float,
    seed: int,
    size: int | None = None,
    random: bool = False,
    rounds: int = 1,
    everyone: bool = False,
) -> CanaryRun:
    """One run of `canaries` nodes under a stack; all take part in every round.

    Args:
        make: makes a federation.
        build: the stack.
        canaries: nodes.
        delta: of the claim.
        seed: of the coins.
        size: coordinates of an update; one a canary if None.
        random: random directions in place of coordinates.
        rounds: of the run.
        everyone: all coins are heads, for estimates that compare with fresh directions.
    """
    norm = 1.0
    schedule = Schedule(rounds, canaries, float(canaries), delta, norm)
    coins = np.random.default_rng([seed, 7]).random(canaries) < 0.5
    coins |= everyone
    trainer = CanaryTrainer(size or canaries, LONGER * norm, WEIGHT, random)
    federation = make(
        trainer=trainer, data=Coins(coins), stack=build(schedule), name="canaries",
        options={"federated-every": -1},
    )  # fmt: skip
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


def audit_clients(
    make: Make, name: str, build: Callable[[Schedule], Stack], *, adversary: Adversary,
    canaries: int, delta: float, seed: int,
) -> Audit:  # fmt: skip
    """One run, one-run bound, through the whole stack."""
    run = run_canaries(make, build, canaries=canaries, delta=delta, seed=seed)
    claimed = promised(build(run.schedule), run.trainer.size, run.schedule, sampled=False)
    bound = one_run_audit(run.scores(adversary), run.coins, delta=delta)
    return Audit(
        subject=name,
        adversary=adversary,
        unit="client",
        method="one-run",
        claimed=claimed.get("server" if adversary == "server" else "model-user"),
        measured=bound.epsilon,
        delta=delta,
        confidence=bound.confidence,
        canaries=canaries,
    )


def estimate_clients(
    make: Make, name: str, build: Callable[[Schedule], Stack], *, canaries: int, size: int,
    delta: float, seed: int,
) -> Audit:  # fmt: skip
    """One run with random canary clients: Andrew et al.'s estimate, which is no bound."""
    run = run_canaries(
        make, build, canaries=canaries, delta=delta, seed=seed, size=size, random=True,
        everyone=True,
    )  # fmt: skip
    change = run.played.final.double()
    cosines = run.scores("model-user") / float(change.norm())
    claimed = promised(build(run.schedule), size, run.schedule, sampled=False)
    estimate = one_shot_estimate(cosines, size=size, delta=delta)
    return Audit(
        subject=name,
        adversary="model-user",
        unit="client",
        method=estimate.method,
        claimed=claimed.get("model-user"),
        measured=estimate.epsilon,
        delta=delta,
        confidence=None,
        canaries=canaries,
    )


def audit_mechanism(
    make: Make, name: str, build: Callable[[Schedule], Stack], *, canaries: int, runs: int,
    delta: float, seed: int,
) -> list[Audit]:  # fmt: skip
    """Clopper-Pearson and Gaussian-DP bounds for a noise mechanism alone.

    Coordinates of one release carry independent noise, so each canary is a trial of its own; the
    threshold is chosen on the first half of the runs and judged on the second.
    """
    with_: list[Scores] = []
    without: list[Scores] = []
    claimed = 0.0
    for at in range(runs):
        run = run_canaries(make, build, canaries=canaries, delta=delta, seed=seed + at)
        scores = run.scores("model-user")
        with_.append(scores[run.coins])
        without.append(scores[~run.coins])
        claimed = promised(build(run.schedule), canaries, run.schedule, sampled=False)["model-user"]
    half = runs // 2
    errors = _judged(with_[:half], without[:half], with_[half:], without[half:], delta)
    bounds = clopper_pearson_bound(errors, delta), gaussian_bound(errors, delta)
    return [
        Audit(
            name,
            "model-user",
            "client",
            bound.method,
            claimed,
            bound.epsilon,
            delta,
            bound.confidence,
            bound.trials,
        )
        for bound in bounds
    ]


def _judged(
    with_: list[Scores], without: list[Scores], with_held: list[Scores],
    without_held: list[Scores], delta: float,
) -> Errors:  # fmt: skip
    """Errors on held-out scores, at the threshold that gives the best bound on the others."""
    inside, outside = np.concatenate(with_), np.concatenate(without)
    places = np.quantile(np.concatenate([inside, outside]), np.linspace(0.02, 0.98, 49))
    best = max(
        places,
        key=lambda t: gaussian_bound(errors_at(inside, outside, float(t)), delta).epsilon,
    )
    return errors_at(np.concatenate(with_held), np.concatenate(without_held), float(best))
