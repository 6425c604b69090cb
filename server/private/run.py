"""A private run from beginning to end: plan, ledger, budget, certificate.

begin   the ledger of the population is opened, the plan is made and said aloud
rounds  watched by the budget (`umbel.server.private.budget`)
finish  MODEL_CARD.md, a copy of the ledger and certificate.json in the run directory
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from umbel.core.errors import ConfigError
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.session import Session
from umbel.server.output.strict import canonical, loads
from umbel.server.private.budget import Budget
from umbel.server.private.certificate import client_body, issue
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.plan import PrivacyPlan, make_plan
from umbel.server.private.population import Elsewhere, LedgerLocation, Register, place_of, state_of
from umbel.server.roster import NodeRef
from umbel.server.training_spec import Outcome, TrainingSpec
from umbel.strategies.private.options import PrivacyOptions

_MAY_CHANGE = ("rounds", "nodes", "expected_cohort")
"""Of a mechanism whose noise is not shared between rounds: each round is charged as it is."""


class PrivateRun:
    """The private part of one run.

    Args:
        job: with a private stack, its noise perhaps undecided.
        privacy: the run's options.
        nodes: the population.
        session: where to write and to speak.
        data: the federation's data function, which names the population where nobody else does.
        start: what the model begins from; see `umbel.server.provenance`.

    Attributes:
        job: with all noise decided, the accounted cohort, and the budget as its guard.

    Raises:
        ConfigError: a value that cannot be used, a budget that cannot be met, or a run that goes
            on under another promise than it began with.
    """

    def __init__(
        self,
        job: TrainingSpec,
        privacy: PrivacyOptions,
        nodes: Sequence[NodeRef],
        session: Session,
        data: object,
        start: Mapping[str, Any],
    ) -> None:
        self._session = session
        self._key = coordinator_key(state_of(session.run))
        self._place = place_of(privacy, session.run, data)
        register = Register(self._place.register)
        self._ledger = Ledger(self._place.path, self._place.population, self._key, register)
        weakref.finalize(self, self._ledger.close)  # also where the rounds end in an error
        for line in self._ledger.notes():
            session.progress.note(line)
        try:
            self._begin(job, privacy, nodes, start)
        except BaseException:
            self._ledger.close()
            raise
        for line in announcement(self._plan, self._place, self._budget, self._elsewhere):
            session.progress.note(line)
        self.job = replace(
            job,
            stack=self._plan.stack,
            options=self._plan.options,
            sampler=self._plan.cohort,
            guard=self._budget,
        )

    def _begin(
        self,
        job: TrainingSpec,
        privacy: PrivacyOptions,
        nodes: Sequence[NodeRef],
        start: Mapping[str, Any],
    ) -> None:
        name = run_name(self._session.run)
        self._plan = make_plan(
            job.stack,
            job.options,
            privacy,
            nodes=len(nodes),
            size=sum(tensor.numel() for tensor in job.parameters.values()),
            ledger=self._ledger,
            run=name,
            scope=self._place.scope,
            questions=job.questions,
            sampler=job.sampler,
        )
        description = self._plan.description()
        check_same_promise(self._ledger, name, description, int(start["round"]))
        labels = self._place.labels(node.name for node in nodes)
        self._elsewhere = self._ledger.admit(name, labels)
        self._ledger.begin(
            name, started_after=start["round"], started_from=start["model"], **description
        )
        self._budget = Budget(self._plan, self._ledger, name, self._place.scope)

    @property
    def drawn(self) -> tuple[str, float]:
        """How cohorts are drawn, and how many nodes are expected."""
        return self._plan.drawn, self._plan.cohort.bounds(self._plan.nodes)[0]

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        """Write the certificate and the model card; what the run's result says of privacy."""
        run = self._session.run
        try:
            body = client_body(run, self._plan, self._budget, self._place, self._elsewhere)
            if self._place.path != run.ledger_path:
                self._ledger.copy(run.ledger_path)
            certificate = issue(run, body, self._key, dict(outcome.metrics))
        finally:
            self._ledger.close()
        against = {item["against"]: item["epsilon"] for item in body["guarantees"]}
        said = {
            "epsilon": against[self._plan.against],
            "delta": self._plan.privacy.delta,
            "epsilon_against": against,
            "epsilon_in_total": {item["against"]: item["epsilon"] for item in body["total"]},
            "population": self._place.population,
            "noise_multiplier": self._plan.noise_multiplier,
        }
        if certificate["mechanism"]["insecure"]:
            said["privacy"] = "off (seeded)"
        return said


