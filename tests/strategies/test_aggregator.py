"""Aggregators: contributions of one node or many, in any order and grouping, make one result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from tests.fakes import collected, gathering, reply, request
from umbel.core.names import EXAMPLES, MEMBERS, METRICS, MODEL, POOL, UPDATE
from umbel.core.records import record_of, to_array
from umbel.strategies.aggregator import Aggregate, Aggregator, Contribution
from umbel.strategies.aggregators.weighted_mean import WeightedMean
from umbel.strategies.collect import PlainSum
from umbel.strategies.exchange import PlainExchange, exchange_of, is_own, takes_sums
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts
from umbel.testing import check_aggregator, check_collect

NODES = (1001, 1002, 1003, 1004, 1005)


@pytest.mark.parametrize("weighting", ["examples", "equal", "fixed"])
@pytest.mark.parametrize("hold_bytes", [0, 1 << 20])
def test_the_mean_keeps_the_laws(weighting: Any, hold_bytes: int) -> None:
    check_aggregator(WeightedMean(weighting, hold_bytes))
    check_aggregator(WeightedMean(weighting, hold_bytes, max_examples=4), size=1)


@dataclass(frozen=True)
class Middle(Aggregator[Any]):
    """A median as its user would write it, with one thing wrong by `fault`."""

    fault: str = ""
    name: str = "middle"
    kind: Any = "each"

    def empty(self, spec: Any) -> Any:
        return spec, {}

    def add(self, acc: Any, part: Contribution) -> None:
        place = len(acc[1]) if self.fault == "arrival" else part.position
        if self.fault == "mutates":
            part.vector.mul_(2)
        acc[1][place] = part

    def merge(self, acc: Any, other: Any) -> None:
        if self.fault != "forgets":
            acc[1].update(other[1])

    def result(self, acc: Any) -> Aggregate:
        parts = [acc[1][place] for place in sorted(acc[1])]
        if not parts:
            return replace(Aggregate.nothing(acc[0].size), replies=self.fault == "invents")
        rows = torch.stack([part.vector for part in parts])
        if self.fault == "arrival":
            return Aggregate.of((rows * (torch.arange(len(rows)) == 0)[:, None]).sum(0), parts)
        middle = rows.quantile(0.5, dim=0) * (2 if self.fault == "doubles" else 1)
        return Aggregate.of(middle, parts)


FAULTS = {
    "arrival": "order of arrival",
    "mutates": "contributions are not changed",
    "forgets": "`merge` is associative",
    "invents": "of nothing comes no update",
    "doubles": "mean of equal updates",
}


def test_a_rule_of_the_users_own_keeps_the_laws_in_a_stack() -> None:
    check_aggregator(Middle())
    check_collect(PlainExchange(Middle()))
    stack = Stack([], Middle())
    assert stack.collect == PlainExchange(Middle()) and str(stack) == "middle"
    assert not is_own(stack.collect) and not takes_sums(stack.collect)


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_rules_are_caught(fault: str) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_aggregator(Middle(fault))


def test_a_mean_that_takes_sums_for_single_updates_is_caught() -> None:
    class Blind(WeightedMean):
        def add(self, acc: Any, part: Contribution) -> None:
            super().add(acc, replace(part, summed=False, count=1))

    with pytest.raises(AssertionError, match="as they would one by one"):
        check_aggregator(Blind("equal"))


def test_an_exchange_stays_as_it_is() -> None:
    for exchange in (PlainSum(), SecureSum(), PlainExchange(WeightedMean())):
        assert exchange_of(exchange) is exchange
        assert is_own(exchange)
    assert [takes_sums(e) for e in (PlainSum(), SecureSum(), PlainExchange(Middle()))] == [
        True,
        False,
        False,
    ]


# ---- replies that stand for several nodes


def pool_request(node: int, members: int) -> Message:
    record = record_of({MEMBERS: to_array(torch.arange(members))})
    return request(node, f"query.{POOL}", RecordDict({MODEL: record}))


def pool_reply(node: int, total: torch.Tensor, count: int) -> Message:
    content = RecordDict({UPDATE: ArrayRecord({UPDATE: to_array(total)})})
    content[METRICS] = MetricRecord({EXAMPLES: count})
    return Message(content, reply_to=request(node))


def summed(requests: Sequence[Message], replies: Sequence[Message], bound: float) -> Aggregate:
    facts = PlainSum("fixed").check(Facts(4, l2_bound=bound, grid=2.0**-10))
    steps = PlainSum("fixed").gather(requests, gathering(4, facts=facts, cohort=5.0))
    next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send(iter(replies))
    found: Aggregate = end.value.value
    return found


def test_sums_over_virtual_nodes_are_what_single_replies_give() -> None:
    updates = torch.randint(-100, 100, (5, 4)) * 2.0**-10
    requests = [pool_request(1, 2), pool_request(2, 3)]
    replies = [
        pool_reply(2, updates[2:].sum(0, dtype=torch.float64), 3),
        pool_reply(1, updates[:2].sum(0, dtype=torch.float64), 2),
    ]
    found = summed(requests, replies, 1.0)
    facts = PlainSum("fixed").check(Facts(4, l2_bound=1.0, grid=2.0**-10))
    singly = collected(
        PlainSum("fixed"),
        [reply(node, row) for node, row in zip(NODES, updates, strict=True)],
        NODES,
        gathering(4, facts=facts, cohort=5.0),
    )
    assert torch.equal(found.total, singly.total.double())
    assert (found.replies, found.weight, found.denominator) == (5, 5.0, 5.0)
    assert found.bytes_up == 2 * 4 * 8


@pytest.mark.parametrize(
    ("total", "count", "why"),
    [
        (torch.ones(4, dtype=torch.float64), 2, "another number of nodes than the 3 asked"),
        (torch.full((4,), 9.0, dtype=torch.float64), 3, "longer than its updates can be"),
        (torch.full((4,), float("nan"), dtype=torch.float64), 3, "longer than its updates can be"),
    ],
)
def test_a_sum_over_virtual_nodes_that_cannot_be_is_rejected(
    total: torch.Tensor, count: int, why: str
) -> None:
    found = summed([pool_request(1, 3)], [pool_reply(1, total, count)], 1.0)
    assert found.replies == 0 and why in found.rejected[0].reason
