"""The privacy benchmark: every defence through every scene, and every claim through an audit.

    plan -> jobs in processes -> a report that knows whether anything is wrong

A job is one defence in one scene; jobs share nothing, so they run side by side. What is wrong: a
lower bound above the epsilon that was claimed, a ROC curve more than three standard errors above
its ceiling, a fault that no audit noticed, or a check value that is missed.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from umbel.benchmarks.attack import checks
from umbel.benchmarks.attack.audits import Audit, Make
from umbel.benchmarks.attack.checks import Check
from umbel.benchmarks.attack.defences import Defence
from umbel.benchmarks.attack.findings import Finding
from umbel.benchmarks.attack.jobs import jobs_of, train_references, work
from umbel.benchmarks.attack.plans import Plan
from umbel.benchmarks.attack.scenes import Measured, Task
from umbel.benchmarks.attack.verdicts import Verdict
from umbel.privacy.attacks.audit import clopper_pearson, one_run_audit
from umbel.server.output.rundir import machine, versions

STANDARD_ERRORS = 3.0
"""A ROC curve may lie this much above its ceiling by chance."""

Say = Callable[[int, int, str], None]
"""Told of progress: jobs done, jobs in all, what was done last."""


@dataclass(frozen=True)
class Row:
    """One defence on one task.

    Attributes:
        data: the data set.
        name: of the defence.
        words: what it does.
        measured: per scene.
        audits: of its claims.
        notes: what went wrong or should be known.
        verdicts: of promises that were put to a test, or should have been.
    """

    data: str
    name: str
    words: str
    measured: Mapping[str, Measured]
    audits: Sequence[Audit]
    notes: Sequence[str]
    verdicts: Sequence[Verdict] = ()

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """All findings with their scenes."""
        return [(scene, one) for scene, part in self.measured.items() for one in part.findings]

    @property
    def main(self) -> Measured | None:
        """The scene that trains a model to use: many small nodes, or else few large ones."""
        return self.measured.get("training") or self.measured.get("hospitals")

    def accuracy(self) -> tuple[float, float, float] | None:
        """Of the trained model, with its interval."""
        found = None if self.main is None else self.main.accuracy
        if found is None:
            return None
        return (found[0], *clopper_pearson(round(found[0] * found[1]), found[1]))

    def claimed(self, adversary: str) -> float | None:
        """Epsilon against an adversary over the main scene; None without a claim.

        Where nothing was trained, the claim of the audit.
        """
        if self.main is not None:
            return self.main.claimed.get(adversary)
        audited = [a.claimed for a in self.audits if a.adversary == adversary]
        return audited[0] if audited else None

    def measured_bound(self, adversary: str) -> float | None:
        """The largest lower bound on epsilon: of its nodes, or else of its records."""
        own = [a for a in self.audits if a.adversary == adversary and a.is_bound]
        nodes = [a.measured for a in own if a.unit == "client"]
        return max(nodes or [a.measured for a in own], default=None)


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and what is wrong with it.

    Attributes:
        rows: the matrix.
        faults: audits of stacks that were broken on purpose; each must be refuted.
        mechanisms: audits of the Gaussian mechanism alone, and the one-shot estimate.
        checks: reference values that this installation must reproduce.
        about: seeds, sizes, versions, machine, command, seconds.
    """

    rows: Sequence[Row]
    faults: Sequence[Audit] = ()
    mechanisms: Sequence[Audit] = ()
    checks: Sequence[Check] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Sentences; empty where every claim stands."""
        found = []
        for row in self.rows:
            place = f"{row.name} on {row.data}"
            found += [f"{place}: {_refuted(audit)}" for audit in row.audits if audit.refuted]
            found += [f"{place}: {one.sentence}" for one in row.verdicts if one.bad]
            found += [
                f"{place}: the ROC curve of {one.attack} lies {one.excess:.1f} standard errors "
                f"above what the claimed epsilon allows"
                for _, one in row.findings
                if one.excess is not None and one.excess > STANDARD_ERRORS
            ]
        found += [f"{a.subject}: {_refuted(a)}" for a in self.mechanisms if a.refuted]
        found += [
            f"the fault {audit.subject!r} was not noticed: claimed {audit.claimed:g}, measured at "
            f"least {audit.measured:.2f}; use more canaries"
            for audit in self.faults
            if not audit.refuted
        ]
        return found + [check.sentence for check in self.checks if not check.ok]

    def untested(self) -> list[str]:
        """Promises that nobody can say anything of."""
        return [
            f"{row.name} on {row.data}: {one.sentence}"
            for row in self.rows
            for one in row.verdicts
            if one.outcome == "not tested"
        ]

    def warnings(self) -> list[str]:
        """What is no broken promise, but must be known."""
        return [f"{row.name} on {row.data}: {note}" for row in self.rows for note in row.notes]


def _refuted(audit: Audit) -> str:
    return (
        f"epsilon {audit.claimed:.2f} is claimed against {audit.adversary}, but at least "
        f"{audit.measured:.2f} was measured ({audit.method}, {audit.confidence:.0%} confidence)"
    )


def run(make: Make, plan: Plan, *, workers: int | None = None, say: Say | None = None) -> Report:
    """Measure everything in a plan.

    Args:
        make: `umbel.Federation`.
        plan: what.
        workers: processes; one a core if None; 0 works in this process.
        say: told of progress.
    """
    began = time.monotonic()
    references, spent = train_references(plan, workers)
    jobs = jobs_of(make, plan, references)
    done: dict[str, Any] = {}
    processor = {"references": round(spent, 1)}
    for number, (key, result, spent) in enumerate(work(jobs, workers), start=1):
        done[key] = result
        processor[key] = round(spent, 1)
        if say is not None:
            say(number, len(jobs), key)
    report_rows = [
        row_of(task, defence, done) for task in plan.tasks for defence in plan.defences[task.data]
    ]
    several = [a for key, part in sorted(done.items()) if key.startswith("alone") for a in part]
    return Report(
        rows=report_rows,
        faults=[a for key, part in sorted(done.items()) if key.startswith("fault") for a in part],
        mechanisms=several,
        checks=[
            *(c for key, part in sorted(done.items()) if key.startswith("check") for c in part),
            *expectations(plan, report_rows),
        ],
        about=stamp(
            plan.seed,
            plan.canaries,
            repetitions=plan.repetitions,
            secure_canaries=plan.secure_canaries,
            delta=plan.delta,
            tasks=[vars(task) for task in plan.tasks],
            seconds=round(time.monotonic() - began, 1),
            processor_seconds=round(sum(processor.values()), 1),
            processor_seconds_by_job=processor,
        ),
    )


def stamp(seed: int, canaries: int, **more: Any) -> dict[str, Any]:
    """What names a run and says how it can be had again: an id, the date, versions, machine."""
    return {
        "id": secrets.token_hex(4),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seed": seed,
        "canaries": canaries,
        "repetitions": 1,
        **more,
        "versions": versions(),
        "machine": machine(),
    }


def expectations(plan: Plan, rows: Sequence[Row]) -> list[Check]:
    """What the literature expects of the matrix itself."""
    found = checks.memberships(
        (row.claimed("model-user"), [one for _, one in row.findings]) for row in rows
    )
    for row in rows:
        known = row.measured.get("hospitals")
        first = row.name == "none" and row.data == plan.tasks[0].data
        if plan.overfits and first and known is not None:
            found += checks.overfitted(known.findings)
    return found


# ---- rows


def row_of(task: Task, defence: Defence, done: Mapping[str, Any]) -> Row:
    """A defence's results, collected by their keys; a text is a scene that could not run."""
    measured: dict[str, Measured] = {}
    found: list[Audit] = []
    notes: list[str] = []
    start = f"row/{task.data}/{defence.name}/"
    for key in sorted(done):
        if key.startswith(start):
            if isinstance(done[key], str):
                notes.append(done[key])
            else:
                measured[key.removeprefix(start)] = done[key]
    audited = done.get(f"audit/{defence.name}", [])
    if isinstance(audited, str):
        notes.append(audited)
    else:
        found += audited
    found += [a for name, part in measured.items() for a in _examples(task, defence, name, part)]
    notes += _advice(defence, measured)
    return Row(task.data, defence.name, defence.words, measured, found, notes)


