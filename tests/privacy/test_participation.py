"""Attacks on nodes, against sums of known clients."""

import numpy as np
import pytest
import torch

from umbel.privacy.attacks.participation import (
    cosine,
    likelihood_ratio,
    property_scores,
    sketch,
    source,
)
from umbel.privacy.attacks.roc import auc

GENERATOR = torch.Generator().manual_seed(0)
UPDATES = torch.randn(200, 500, generator=GENERATOR)
INSIDE = torch.arange(200) < 20


def area(scores: np.ndarray) -> float:
    inside = INSIDE.numpy()
    return auc(scores[inside], scores[~inside]).value


def test_a_client_shows_in_a_sum_and_drowns_in_noise() -> None:
    total = UPDATES[INSIDE].sum(dim=0)
    assert area(cosine(UPDATES, total)) > 0.95
    buried = total + 500 * torch.randn(500, generator=GENERATOR)
    # 20 against 180 at chance: the area's deviation is 0.068.
    assert 0.17 < area(cosine(UPDATES, buried)) < 0.83


def test_the_likelihood_ratio_takes_out_what_all_clients_share() -> None:
    common = 3 * torch.randn(500, generator=GENERATOR)
    lengths = torch.linspace(0.3, 3, 200)[torch.randperm(200, generator=GENERATOR)]
    updates = lengths[:, None] * (UPDATES + common)
    total = updates[INSIDE].sum(dim=0)
    background = common * float(lengths[INSIDE].sum())
    ratio = area(likelihood_ratio(updates - lengths[:, None] * common, total, background))
    assert ratio > 0.95
    assert ratio > area(cosine(updates, total))


def test_nothing_released_is_no_evidence() -> None:
    assert not cosine(UPDATES, torch.zeros(500)).any()
    assert np.isfinite(likelihood_ratio(UPDATES, torch.zeros(500), torch.zeros(500))).all()


def test_source_is_the_client_with_the_smallest_loss() -> None:
    losses = np.array([[0.1, 2.0], [0.5, 0.3], [0.4, 0.9]])
    assert source(losses).tolist() == [0, 1]


def test_a_sketch_keeps_inner_products_on_average() -> None:
    estimates = [float(sketch(UPDATES[:2], 64, seed).prod(dim=0).sum()) for seed in range(400)]
    true = float(UPDATES[0].double() @ UPDATES[1].double())
    spread = float(UPDATES[0].norm() * UPDATES[1].norm()) / 8
    assert np.mean(estimates) == pytest.approx(true, abs=5 * spread * 1.5 / 20)


def test_a_property_is_read_from_updates() -> None:
    direction = torch.randn(500, generator=GENERATOR) / 10
    has = torch.arange(200) % 2 == 0
    updates = sketch(UPDATES + has[:, None] * direction * 4, 64, 0)
    scores = property_scores(updates[:100], has[:100], updates[100:])
    truth = has[100:].numpy()
    assert auc(scores[truth], scores[~truth]).value > 0.8
    nothing = sketch(UPDATES, 64, 0)
    blind = property_scores(nothing[:100], has[:100], nothing[100:])
    # At chance the area's deviation is 0.058.
    assert 0.21 < auc(blind[truth], blind[~truth]).value < 0.79


def test_one_kind_of_client_teaches_nothing() -> None:
    with pytest.raises(ValueError, match="nothing from one kind"):
        property_scores(UPDATES[:4], torch.ones(4, dtype=torch.bool), UPDATES[:4])
