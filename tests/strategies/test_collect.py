"""The plain sum: the weighted mean, whoever comes when; a bad reply costs its sender only."""

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import collected, gathering, reply, weighted_mean
from umbel.strategies.collect import MeanMetrics, PlainSum
from umbel.strategies.transform import Facts

NODES = (1001, 1002, 1003, 1004, 1005)


def updates(size: int = 6, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("weighting", ["examples", "equal", "fixed"])
def test_it_is_the_weighted_mean(weighting: Any) -> None:
    terms, weights = updates(), [1, 20, 3, 400, 5]
    replies = [reply(*row) for row in zip(NODES, terms, weights, strict=True)]
    collect = PlainSum(weighting, max_examples=1000)
    found = collected(collect, replies, NODES, gathering(6, cohort=5.0))
    used = weights if weighting == "examples" else [1] * 5
    expected = weighted_mean([t.numpy() for t in terms], used)
    np.testing.assert_allclose(found.total / found.denominator, expected, rtol=1e-5, atol=1e-6)
    assert (found.replies, found.weight, found.rejected) == (5, sum(used), ())
    assert found.bytes_up == 5 * 6 * 4


def test_a_fixed_denominator_does_not_count_who_came() -> None:
    replies = [reply(node, update) for node, update in zip(NODES[:2], updates(), strict=False)]
    found = collected(PlainSum("fixed"), replies, NODES, gathering(6, cohort=5.0))
    assert (found.denominator, found.replies) == (5.0, 2)


@given(st.randoms(use_true_random=False), st.sets(st.sampled_from(range(5))))
def test_the_bits_do_not_depend_on_arrival(shuffle: random.Random, bad: set[int]) -> None:
    replies = [
        reply(node, None if i in bad else update, i + 1, metrics={"loss": 0.1 * i})
        for i, (node, update) in enumerate(zip(NODES, updates(), strict=True))
    ]
    first = collected(PlainSum(), replies, NODES, gathering(6))
    shuffle.shuffle(replies)
    second = collected(PlainSum(hold_bytes=0), replies, NODES, gathering(6))
    assert torch.equal(first.total, second.total)
    assert (first.weight, first.metrics) == (second.weight, second.metrics)
    assert first.replies == second.replies == 5 - len(bad)


GOOD = torch.ones(6)
BAD = {
    "NaN": (reply(1002, torch.tensor([1.0, math.nan, 0, 0, 0, 0])), "NaN or infinity"),
    "infinity": (reply(1002, torch.tensor([1.0, math.inf, 0, 0, 0, 0])), "NaN or infinity"),
    "minus infinity": (reply(1002, torch.full((6,), -math.inf)), "NaN or infinity"),
    "huge": (reply(1002, torch.full((6,), 1e12)), "the longest taken"),
    "huge beyond squares": (reply(1002, torch.full((6,), 1e30)), r"norm 2\.449\d*e\+30, but"),
    "short": (reply(1002, torch.ones(5)), r"shape \(5,\), not \(6,\)"),
    "long": (reply(1002, torch.ones(7)), r"shape \(7,\), not \(6,\)"),
    "a matrix": (reply(1002, torch.ones(2, 3)), r"shape \(2, 3\)"),
    "a scalar": (reply(1002, torch.tensor(1.0)), r"shape \(\)"),
    "double": (reply(1002, torch.ones(6).double()), "float64, but the model is torch.float32"),
    "half": (reply(1002, torch.ones(6).half()), "float16, but the model is torch.float32"),
    "integers": (reply(1002, torch.ones(6, dtype=torch.int32)), "int32"),
    "no update": (reply(1002), "without 'update'"),
    "no examples": (reply(1002, GOOD, 0), "num-examples is 0.0"),
    "negative examples": (reply(1002, GOOD, -3), "num-examples is -3.0"),
    "NaN examples": (reply(1002, GOOD, math.nan), "num-examples is nan"),
    "infinitely many examples": (reply(1002, GOOD, math.inf), "num-examples is inf"),
    "absurdly many examples": (reply(1002, GOOD, 10**400), "num-examples"),
    "a list of examples": (reply(1002, GOOD, [1, 2]), "num-examples"),
    "an error": (reply(1002, error="OSError: disk on fire"), "disk on fire"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_costs_its_sender_and_not_the_round(name: str) -> None:
    bad, why = BAD[name]
    good = [reply(1001, GOOD, 3), reply(1003, GOOD * 2, 1)]
    found = collected(PlainSum(), [good[0], bad, good[1]], NODES[:3], gathering(6))
    assert found.total.tolist() == [5.0] * 6
    assert (found.replies, found.weight) == (2, 4.0)
    (rejected,) = found.rejected
    assert rejected.node_id == 1002
    assert re.search(why, rejected.reason)


def test_strangers_and_second_replies_have_no_place() -> None:
    replies = [reply(1001, GOOD), reply(999, GOOD * 50), reply(1001, GOOD * 50), reply(1002, GOOD)]
    found = collected(PlainSum(), replies, NODES[:2], gathering(6))
    assert found.total.tolist() == [2.0] * 6
    assert [item.node_id for item in found.rejected] == [999, 1001]


def test_a_second_reply_does_not_mend_a_bad_first_one() -> None:
    found = collected(
        PlainSum(), [reply(1001, torch.ones(5)), reply(1001, GOOD)], (1001,), gathering(6)
    )
    assert (found.replies, found.denominator) == (0, 0.0)
    assert found.total.tolist() == [0.0] * 6


def test_a_promised_bound_is_held() -> None:
    round_ = gathering(6, facts=Facts(6, l2_bound=1.0))
    inside, outside = torch.zeros(6), torch.zeros(6)
    inside[0], outside[0] = 1.0, 1.0001
    found = collected(PlainSum(), [reply(1001, inside), reply(1002, outside)], NODES[:2], round_)
    assert found.replies == 1
    assert "1 is the longest taken" in found.rejected[0].reason


def test_buffers_are_averaged_beside_the_update() -> None:
    round_ = gathering(6, buffers=2)
    rows = [(1001, torch.tensor([1.0, 2.0]), 1), (1002, torch.tensor([5.0, 6.0]), 3)]
    replies = [reply(node, GOOD, weight, buffers=buffers) for node, buffers, weight in rows]
    found = collected(PlainSum(), replies, NODES[:2], round_)
    assert found.buffers is not None
    assert found.buffers.tolist() == [4.0, 5.0]


@pytest.mark.parametrize(
    ("buffers", "why"),
    [
        (torch.tensor([math.nan, 1.0]), "NaN or infinity"),
        (torch.tensor([math.inf, 1.0]), "NaN or infinity"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(2, dtype=torch.int64), "int64"),
        (None, "without 'buffers'"),
    ],
)
def test_bad_buffers_cost_their_sender_the_update_too(buffers: Any, why: str) -> None:
    more = {} if buffers is None else {"buffers": buffers}
    replies = [reply(1001, GOOD, **more), reply(1002, GOOD, buffers=torch.tensor([1.0, 2.0]))]
    found = collected(PlainSum(), replies, NODES[:2], gathering(6, buffers=2))
    assert found.buffers is not None
    assert (found.buffers.tolist(), found.total.tolist()) == ([1.0, 2.0], [1.0] * 6)
    assert re.search(why, found.rejected[0].reason)


def test_metrics_are_weighted_means_over_those_who_sent_them() -> None:
    replies = [
        reply(1001, GOOD, 1, metrics={"loss": 1.0, "rare": 7.0}),
        reply(1002, GOOD, 3, metrics={"loss": 2.0, "broken": math.nan, "rows": [1.0]}),
    ]
    found = collected(PlainSum(), replies, NODES[:2], gathering(6))
    assert found.metrics == {"loss": 1.75, "rare": 7.0}


ABSURD = {"large": 1.7e308, "small": -1.7e308, "inf": math.inf, "nan": math.nan, "int": 10**400}


@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_no_metric_of_a_node_ends_the_round(value: float) -> None:
    replies = [
        reply(1001, GOOD, 2**52, metrics={"loss": value}),
        reply(1002, GOOD, 2**52, metrics={"loss": value}),
        reply(1003, GOOD, 1, metrics={"loss": 0.5}),
    ]
    found = collected(PlainSum(), replies, NODES[:3], gathering(6))
    assert (found.replies, found.metrics) == (3, {"loss": 0.5})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_mean_metrics_do_not_depend_on_arrival(values: list[float], shuffle: Any) -> None:
    rows = list(enumerate(values))
    results = []
    for _ in range(2):
        means = MeanMetrics()
        for position, value in rows:
            means.add(position, {"loss": value}, 1.0 + position)
        results.append(means.result())
        shuffle.shuffle(rows)
    assert results[0] == results[1]


def test_check_says_what_the_weights_are() -> None:
    assert PlainSum().check(Facts(6)).weight_bound is None
    assert PlainSum("equal").check(Facts(6)).weight_bound == 1.0
    assert not PlainSum("equal").check(Facts(6)).public_denominator
    assert PlainSum("fixed").check(Facts(6)).public_denominator