def run_name(run: RunDirectory) -> str:
    """How a run is called in a ledger: its directory and when it began."""
    return f"{run.path.resolve().name}@{run.config().get('started', '')}"


def check_same_promise(
    ledger: Ledger, run: str, description: Mapping[str, Any], after: int
) -> None:
    """Refuse to go on with a run under another promise than the one that it began with.

    Args:
        ledger: of its population.
        run: its name.
        description: the mechanism as it is now.
        after: the last finished round; 0 where the run begins.

    Raises:
        ConfigError: the ledger does not know the run's first rounds, or knows other parameters.
    """
    begun = ledger.runs(run)
    if after and not begun:
        raise ConfigError(
            f"this run has done {after} rounds already, and the ledger {ledger.path} knows nothing "
            "of them; continue it with the population and the ledger that it began with"
        )
    shared = description["separation"] > 1
    changed = [
        f"{name} (was {begun[0].get(name)!r}, is {value!r})"
        for name, value in description.items()
        if begun and begun[0].get(name) != _written(value)
        if shared or name not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"a run that goes on keeps what its promise is made of, but {', '.join(changed)} "
            "changed; use what it began with, or begin a new run"
        )


def _written(value: Any) -> Any:
    """A value as it comes back from the ledger."""
    return loads(canonical(value))


def announcement(
    plan: PrivacyPlan, place: LedgerLocation, budget: Budget, elsewhere: Sequence[Elsewhere]
) -> list[str]:
    """What is said before a private run starts."""
    privacy, description = plan.privacy, plan.description()
    known = [other.sentence(plan.nodes) for other in elsewhere]
    if description["insecure"]:
        return [
            "privacy: off (seeded); the noise can be repeated, so epsilon is infinite",
            *known,
        ]
    lines = [_sentence(plan, description)]
    if privacy.delta >= 1 / plan.nodes:
        lines.append(
            f"delta {privacy.delta:g} is not below one over the {plan.nodes} nodes, so one of them "
            f"may be given away whole; use delta={0.1 / plan.nodes:.0e} or less"
        )
    before = budget.total("server" if plan.against == "server" else "model-user").epsilon
    if before > 0 and place.scope == "population":
        lines.append(
            f"the population {place.population!r} has spent epsilon {before:.4g} before; this run "
            "continues its budget (population=NAME opens another, for other people)"
        )
    elif place.scope == "run":
        spent = f"epsilon {before:.4g}" if math.isfinite(before) else "epsilon without bound"
        lines.append(
            f"{spent if before else 'nothing'} was spent before on the same data "
            f"({place.population}); the budget is of this run, and the certificate adds all runs "
            "up (population=NAME keeps one budget over runs)"
        )
    return lines + known


def _sentence(plan: PrivacyPlan, description: dict[str, Any]) -> str:
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
    }.get(
        plan.drawn,
        f"cohorts of {description['expected_cohort']:g} of {plan.nodes} nodes, as the app's "
        f"sampler {plan.cohort.name} chooses them, which is taken as known to everyone",
    )
    return (
        f"privacy: {goal} at delta {plan.privacy.delta:g} against {whom}; {noise}, {cohort}, "
        f"{plan.options.rounds} rounds planned; layers {plan.stack}"
    )
