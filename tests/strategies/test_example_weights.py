"""Means by examples: no node counts for more than ten times the median, whoever comes when."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import collected, gathering, reply
from umbel.strategies.collect import PlainSum, Sum
from umbel.strategies.example_weights import TIMES, LimitedFold, Patience

SIZE = 5


def term(place: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(place))


def mean_of(claims: Sequence[float], collect: PlainSum, order: Sequence[int] | None = None) -> Sum:
    replies = [reply(i + 1, term(i), n, metrics={"loss": float(i)}) for i, n in enumerate(claims)]
    arriving = [replies[i] for i in (order or range(len(claims)))]
    nodes = range(1, len(claims) + 1)
    return collected(collect, arriving, nodes, gathering(SIZE))


def weighted(weights: Sequence[float]) -> Any:
    rows = np.stack([term(i).double().numpy() for i in range(len(weights))])
    return np.average(rows, axis=0, weights=weights)


def lower_median(claims: Sequence[float]) -> float:
    return sorted(claims)[(len(claims) - 1) // 2]


@given(st.lists(st.integers(1, 2**52), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_no_node_counts_for_more_than_ten_times_the_median(claims: Any, shuffle: Any) -> None:
    limit = TIMES * lower_median(claims)
    weights = [min(n, limit) for n in claims]
    found = mean_of(claims, PlainSum())
    np.testing.assert_allclose(
        found.total / found.denominator, weighted(weights), rtol=1e-4, atol=1e-5
    )
    assert found.weight == sum(weights)
    assert {one.node_id for one in found.limited} == {
        i + 1 for i, n in enumerate(claims) if n > limit
    }
    order = list(range(len(claims)))
    shuffle.shuffle(order)
    again = mean_of(claims, PlainSum(hold_bytes=1 << 20), order)
    assert torch.equal(again.total, found.total)
    assert again.metrics == found.metrics


@pytest.mark.parametrize("liar", range(6))
@pytest.mark.parametrize("hold_bytes", [0, 3 * SIZE * 4, 1 << 20])
def test_a_claim_of_2_to_the_52_is_worth_ten_nodes_at_most(liar: int, hold_bytes: int) -> None:
    """Whatever fits into memory, and at whatever place of the cohort the liar is."""
    claims = [12.0, 10.0, 14.0, 11.0, 13.0]
    claims.insert(liar, 2.0**52)
    found = mean_of(claims, PlainSum(hold_bytes=hold_bytes))
    (limited,) = found.limited
    assert (limited.node_id, limited.said) == (liar + 1, 2.0**52)
    assert limited.counted <= TIMES * 14
    assert "10 times the median" in limited.why
    weights = [min(n, limited.counted) for n in claims]
    np.testing.assert_allclose(
        found.total / found.denominator, weighted(weights), rtol=1e-4, atol=1e-5
    )
    assert found.metrics["loss"] == pytest.approx(np.average(np.arange(6.0), weights=weights))


def test_natural_numbers_of_examples_change_nothing() -> None:
    """No bit, whether terms wait or are added at once."""
    claims = [50.0, 120.0, 400.0, 95.0, 60.0]
    whole = mean_of(claims, PlainSum(max_examples=1 << 30))
    for hold_bytes in (0, 1 << 20):
        found = mean_of(claims, PlainSum(hold_bytes=hold_bytes))
        assert torch.equal(found.total, whole.total)
        assert found.limited == ()


def test_max_examples_is_a_limit_of_ones_own() -> None:
    found = mean_of([5, 50, 500], PlainSum(max_examples=100))
    assert found.weight == 155
    assert [(one.node_id, one.counted) for one in found.limited] == [(3, 100.0)]
    assert found.limited[0].why == "max-examples is 100"


def test_buffers_weigh_as_their_updates_do() -> None:
    for hold_bytes in (0, 1 << 20):
        rows = [(1, 2.0**50, 100.0), (2, 10.0, 1.0), (3, 10.0, 1.0), (4, 10.0, 1.0)]
        replies = [reply(i, term(i), n, buffers=torch.tensor([b])) for i, n, b in rows]
        round_ = gathering(SIZE, buffers=1)
        found = collected(PlainSum(hold_bytes=hold_bytes), replies, range(1, 5), round_)
        assert found.buffers is not None
        assert float(found.buffers[0]) == pytest.approx((100 * 100 + 30) / 130)


def test_large_terms_do_not_wait() -> None:
    """At most one is held, and only until the word of three is known."""
    patience = Patience.of(0, 400 << 20, 64 << 20)
    assert (patience.eager, patience.wait) == (True, 3)
    fold = LimitedFold(SIZE, torch.float32, 0, patience=patience)
    waiting = []
    for place, claim in enumerate([2.0**50, 10.0, 11.0, 12.0, 13.0]):
        fold.offer(place, term(place), claim)
        waiting.append(len(fold._waiting))
    assert waiting == [0, 1, 0, 0, 0]
    total = fold.finish()
    assert [one.weight for one in fold.counted] == [110.0, 10.0, 11.0, 12.0, 13.0]
    expected = weighted([110, 10, 11, 12, 13]) * 156
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)


def test_shuffled_cohorts_of_large_terms_give_one_sum() -> None:
    claims = [float(random.Random(i).choice([1, 7, 90, 2**40])) for i in range(12)]
    sums = []
    for seed in range(5):
        order = list(range(12))
        random.Random(seed).shuffle(order)
        sums.append(mean_of(claims, PlainSum(hold_bytes=0), order).total)
    assert all(torch.equal(one, sums[0]) for one in sums)
