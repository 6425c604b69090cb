"""What an app promises, put to tests that can say no: noise, use, sampling, records.

noise      two rounds of the same canaries; what they do not share is noise, and there must be
           as much of it as the claim needs. So too little noise, none, and noise that is the
           same in every run are one finding. Nodes' own noise is looked for in their messages
use        canaries that left nothing in what was released say nothing about it
sampling   who was asked in each round of a run, against the rate that is claimed
records    one record in a node, one step: what the node sends twice, and how far the record moves
           it; and which records are drawn
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from umbel.benchmarks.attack import audits
from umbel.benchmarks.attack.audits import CanaryRun
from umbel.benchmarks.attack.canaries import (
    Fault,
    aside,
    canary_run,
    claims,
    honest_stack,
    norm_of,
)
from umbel.benchmarks.attack.defences import finite
from umbel.benchmarks.attack.tasks import CanaryTrainer, Coins
from umbel.benchmarks.attack.verdicts import Verdict, not_tested
from umbel.benchmarks.attack.views import Adversary, Attackable, play
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.given import understood
from umbel.clients.trainers.base import Job, Options, promising
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.errors import StackError, UmbelError
from umbel.privacy.attacks.audit import EPSILON_LIMIT, Scores
from umbel.privacy.attacks.promises import (
    FALSE_ALARM,
    deviation_ceiling,
    gaussian_loss,
    participation,
    rounds_needed,
    shift_floor,
)
from umbel.privacy.budget.events import REPLACE
from umbel.strategies.transform import Claim, Facts

NODES = 60
"""Canary nodes of the two rounds."""
SEEN = 10.0
"""Standard deviations of the noise from which what canaries have in common must show."""
SPARE = 3000
"""Coordinates in which there is nothing but noise."""
STEPS, RECORDS, RATE = 40, 24, 0.25
"""Of the test of which records are drawn."""
LARGE = 1e3
"""Makes a record one that clipping has to shorten."""


def noise(
    federation: Attackable, options: Options, *, seed: int = 0, fault: Fault | None = None
) -> list[Verdict]:
    """Whether the noise is as large, as new and as much about the nodes as is claimed."""

    def run() -> CanaryRun:
        return canary_run(
            federation, options, canaries=NODES, spare=SPARE, together=True, seed=seed, fault=fault
        )

    one, two = run(), run()
    claimed = claims(federation, one, options)
    promises = {who: claimed[who] for who in audits.ADVERSARIES if who in claimed}
    return [_noise(federation, options, one, two, who, eps) for who, eps in promises.items()]


def _noise(
    federation: Attackable,
    options: Options,
    one: CanaryRun,
    two: CanaryRun,
    adversary: Adversary,
    claimed: float,
) -> Verdict:
    used = min(run.played.heard[0].count if run.played.heard else 0 for run in (one, two))
    if used < NODES:
        why = f"only {used} of {NODES} canaries' updates were used, so nothing was seen of them"
        return not_tested("noise", adversary, why, claimed)
    norm = norm_of(federation, options)
    first, second = _release(one, adversary), _release(two, adversary)
    if not first.noise.any():
        return not_tested("noise", adversary, "nothing was released that could be tested", claimed)
    deviation = deviation_ceiling(first.noise, second.noise)
    moved = np.concatenate([first.canaries, second.canaries]) * math.sqrt(2)
    shift = max(norm, shift_floor(moved, deviation * math.sqrt(2)))
    factor = 2.0 if _replaces(federation, options, adversary) else 1.0
    measured = gaussian_loss(deviation, factor * shift, one.schedule.delta)
    words = f"epsilon {claimed:.3f} is claimed, {_number(measured)} was measured"
    if measured > claimed:
        words += f" ({_reason(first, second, deviation, shift, norm)})"
        return Verdict("noise", adversary, "broken", words, claimed, measured)
    common = (first.common + second.common) / 2
    expected = norm * first.sharers * math.sqrt(0.5)
    if expected > SEEN * deviation and common < expected / 2:
        why = "the canaries left nothing in what was released, so nothing was seen of them"
        return not_tested("noise", adversary, why, claimed)
    return Verdict("noise", adversary, "holds", words, claimed, measured)


@dataclass(frozen=True)
class _Release:
    """What an adversary saw of one run, in the unit of one node's update.

    Attributes:
        noise: all coordinates; equal in two runs but for the noise.
        canaries: each canary's own coordinate.
        common: the coordinate that all have in common.
        sharers: how many of them are in that.
    """

    noise: Scores
    canaries: Scores
    common: float
    sharers: int


def _release(run: CanaryRun, adversary: Adversary) -> _Release:
    view = run.played.view(adversary)
    if view.replies and view.replies[0]:
        replies = view.replies[0]
        rows = [replies[node].numpy() for node in sorted(replies)]
        mine = np.array([float(replies[node][node]) for node in sorted(replies)])
        return _Release(np.concatenate(rows), mine, float(np.mean([row[-1] for row in rows])), 1)
    change = view.final.double().numpy() * NODES  # the first model is zero
    return _Release(change, change[:NODES], float(change[-1]), NODES)


def _reason(first: _Release, second: _Release, deviation: float, shift: float, norm: float) -> str:
    if np.array_equal(first.noise, second.noise):
        return "two runs released the same: there is no noise, or it repeats"
    if shift > norm:
        return f"one update moves the result by {shift / norm:.1f} norms or more"
    return f"the noise is {deviation / norm:.3g} norms at most"


def _replaces(federation: Attackable, options: Options, adversary: str) -> bool:
    """Whether a claim is about a node's other update, which is twice as far as about none."""
    found = _claims(federation, options, NODES + SPARE)
    return any(claim.relation == REPLACE for claim in found if claim.against == adversary)


