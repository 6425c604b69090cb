"""Membership inference on the final model of an adversary's view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umbel.benchmarks.attack.findings import Finding, roc_findings
from umbel.benchmarks.attack.tasks import Pool
from umbel.benchmarks.attack.views import View
from umbel.privacy.attacks.audit import Scores
from umbel.privacy.attacks.membership import (
    lira,
    loss_threshold,
    rmia,
    scaled_confidence,
    true_class_probability,
)
from umbel.privacy.attacks.roc import Roc, percentiles


@dataclass(frozen=True)
class Suspects:
    """Examples of which the attacker wants to know whether the model was trained on them.

    Attributes:
        pool: where they are.
        rows: of the suspects.
        members: which of them were, the truth; shape (len(rows),).
        population: rows that nobody was trained on.
    """

    pool: Pool
    rows: np.ndarray[Any, np.dtype[np.intp]]
    members: np.ndarray[Any, np.dtype[np.bool_]]
    population: np.ndarray[Any, np.dtype[np.intp]]


def guesses(
    view: View,
    model: nn.Module,
    suspects: Suspects,
    references: Sequence[nn.Module],
    reference_members: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
) -> dict[str, Scores]:
    """Loss threshold, LiRA and RMIA on the final model: each attack's scores of all suspects.

    Args:
        view: any; only the final model is used.
        model: a module of the same layout, filled here.
        suspects: the examples.
        references: models that the attacker trained on data of its own.
        reference_members: shape (references, suspects) where they were trained on suspects: the
            online attacks; None for the offline ones.
    """
    fill(model, view, view.final)
    x, y = suspects.pool.x, suspects.pool.y
    both = np.concatenate([suspects.rows, suspects.population])
    cut = len(suspects.rows)
    with torch.no_grad():
        target = model(x[both])
        others = [reference(x[both]) for reference in references]
    phi = np.stack([scaled_confidence(out, y[both]) for out in (target, *others)])
    p = np.stack([true_class_probability(out, y[both]) for out in (target, *others)])
    scores = {"loss threshold": loss_threshold(-phi[0, :cut])}
    if len(references) >= 2:
        kind = "offline" if reference_members is None else "online"
        scores[f"LiRA {kind}"] = lira(phi[0, :cut], phi[1:, :cut], reference_members)
        scores[f"RMIA {kind}"] = rmia(
            p[0, :cut],
            p[1:, :cut],
            population_target=p[0, cut:],
            population_references=p[1:, cut:],
            members=reference_members,
        )
    return scores


def judged(
    draws: Sequence[Mapping[str, Scores]], members: Sequence[np.ndarray[Any, np.dtype[np.bool_]]]
) -> tuple[list[Finding], dict[str, Roc], dict[str, Scores]]:
    """What attacks found in several runs with coins of their own, taken together.

    Models of different runs differ, so a score counts by its rank among the suspects of its run.

    Args:
        draws: for each run, every attack's scores of all suspects.
        members: for each run, which suspects were members.

    Returns:
        Findings, curves, and each attack's ranks of all suspects of all runs.
    """
    truth = np.concatenate(members)
    findings: list[Finding] = []
    curves: dict[str, Roc] = {}
    scores: dict[str, Scores] = {}
    for name in draws[0]:
        scores[name] = np.concatenate([percentiles(draw[name]) for draw in draws])
        found, curves[name] = roc_findings(
            name, "model-user", scores[name][truth], scores[name][~truth]
        )
        findings += found
    return findings, curves, scores


def fill(model: nn.Module, view: View, vector: Tensor) -> None:
    """Put a flat vector into a module of the view's layout."""
    tree = view.manifest.unflatten(vector)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), tree.values(), strict=True):
            parameter.copy_(value)


def losses_of(model: nn.Module, view: View, vector: Tensor, x: Any, y: Any) -> Scores:
    fill(model, view, vector)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return np.asarray(losses.double().numpy(), dtype=np.float64)