def _examples(task: Task, defence: Defence, scene: str, part: Measured) -> list[Audit]:
    """One-run audits with the suspects as canaries: each was a member by its own coin."""
    claimed = part.claimed.get("model-user")
    found = []
    for name, scores in part.scores.items():
        assert part.members is not None
        bound = one_run_audit(scores, part.members, delta=task.delta)
        found.append(
            Audit(
                subject=f"{defence.name}, {scene}",
                adversary="model-user",
                unit="example",
                method=f"one-run, {name}",
                claimed=claimed,
                measured=bound.epsilon,
                delta=task.delta,
                confidence=bound.confidence,
                canaries=len(scores),
            )
        )
    return found


def _advice(defence: Defence, measured: Mapping[str, Measured]) -> list[str]:
    """What a table does not say by itself: one sentence an attack, for who came furthest."""
    if not defence.secure or defence.unit != "none":
        return []
    found = [one for part in measured.values() for one in part.findings]
    alive = [one for one in found if one.measure == "examples recovered" and one.low > 0.01]
    strongest: dict[str, Finding] = {}
    for one in sorted(alive, key=lambda one: one.value, reverse=True):
        strongest.setdefault(one.attack, one)
    return [
        f"secure aggregation alone leaves {one.attack} alive: the {one.adversary} recovered "
        f"{one.value:.0%} of the examples of {defence.cohort} nodes from their sum; use larger "
        "cohorts and differential privacy"
        for one in strongest.values()
    ]