def _claims(federation: Attackable, options: Options, size: int) -> list[Claim]:
    """What the layers claim; not of those whose noise a plan decides, which is about none."""
    stack = honest_stack(federation, options)
    facts = Facts(size=size, round=1, expected_replies=NODES, max_replies=NODES)
    facts = stack.check(facts, stack.init(size))
    found: list[Claim] = []
    for layer in stack.layers:
        with suppress(StackError):
            claim = layer.claim(facts)
            found += [] if claim is None else [claim]
    return found


# ---- sampling


def sampling(
    federation: Attackable, options: Options, nodes: int, *, seed: int = 0
) -> list[Verdict]:
    """Whether nodes are drawn as the accounting of the app's own schedule assumes.

    None where nothing is drawn: everybody takes part, or nothing is claimed.
    """
    complete = federation.complete(options)
    rate = min(1.0, (float(complete.get("cohort-size", 0.0)) or nodes) / nodes)
    drawn_at_all = complete.get("sampling") != "all" and rate < 1
    if not drawn_at_all or not any(one.sampled for one in _claims(federation, options, 16)):
        return []
    rounds = rounds_needed(rate, nodes)
    given = {**options, "rounds": rounds, "client-eval-every": -1, "seed": seed}
    trainer = CanaryTrainer(16, 1.0, OPTIONS=dict(understood(federation.trainer_for(complete))))
    data = Coins(np.zeros(nodes, dtype=bool))
    changes = {**aside(federation), "trainer": trainer, "data": _Folded(data)}
    try:
        played = play(replace(federation, **changes), nodes, given)
    except UmbelError as error:
        return [not_tested("sampling", "model-user", str(error), rate)]
    mechanism = played.mechanism
    if mechanism.get("cohort") not in ("poisson", "fixed") or len(played.heard) < rounds:
        why = f"{len(played.heard)} of {rounds} rounds were run, and accounted without a rate"
        return [not_tested("sampling", "model-user", why, rate)]
    rate = float(mechanism["expected_cohort"]) / nodes
    drawn = np.zeros((len(played.heard), nodes), dtype=bool)
    for at, heard in enumerate(played.heard):
        drawn[at, list(heard.asked)] = True
    found = participation(drawn, rate, fixed=mechanism["cohort"] == "fixed")
    broken = found.p_value < FALSE_ALARM
    words = found.words if broken else f"{len(drawn)} rounds at a rate of {rate:.3g}"
    mean = float(drawn.mean())
    return [Verdict("sampling", "model-user", "broken" if broken else "holds", words, rate, mean)]


class _Folded:
    """Canaries of fewer coordinates than nodes."""

    def __init__(self, coins: Coins) -> None:
        self.coins = coins

    def __call__(self, node: Node, options: Options) -> Split:  # noqa: ARG002
        return Split(Examples(np.array([node.partition % 16]), np.array([0])))


# ---- records


def records(federation: Attackable, options: Options, nodes: int) -> list[Verdict]:
    """Whether a trainer that promises privacy for single records keeps that; empty if none does."""
    complete = federation.complete(options)
    trainer = promising(federation.trainer_for(complete), complete)
    if trainer is None:
        return []
    if not isinstance(trainer, PrivateSgd):
        why = f"{type(trainer).__name__} is not a PrivateSgd, and there is no test for others"
        return [not_tested("records", "server", why)]
    found = federation.data(Node(0, nodes, {}), complete)
    examples = (found if isinstance(found, Split) else Split(found)).train
    try:
        return [_records(trainer, examples, complete), _drawn(trainer, examples, complete)]
    except (UmbelError, ValueError, RuntimeError) as error:
        return [not_tested("records", "server", " ".join(str(error).split()))]


_STEP = {"rounds": 1, "local-steps": 1, "learning-rate": 1.0, "momentum": 0.0, "weight-decay": 0.0}


