"""Attacks on nodes, on an adversary's view: who took part, whose example, what data is like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umbel.benchmarks.attack.findings import Finding, roc_findings
from umbel.benchmarks.attack.members import losses_of
from umbel.benchmarks.attack.tasks import Dealt
from umbel.benchmarks.attack.views import View
from umbel.clients.trainers.base import Job, Options, Trainer, Weights
from umbel.privacy.attacks import participation
from umbel.privacy.attacks.audit import clopper_pearson
from umbel.privacy.attacks.roc import Roc


@dataclass(frozen=True)
class Candidates:
    """Nodes whose data the attacker knows or can imitate, and what is true of them.

    Attributes:
        examples: of a node, by its partition.
        trainer: the federation's.
        options: of the run.
    """

    examples: Callable[[int], Any]
    trainer: Trainer
    options: Options

    def updates(self, model: Tensor, view: View, nodes: Sequence[int]) -> Tensor:
        """What each of `nodes` would answer to `model`, without layers; shape (n, size)."""
        weights = Weights(view.manifest.unflatten(model))
        made = []
        for node in nodes:
            job = Job(round=1, seed=0, options=self.options)
            trained = self.trainer.train(weights, self.examples(node), job)
            made.append(view.manifest.flatten(trained.weights.parameters) - model)
        return torch.stack(made)


def took_part(
    view: View,
    candidates: Candidates,
    inside: Sequence[int],
    outside: Sequence[int],
    *,
    imitated: Sequence[int],
    cohort: float,
) -> tuple[list[Finding], dict[str, Roc]]:
    """Which nodes took part in round 1, from how the model changed: two scores.

    Args:
        view: of an adversary who sees the models, but was not told the cohort.
        candidates: whose data the attacker knows.
        inside: partitions that took part.
        outside: partitions that did not.
        imitated: partitions of the attacker's own, which tell it what nodes have in common.
        cohort: the expected number of nodes of a round, which is public.
    """
    if len(view.models) < 2:
        return [], {}
    change = view.models[1] - view.models[0]
    updates = candidates.updates(view.models[0], view, [*inside, *outside])
    common = candidates.updates(view.models[0], view, imitated).mean(dim=0)
    scores = {
        "participation: cosine": participation.cosine(updates, change),
        "participation: likelihood ratio": participation.likelihood_ratio(
            updates - common, change * cohort, common
        ),
    }
    findings, curves = [], {}
    for name, values in scores.items():
        found, curves[name] = roc_findings(
            name, view.adversary, values[: len(inside)], values[len(inside) :]
        )
        findings += found
    return findings, curves


def has_property(
    view: View, candidates: Candidates, truth: Mapping[int, bool],
    imitated: Sequence[int], imitated_truth: Sequence[bool], seed: int,
) -> tuple[list[Finding], dict[str, Roc]]:  # fmt: skip
    """Which nodes' data have a property, from their replies; nothing where only sums are seen."""
    replies = view.replies[0] if view.replies else {}
    nodes = [node for node in truth if node in replies]
    if len(nodes) < 4:
        return [], {}
    known = candidates.updates(view.models[0], view, imitated)
    seen = torch.stack([replies[node].float() for node in nodes])
    # Nodes' updates may have been clipped: only directions are compared.
    unit = nn.functional.normalize
    scores = participation.property_scores(
        participation.sketch(unit(known), 64, seed),
        torch.tensor(imitated_truth),
        participation.sketch(unit(seen), 64, seed),
    )
    has = np.array([truth[node] for node in nodes])
    if has.all() or not has.any():
        return [], {}
    found, curve = roc_findings("property", view.adversary, scores[has], scores[~has])
    return found, {"property": curve}


def whose(view: View, dealt: Dealt, model: nn.Module) -> list[Finding]:
    """Source inference: whose example it is, for every example of every readable reply."""
    replies = view.replies[0] if view.replies else {}
    nodes = sorted(replies)
    if len(nodes) < 2:
        return []
    rows = np.concatenate([dealt.rows[node] for node in nodes])
    owner = np.concatenate([[at] * len(dealt.rows[n]) for at, n in enumerate(nodes)])
    examples = dealt.pool.take(rows)
    losses = []
    for node in nodes:
        local = view.models[0] + replies[node].to(view.models[0].dtype)
        losses.append(losses_of(model, view, local, examples.x, examples.y))
    right = int((participation.source(np.stack(losses)) == owner).sum())
    low, high = clopper_pearson(right, len(rows))
    return [
        Finding(
            "source inference",
            view.adversary,
            "owners found",
            right / len(rows),
            low,
            high,
            1 / len(nodes),
            len(rows),
        )
    ]
