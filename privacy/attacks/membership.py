"""Membership inference: was this example among those that the model was trained on?

The attacker has the model and the example; the stronger ones also train reference models on
data of the same kind. All functions give a score an example; larger means "was a member".

    loss_threshold   the example's loss alone                  Yeom et al. 2018
    lira             a likelihood ratio over reference models   Carlini et al. 2022
    rmia             pairwise ratios against other examples     Zarifzadeh et al. 2024
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from umbel.privacy.attacks.audit import Scores

Members = NDArray[np.bool_]
"""Shape (references, examples): which reference model was trained on which example."""

FEW_REFERENCES = 64
"""Below this, a spread per example is too noisy and one is shared (Carlini et al., section VI)."""


def true_class_probability(logits: Tensor, labels: Tensor) -> Scores:
    """Each example's predicted probability of its own label, shape (n,), in (0, 1]."""
    chosen = torch.log_softmax(logits.double(), dim=1).gather(1, labels.long()[:, None])[:, 0]
    return np.asarray(chosen.exp().cpu().numpy(), dtype=np.float64)


def scaled_confidence(logits: Tensor, labels: Tensor) -> Scores:
    """phi = ln(p / (1 - p)) of each example's own label, shape (n,), without rounding to 0 or 1.

    p / (1 - p) is the own logit against the log-sum of all the others (Carlini et al., section
    VI), which stays exact where p is 1 to machine precision.
    """
    logits = logits.double()
    rows = torch.arange(len(logits))
    own = logits[rows, labels.long()]
    others = logits.clone()
    others[rows, labels.long()] = -torch.inf
    return np.asarray((own - torch.logsumexp(others, dim=1)).cpu().numpy(), dtype=np.float64)


def loss_threshold(losses: Scores) -> Scores:
    """Minus the loss: members have been trained to a smaller one."""
    return -np.asarray(losses, dtype=np.float64)


def lira(target: Scores, references: Scores, members: Members | None = None) -> Scores:
    """The likelihood ratio attack on scaled confidences.

    Args:
        target: phi of the attacked model, shape (n,).
        references: phi of the reference models, shape (k, n).
        members: shape (k, n); None is the offline attack, where no reference model was trained on
            any of the examples.

    Returns:
        Online: ln N(phi; in) - ln N(phi; out). Offline: how many spreads phi lies above the mean
        of the models that did not see the example, which ranks as 1 - CDF does. Shape (n,).

    Raises:
        ValueError: an example was in all or in none of the reference models (online), or there
            are fewer than two reference models.
    """
    _references(target, references, members)
    if members is None:
        mean, spread = _normal(references, np.ones(references.shape, dtype=bool))
        return np.asarray((target - mean) / spread)
    mean_in, spread_in = _normal(references, members)
    mean_out, spread_out = _normal(references, ~members)
    return np.asarray(
        stats.norm.logpdf(target, mean_in, spread_in)
        - stats.norm.logpdf(target, mean_out, spread_out)
    )


def rmia(
    target: Scores,
    references: Scores,
    *,
    population_target: Scores,
    population_references: Scores,
    members: Members | None = None,
    offline_slope: float = 0.3,
) -> Scores:
    """The relative membership inference attack on true-class probabilities, with gamma = 1.

    For each example the fraction of population examples z with
    (p(x | model) / p(x)) / (p(z | model) / p(z)) > 1. Without models that were trained on x,
    p(x) = ((1 + a) p_out(x) + (1 - a)) / 2 (arXiv:2312.03262, section 3 and appendix B.2.2).

    Args:
        target: probabilities by the attacked model, shape (n,).
        references: by the reference models, shape (k, n).
        population_target: by the attacked model on examples that nobody was trained on, (z,).
        population_references: by the reference models on the same, shape (k, z).
        members: shape (k, n) for the online attack; None for the offline one.
        offline_slope: a.

    Returns:
        Shape (n,), in [0, 1].
    """
    _references(target, references, members)
    if members is None:
        typical = _offline(references.mean(axis=0), offline_slope)
    else:
        inside = np.where(members, references, 0).sum(axis=0) / members.sum(axis=0)
        outside = np.where(~members, references, 0).sum(axis=0) / (~members).sum(axis=0)
        typical = (inside + outside) / 2
    population = _offline(population_references.mean(axis=0), offline_slope)
    against = np.sort(population_target / population)
    dominated = np.searchsorted(against, target / typical, side="left")
    return np.asarray(dominated / len(against), dtype=np.float64)


def _offline(outside: Scores, slope: float) -> Scores:
    typical: NDArray[np.float64] = ((1 + slope) * outside + (1 - slope)) / 2
    return typical


def _normal(references: Scores, chosen: Members) -> tuple[Scores, Scores]:
    """Mean of the chosen references per example, and their spread (shared where they are few)."""
    counts = chosen.sum(axis=0)
    mean = np.where(chosen, references, 0).sum(axis=0) / counts
    squares = np.where(chosen, (references - mean) ** 2, 0).sum(axis=0)
    if counts.min() >= FEW_REFERENCES:
        spread = np.sqrt(squares / (counts - 1))
    else:
        freedom = max(1, int((counts - 1).sum()))
        spread = np.full(mean.shape, np.sqrt(squares.sum() / freedom))
    return mean, np.maximum(spread, 1e-12)


def _references(target: Scores, references: Scores, members: Members | None) -> None:
    if references.ndim != 2 or references.shape[1:] != target.shape:
        raise ValueError(
            f"reference scores must be of shape (models, {len(target)}), "
            f"but they are {references.shape}"
        )
    if members is None:
        return
    if members.shape != references.shape:
        raise ValueError(
            f"members must be of shape {references.shape} like the reference scores, "
            f"but it is {members.shape}"
        )
    counts = members.sum(axis=0)
    if counts.min() == 0 or counts.max() == len(members):
        raise ValueError(
            "an example is a member of all reference models or of none; the online attack needs "
            "both kinds for every example: draw each model's half anew, or use more models"
        )