def _records(trainer: PrivateSgd, examples: Any, options: Mapping[str, Any]) -> Verdict:
    """One record, one step, several times: what differs is noise, what is common the record."""
    given = {**options, **_STEP, "batch-size": 1}
    plain = replace(trainer.trainer, optimizer=None)
    audited = replace(trainer, trainer=plain)
    start = audited.initial(given, 0)
    size = sum(p.numel() for p in start.parameters.values())
    record, direction = _record(plain, start, examples, given)
    repeats = max(4, min(64, SPARE // size + 2))
    moved, claimed = [], 0.0
    for _ in range(repeats):
        job = Job(1, 0, given, memory=RecordDict())
        trained = audited.train(start, record, job)
        claimed = float(trained.metrics.get("example-epsilon", float("inf")))
        moved.append(_flat(trained.weights.parameters) - _flat(start.parameters))
    if finite(claimed) is None:
        why = "the noise is seeded, and nothing is promised"
        return not_tested("records", "server", why)
    rows = np.stack([m.double().numpy() for m in moved])
    promise = audited.privacy(given)
    deviation = deviation_ceiling(rows[:-1:2].ravel(), rows[1::2].ravel())
    shift = max(promise.example_norm, shift_floor(rows @ direction, deviation))
    measured = gaussian_loss(deviation, shift, promise.example_delta)
    broken = measured > claimed
    words = f"epsilon {claimed:.3f} is claimed for a record, {_number(measured)} was measured"
    if broken:
        norms = shift / promise.example_norm
        words += f" (one record moves a step by {norms:.2g} norms, under noise of at most "
        words += f"{deviation / promise.example_norm:.3g})"
    outcome = "broken" if broken else "holds"
    return Verdict("records", "server", outcome, words, claimed, measured)  # type: ignore[arg-type]  # one of Outcome, chosen above


def _record(
    plain: Any, start: Any, examples: Any, options: Mapping[str, Any]
) -> tuple[Any, Scores]:
    """A record with a long gradient, and the direction in which it moves the model."""
    first = _taken(examples, 0)
    for factor in (LARGE, 1.0):
        record = _scaled(first, factor)
        try:
            trained = plain.train(start, record, Job(1, 0, options))
        except UmbelError:
            continue
        step = (_flat(trained.weights.parameters) - _flat(start.parameters)).double()
        if bool(torch.isfinite(step).all()) and float(step.norm()) > 0:
            return record, (step / step.norm()).numpy()
    raise ValueError("no record of the node moves the model, so none can be looked for")


def _taken(examples: Any, at: int) -> Any:
    if isinstance(examples, Examples):
        return examples.take(slice(at, at + 1))
    return [examples[at]]


def _scaled(record: Any, factor: float) -> Any:
    x = record.x if isinstance(record, Examples) else None
    if x is None or factor == 1.0 or not torch.as_tensor(x).is_floating_point():
        return record
    return Examples(x * factor, record.y)


def _drawn(trainer: PrivateSgd, examples: Any, options: Mapping[str, Any]) -> Verdict:
    """Which records a node draws, against its claimed rate."""
    count = min(RECORDS, len(examples))
    listening = _Listening([_taken(examples, at) for at in range(count)])
    batch = max(1, round(RATE * count))
    given = {**options, **_STEP, "learning-rate": 0.0, "batch-size": batch, "local-steps": STEPS}
    plain = replace(trainer.trainer, optimizer=None)
    audited = replace(trainer, trainer=plain)
    rate = audited.schedule(count, given).sampling_rate
    if count < 2:
        return not_tested("sampling of records", "server", "the node has a single record", rate)
    audited.train(audited.initial(given, 0), listening, Job(1, 0, given, memory=RecordDict()))
    # The first record is also read to learn what records look like.
    counts = np.array([listening.reads.count(at) for at in range(1, count)])
    drawn = np.arange(STEPS)[:, None] < counts[None, :]
    found = participation(drawn, rate, fixed=True)
    broken = found.p_value < FALSE_ALARM
    words = found.words if broken else f"{STEPS} steps at a rate of {rate:.3g}"
    outcome = "broken" if broken else "holds"
    mean = float(drawn.mean())
    return Verdict("sampling of records", "server", outcome, words, rate, mean)  # type: ignore[arg-type]  # one of Outcome, chosen above


class _Listening:
    """A data set that notes which of its records are read."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        self.reads.append(row)
        one = self.items[row]
        if isinstance(one, Examples):
            return torch.as_tensor(one.x)[0], torch.as_tensor(one.y)[0]
        return one[0]


def _flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters.values()])


def _number(epsilon: float) -> str:
    return "no bound at all" if epsilon >= EPSILON_LIMIT else f"{epsilon:.3f}"


# ---- all of them


def examine(
    federation: Attackable,
    options: Options,
    nodes: int,
    *,
    seed: int = 0,
    fault: Fault | None = None,
) -> list[Verdict]:
    """Every promise of an app through its test; a test that fails to run is one not made."""
    tests: Mapping[str, Callable[[], list[Verdict]]] = {
        "noise": lambda: noise(federation, options, seed=seed, fault=fault),
        "sampling": lambda: sampling(federation, options, nodes, seed=seed),
        "records": lambda: records(federation, options, nodes),
    }
    return [verdict for what, test in tests.items() for verdict in _made(what, test)]


def _made(what: str, test: Callable[[], list[Verdict]]) -> Iterator[Verdict]:
    try:
        yield from test()
    except UmbelError as error:
        yield not_tested(what, "model-user", " ".join(str(error).split()))
