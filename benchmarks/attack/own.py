"""Somebody's own federation under attack: their trainer, their data, their stack.

audit       canary nodes take the place of the app's nodes, under the app's stack and options
membership  the app's own run; losses of its nodes' examples against held-out ones
crowd       which nodes took part in a round
pictures    what an update of one example shows, where the model can be inverted
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from umbel.benchmarks.attack import audits, nodes, reconstruct
from umbel.benchmarks.attack.audits import CanaryRun
from umbel.benchmarks.attack.defences import finite
from umbel.benchmarks.attack.findings import guaranteed, roc_findings
from umbel.benchmarks.attack.scenes import Measured
from umbel.benchmarks.attack.suite import Report, Row, stamp
from umbel.benchmarks.attack.tasks import CanaryTrainer, Coins, Pool
from umbel.benchmarks.attack.views import Attackable, Played, play
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.trainer import Options, Trainer, Weights
from umbel.privacy.attacks.audit import Scores, one_run_audit
from umbel.privacy.budget.calibrate import noise_multiplier
from umbel.strategies.errors import ConfigError, UmbelError
from umbel.strategies.layer import Facts
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.stack import Stack

MOST_EXAMPLES = 400
"""Members, and as many others, whose losses are compared."""
MOST_NODES = 60
"""Nodes of the participation attack, each of which is trained once more."""

Fault = Callable[[Stack], Stack]


def attack(
    federation: Attackable,
    count: int,
    options: Options,
    *,
    name: str,
    canaries: int = 1000,
    seed: int = 0,
    fault: Fault | None = None,
) -> Report:
    """Attack a federation as it would run.

    Args:
        federation: the app's own.
        count: its nodes.
        options: changes to its options.
        name: of the app.
        canaries: of the audit.
        seed: of coins and choices.
        fault: breaks the audited stack on purpose.
    """
    began = time.monotonic()
    notes: list[str] = []
    measured: dict[str, Measured] = {}
    found = audit(federation, options, name=name, canaries=canaries, seed=seed, fault=fault)
    if fault is None:
        played = play(federation, count, options, listen=lambda number: number == 1)
        rows = _Own(federation, played, count, federation.complete(options), seed)
        for scene in (rows.training, rows.crowd, rows.pictures):
            try:
                measured[scene.__name__] = scene()
            except (UmbelError, ValueError, RuntimeError) as error:
                notes.append(f"{scene.__name__} could not be attacked: {error}")
    stack = federation.stack_for(federation.complete(options))
    row = Row(name, str(stack), "The app's own stack.", measured, found, notes)
    seconds = round(time.monotonic() - began, 1)
    return Report([row], about=stamp(seed, canaries, seconds=seconds))


def audit(
    federation: Attackable,
    options: Options,
    *,
    name: str,
    canaries: int = 1000,
    seed: int = 0,
    fault: Fault | None = None,
) -> list[audits.Audit]:
    """One round of canary nodes under a federation's stack and options, for both adversaries.

    All nodes take part, so nothing is amplified: what is compared is what the run of the
    canaries itself claims, not the epsilon of the app's schedule.

    Raises:
        ConfigError: the options cannot be used.
    """
    coins = np.random.default_rng([seed, 7]).random(canaries) < 0.5
    trainer = CanaryTrainer(
        canaries,
        _norm(federation, options) * audits.LONGER,
        audits.WEIGHT,
        OPTIONS=dict(getattr(federation.trainer, "OPTIONS", {})),
    )

    def stack(given: Options) -> Stack:
        made = federation.stack_for(given)
        return made if fault is None else fault(_noisy(made, given))

    given = {
        **{k: v for k, v in options.items() if k not in ("cohort-size", "cohort-cap")},
        "rounds": 1,
        "cohort": "all",
        "federated-every": -1,
        "seed": seed,
    }
    known = federation.complete({})
    if "sampling" in known:
        given["sampling"] = "all"
    changes = {"trainer": trainer, "data": Coins(coins), "stack": stack}
    played = play(_complete(federation, _alone(federation) | changes), canaries, given)
    delta = _delta({**known, **options}, federation)
    schedule = audits.alone(canaries, delta)
    complete = federation.complete(given)
    honest = _noisy(federation.stack_for(complete), complete)
    claimed = audits.claims_of(played, honest, schedule)
    run = CanaryRun(played, coins, schedule, trainer)
    found = []
    for adversary in audits.ADVERSARIES:
        bound = one_run_audit(run.scores(adversary), coins, delta=delta)
        found.append(
            audits.Audit(
                subject=name,
                adversary=adversary,
                unit="client",
                method=bound.method,
                claimed=claimed.get(adversary),
                measured=bound.epsilon,
                delta=delta,
                confidence=bound.confidence,
                canaries=canaries,
            )
        )
    return found


def _alone(federation: Attackable) -> dict[str, Any]:
    """Changes that leave out what an app does beside training, which may need its own data."""
    aside = {"test": None, "summary": None, "questions": ()}
    known = {field.name for field in fields(federation)}  # type: ignore[arg-type]
    return {name: value for name, value in aside.items() if name in known}


def _noisy(stack: Stack, options: Mapping[str, Any]) -> Stack:
    """The stack with the noise that a plan gives it for one round in which everybody takes part.

    A fault may hide from the run that its stack is private, and then nobody plans.
    """
    epsilon = float(options.get("epsilon", math.inf))
    layers = [
        layer.with_noise(noise_multiplier(epsilon, float(options["delta"]), 1.0, 1))
        if isinstance(layer, Gaussian) and layer.noise_multiplier is None and math.isfinite(epsilon)
        else layer
        for layer in stack.layers
    ]
    return Stack(layers, stack.collect)


def _complete(federation: Attackable, changes: Mapping[str, Any]) -> Any:
    """The federation with a stack to which its options add no layer: that has happened already.

    A broken layer is not recognised for what it claims to be, so it would be added again.
    """
    kind: Any = type(federation)
    as_it_is = type(kind.__name__, (kind,), {"stack_for": lambda self, given: self.stack(given)})
    known = {field.name: getattr(federation, field.name) for field in fields(kind) if field.init}
    return as_it_is(**{**known, **changes})


@dataclass(frozen=True)
class _Own:
    """The scenes on an app that nobody here wrote."""

    federation: Attackable
    played: Played
    count: int
    options: Mapping[str, Any]
    seed: int

    @property
    def trainer(self) -> Trainer:
        return self.federation.trainer

    def training(self) -> Measured:
        """Accuracy, cost, and a loss threshold: members against held-out examples."""
        inside = [part for node in range(self.count) for part in _split(self._data(node).train)]
        outside = _split(self._held_out())
        generator = np.random.default_rng([self.seed, 21])
        size = min(MOST_EXAMPLES, len(inside), len(outside))
        with_ = self._losses([inside[i] for i in generator.permutation(len(inside))[:size]])
        without = self._losses([outside[i] for i in generator.permutation(len(outside))[:size]])
        view = self.played.view("model-user")
        found, curve = roc_findings("loss threshold", view.adversary, -with_, -without)
        reported = self.played.result.get("epsilon_against") or {}
        claimed = {who: value for who, value in reported.items() if finite(value) is not None}
        delta = _delta(self.options, self.federation)
        curves = {"loss threshold": curve}
        found = guaranteed(found, curves, claimed.get("model-user"), delta)
        accuracy = self.played.result.get("metrics", {}).get("accuracy")
        replies = max(1, sum(heard.count for heard in self.played.heard))
        return Measured(
            findings=found,
            curves=curves,
            accuracy=None if accuracy is None else (float(accuracy), len(outside)),
            claimed=claimed,
            bytes_up=self.played.bytes_up / replies,
            seconds=float(np.median(self.played.seconds)),
        )

    def crowd(self) -> Measured:
        """Participation in round 1; nothing to find where all nodes took part."""
        inside = sorted(self.played.heard[0].wire)
        outside = [node for node in range(self.count) if node not in set(inside)]
        half = MOST_NODES // 3
        if len(outside) < 3:
            raise ConfigError("all nodes took part in round 1, so there is nothing to tell apart")
        imitated = outside[half : 2 * half] or outside[: max(1, len(outside) // 3)]
        candidates = nodes.Candidates(
            lambda node: self._data(node).train, self.trainer, self.options
        )
        own = [node for node in outside if node not in set(imitated)][:half]
        found, curves = nodes.took_part(
            self.played.view("other-node"),
            candidates,
            inside[:half],
            own,
            imitated=imitated,
            cohort=float(len(inside)),
        )
        return Measured(findings=found, curves=curves)

    def pictures(self) -> Measured:
        """Closed form and labels on one-example nodes with a step each."""
        examples = [_split(self._data(node).train)[0] for node in range(min(self.count, 8))]
        x = torch.stack([torch.as_tensor(one.x[0]) for one in examples]).float()
        y = torch.stack([torch.as_tensor(one.y[0]) for one in examples]).long()
        flat = Pool("own", x.flatten(1), y, x[:0], y[:0], int(y.max()) + 2, None)
        data: Callable[[Node, Options], Any] = lambda node, _: Split(examples[node.partition])  # noqa: E731
        changes = {**_alone(self.federation), "data": data}
        one: Any = replace(self.federation, **changes)  # type: ignore[type-var]
        given = {**self.options, "rounds": 1, "cohort": "all", "sampling": "all"}
        given["federated-every"] = -1
        given |= {"local-steps": 1, "momentum": 0.0, "batch-size": 0}
        played = play(one, len(examples), given)
        view = played.view("server")
        found = reconstruct.labels(
            view, {node: int(y[node]) for node in range(len(y))}, flat.classes
        )
        try:
            more, _ = reconstruct.closed_form(
                view, {node: flat.x[node] for node in range(len(y))}, flat
            )
        except ConfigError:
            more = []  # the model begins with another layer
        return Measured(findings=[*found, *more])

    def _data(self, node: int) -> Split:
        found = self.federation.data(Node(node, self.count, {}), self.options)
        return found if isinstance(found, Split) else Split(found)

    def _held_out(self) -> Any:
        made = getattr(self.federation, "test", None) or getattr(
            self.federation.data, "central_test", None
        )
        if made is not None:
            return made(self.options)
        tests = [self._data(node).test for node in range(self.count)]
        found = next((test for test in tests if test is not None), None)
        if found is None:
            raise ConfigError(
                "the app has no held-out examples to compare with; give its federation `test`, or "
                "its data a test_fraction"
            )
        return found

    def _losses(self, examples: list[Examples]) -> Scores:
        view = self.played.view("model-user")
        first = self.trainer.initial(self.options, int(self.options["seed"]))
        weights = Weights(view.manifest.unflatten(view.final), first.buffers)
        losses = [
            self.trainer.evaluate(weights, one, self.options).metrics["loss"] for one in examples
        ]
        return np.asarray(losses, dtype=np.float64)


def _split(examples: Any) -> list[Examples]:
    """Single examples, at most 2,000; a torch data set is read item by item."""
    size = min(len(examples), 2000)
    if isinstance(examples, Examples):
        return [examples.take(slice(i, i + 1)) for i in range(size)]
    items = [examples[i] for i in range(size)]
    return [Examples(torch.as_tensor(x)[None], torch.as_tensor(y)[None]) for x, y in items]


def _delta(options: Mapping[str, Any], federation: Attackable) -> float:
    known = {**federation.complete({}), **options}
    return float(known.get("delta", 1e-5))


def _norm(federation: Attackable, options: Options) -> float:
    """The bound of an update under the stack, so that canaries are longer than it."""
    stack = federation.stack_for(federation.complete(options))
    facts = Facts(size=1000)
    for layer, state in zip(stack.layers, stack.init(1000), strict=True):
        facts = layer.check(facts, state)
        if facts.l2_bound is not None:
            return facts.l2_bound
    return 1.0
