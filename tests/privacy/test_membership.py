"""Membership inference on models that memorised, and on a toy where the best attack is known."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from umbel.privacy.attacks.audit import Scores
from umbel.privacy.attacks.membership import (
    lira,
    loss_threshold,
    rmia,
    scaled_confidence,
    true_class_probability,
)
from umbel.privacy.attacks.roc import auc


def test_confidences_do_not_round_away() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 5.0, 1.0]])
    labels = torch.tensor([0, 2])
    phi = scaled_confidence(logits, labels)
    assert phi[0] == pytest.approx(60 - np.log(2))
    p = true_class_probability(logits, labels)
    assert phi[1] == pytest.approx(np.log(p[1] / (1 - p[1])))
    assert p[0] == 1.0


@dataclass(frozen=True)
class Toy:
    """Every example has its own difficulty; membership adds 1 to phi; spreads are 1."""

    target: Scores
    references: Scores
    members: np.ndarray
    truth: np.ndarray


def toy(references: int) -> Toy:
    rng = np.random.default_rng(0)
    examples = 3000
    difficulty = 3 * rng.normal(size=examples)
    members = rng.random((references + 1, examples)) < 0.5
    phi = difficulty + members + rng.normal(size=members.shape)
    return Toy(phi[0], phi[1:], members[1:], members[0])


def area(scores: Scores, truth: np.ndarray) -> float:
    return auc(scores[truth], scores[~truth]).value


def test_lira_comes_close_to_the_best_attack() -> None:
    # Best possible is Phi(1 / sqrt 2) = 0.760; a loss threshold drowns in the difficulties.
    model = toy(64)
    assert area(loss_threshold(-model.target), model.truth) < 0.62
    assert area(lira(model.target, model.references, model.members), model.truth) > 0.74


def test_lira_offline_uses_models_that_saw_none_of_it() -> None:
    model = toy(64)
    outside = model.references - model.members
    assert area(lira(model.target, outside), model.truth) > 0.74


def test_rmia_takes_difficulty_out_with_few_references() -> None:
    model = toy(4)
    p = 1 / (1 + np.exp(-model.target))
    outside = 1 / (1 + np.exp(-(model.references - model.members)))
    scores = rmia(
        p,
        outside,
        population_target=p[~model.truth][:500],
        population_references=outside[:, ~model.truth][:, :500],
    )
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert area(scores, model.truth) > area(p, model.truth) + 0.05


def test_memorised_digits_give_their_members_away() -> None:
    """Half of each reference model's digits are the target's: the online setting."""
    digits = load_digits()
    x = torch.tensor(digits.data[:800], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[:800])
    flip = torch.Generator().manual_seed(0)
    # A third of the labels is random: what is memorised then is what was seen, nothing else.
    wrong = torch.rand(800, generator=flip) < 0.33
    y = torch.where(wrong, torch.randint(10, (800,), generator=flip), labels)
    chosen = np.stack([np.random.default_rng(i).random(600) < 0.5 for i in range(6)])
    models = [memorise(x[:600][rows], y[:600][rows], i) for i, rows in enumerate(chosen)]
    with torch.no_grad():
        logits = [model(x) for model in models]
    p = np.stack([true_class_probability(out, y) for out in logits])
    truth = chosen[0]
    mixed = (chosen[1:].sum(axis=0) > 0) & (chosen[1:].sum(axis=0) < 5)
    losses = area(p[0, :600][mixed], truth[mixed])
    scores = rmia(
        p[0, :600][mixed],
        p[1:, :600][:, mixed],
        population_target=p[0, 600:],
        population_references=p[1:, 600:],
        members=chosen[1:][:, mixed],
    )
    assert losses > 0.6
    assert area(scores, truth[mixed]) >= losses


def memorise(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(models, 3\)"):
        lira(np.zeros(3), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="needs both kinds"):
        lira(np.zeros(3), np.zeros((2, 3)), np.ones((2, 3), bool))
