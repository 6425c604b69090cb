"""Somebody's own federation under attack: their trainer, their data, their stack.

audit       canary nodes take the place of the app's nodes, under the app's stack and options
membership  the app's own run; losses of its nodes' examples against held-out ones
crowd       which nodes took part in a round
pictures    what an update of one example shows, where the model can be inverted
promises    noise, sampling and records, by tests that can say no
lies        a coordinator that does not keep to the protocol
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from umbel.benchmarks.attack import audits, lies, nodes, promises, reconstruct
from umbel.benchmarks.attack.canaries import Fault, aside, canary_run, claims, delta_of
from umbel.benchmarks.attack.defences import finite
from umbel.benchmarks.attack.findings import guaranteed, roc_findings
from umbel.benchmarks.attack.scenes import Measured
from umbel.benchmarks.attack.suite import Report, Row, stamp
from umbel.benchmarks.attack.tasks import Pool
from umbel.benchmarks.attack.views import Attackable, Played, play
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.trainers.base import Options, Trainer, Weights
from umbel.core.errors import ConfigError, UmbelError
from umbel.privacy.attacks.audit import Scores, one_run_audit

MOST_EXAMPLES = 400
"""Members, and as many others, whose losses are compared."""
MOST_NODES = 60
"""Nodes of the participation attack, each of which is trained once more."""


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
    verdicts = promises.examine(federation, options, count, seed=seed, fault=fault)
    if fault is None:
        verdicts += lies.tell(federation, options, count)
    row = Row(name, str(stack), "The app's own stack.", measured, found, notes, verdicts)
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
    """One-run bounds of a federation's stack and options, for both adversaries.

    All nodes take part, so nothing is amplified: what is compared is what the run of the
    canaries itself claims, not the epsilon of the app's schedule.

    Raises:
        ConfigError: the options cannot be used.
    """
    run = canary_run(federation, options, canaries=canaries, seed=seed, fault=fault)
    delta, coins = run.schedule.delta, run.coins
    claimed = claims(federation, run, options)
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
        return self.federation.trainer_for(self.options)

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
        delta = delta_of(self.options, self.federation)
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
        changes = {**aside(self.federation), "data": data}
        one: Any = replace(self.federation, **changes)
        given = {**self.options, "rounds": 1, "cohort": "all", "sampling": "all"}
        given["client-eval-every"] = -1
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
