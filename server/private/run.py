"""A private run from beginning to end: plan, ledger, budget, certificate.

begin   the ledger of the population is opened, the plan is made and said aloud
rounds  watched by the budget (`umbel.server.private.budget`)
finish  certificate.json, MODEL_CARD.md and a copy of the ledger in the run directory
"""

import math
import weakref
from dataclasses import replace
from typing import Any

from umbel.server.output.rundir import RunDirectory
from umbel.server.output.session import Session
from umbel.server.private.budget import Budget
from umbel.server.private.certificate import issue
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.model_card import write_model_card
from umbel.server.private.plan import Place, Plan, make_plan, place_of
from umbel.server.rounds import Job, Outcome
from umbel.strategies.private.options import PrivacyOptions


class PrivateRun:
    """The private part of one run.

    Args:
        job: with a private stack, its noise perhaps undecided.
        privacy: the run's options.
        nodes: size of the population.
        session: where to write and to speak.

    Attributes:
        job: with all noise decided, the accounted cohort, and the budget as its guard.

    Raises:
        ConfigError: a value that cannot be used, or a budget that cannot be met.
    """

    def __init__(self, job: Job, privacy: PrivacyOptions, nodes: int, session: Session) -> None:
        self._session = session
        self._key = coordinator_key()
        self._place = place_of(privacy, session.run)
        self._ledger = Ledger(self._place.path, self._place.population)
        weakref.finalize(self, self._ledger.close)  # also where the rounds end in an error
        try:
            name = run_name(session.run)
            size = sum(tensor.numel() for tensor in job.parameters.values())
            self._plan = make_plan(
                job.stack,
                job.options,
                privacy,
                nodes=nodes,
                size=size,
                ledger=self._ledger,
                run=name,
                questions=job.questions,
            )
            description = self._plan.description()
            self._ledger.begin(name, **description)
            self._budget = Budget(self._plan, self._ledger, name)
        except BaseException:
            self._ledger.close()
            raise
        for line in announcement(self._plan, self._place, self._budget):
            session.progress.note(line)
        self.job = replace(
            job, stack=self._plan.stack, options=self._plan.options, guard=self._budget
        )

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        """Write the certificate and the model card; what the run's result says of privacy."""
        run = self._session.run
        try:
            if not self._place.alone:
                self._ledger.copy(run.ledger_path)
            certificate = issue(run, self._plan, self._budget, self._key)
        finally:
            self._ledger.close()
        write_model_card(run, certificate, dict(outcome.metrics))
        against = {item["against"]: item["epsilon"] for item in certificate["guarantees"]}
        primary = against[self._plan.against]
        said = {
            "epsilon": primary,
            "delta": self._plan.privacy.delta,
            "epsilon_against": against,
            "noise_multiplier": self._plan.noise_multiplier,
        }
        if certificate["mechanism"]["insecure"]:
            said["privacy"] = "off (seeded)"
        return said


def run_name(run: RunDirectory) -> str:
    """How a run is called in a ledger: its directory and when it began."""
    return f"{run.path.resolve().name}@{run.config().get('started', '')}"


def announcement(plan: Plan, place: Place, budget: Budget) -> list[str]:
    """What is said before a private run starts."""
    privacy, description = plan.privacy, plan.description()
    if description["insecure"]:
        return ["privacy: off (seeded); the noise can be repeated, so epsilon is infinite"]
    lines = [_sentence(plan, description)]
    if privacy.delta >= 1 / plan.nodes:
        lines.append(
            f"delta {privacy.delta:g} is not below one over the {plan.nodes} nodes, so one of them "
            f"may be given away whole; use delta={0.1 / plan.nodes:.0e} or less"
        )
    before = budget.spent("server" if plan.against == "server" else "model-user").epsilon
    if before > 0:
        lines.append(
            f"the population {place.population!r} has spent epsilon {before:.4g} before; this run "
            "continues its budget (population=NAME opens another, for other people)"
        )
    elif place.alone:
        lines.append(
            "the ledger is of this run alone, as simulated nodes are new people every time; "
            "population=NAME keeps one budget over runs"
        )
    return lines


def _sentence(plan: Plan, description: dict[str, Any]) -> str:
    budget = plan.privacy.epsilon
    whom = "model users" if plan.against == "model-user" else "the server and model users"
    goal = f"epsilon {budget:g}" if math.isfinite(budget) else "no budget"
    noise = (
        "each node adds its own noise"
        if plan.noise_multiplier is None
        else f"noise multiplier {plan.noise_multiplier:g}"
    )
    cohort = {
        "poisson": f"Poisson cohorts of {description['expected_cohort']:g} of {plan.nodes} nodes",
        "fixed": f"cohorts of exactly {description['expected_cohort']:g} of {plan.nodes} nodes",
        "all": f"all {plan.nodes} nodes in every round",
    }[plan.cohort.name]
    return (
        f"privacy: {goal} at delta {plan.privacy.delta:g} against {whom}; {noise}, {cohort}, "
        f"{plan.options.rounds} rounds planned; layers {plan.stack}"
    )
