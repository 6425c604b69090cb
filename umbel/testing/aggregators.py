"""`check_aggregator`: the laws of `umbel.Aggregator`."""

import copy
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umbel.strategies.aggregator import Aggregate, Aggregator, Contribution, RoundSpec
from umbel.strategies.exchange import PlainExchange
from umbel.strategies.transform import Facts
from umbel.testing.laws import attributes, hold, same

COUNT = 11
"""Contributions of the round that is tried: enough for rules that drop some of them."""
FIRST = 21
"""The first node's id; the others follow."""
CLOSE = 1e-5


def check_aggregator(rule: Aggregator[Any], size: int = 6, count: int = COUNT) -> None:
    """Fail unless a rule keeps the laws of an aggregator.

    Neither the order of arrival nor the grouping changes a bit; contributions are not changed;
    equal updates have themselves as their mean; no coordinate of the mean is beyond the largest
    that came; where `kind` is 'sum', a sum over several nodes counts as they would one by one;
    nothing makes no update; nothing is kept on self.

        check_aggregator(MyMedian())

    Args:
        rule: the one to try.
        size: coordinates of an update.
        count: contributions; more where the rule needs a larger cohort.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    name = rule.name
    hold(
        rule.kind in ("sum", "each"),
        f"{name}: `kind` is 'sum' or 'each'",
        f"it is {rule.kind!r}",
        "say 'each' where the rule must see every update",
    )
    before = copy.deepcopy(attributes(rule))
    facts = PlainExchange(rule).check(Facts(size, expected_replies=count, max_replies=count))
    hold(
        facts.size == size and facts.kind in ("sum", "each"),
        f"{name}: `check` keeps the size of an update and says what kind the result is",
        f"it made {facts.size} of {size} coordinates and says kind={facts.kind!r}",
        "return facts.replace(kind=...) of what it is given",
    )
    spec = RoundSpec(1, size, torch.float32, float(count), facts)
    parts = _parts(size, count)
    kept = copy.deepcopy(parts)
    whole = _of(rule, spec, parts)
    hold(
        whole.replies == count and whole.total.shape == (size,),
        f"{name}: the aggregate counts every contribution and has a total of the shape (size,)",
        f"it counts {whole.replies} of {count}, and the total has {tuple(whole.total.shape)}",
        "set `replies` to the sum of the counts, whatever their influence",
    )
    hold(
        same(parts, kept),
        f"{name}: contributions are not changed",
        "tensors that were added have other values now",
        "copy before you write into a vector",
    )
    _order(rule, spec, parts, whole)
    _groups(rule, spec, parts, whole)
    _bounds(rule, spec, parts, whole)
    if rule.kind == "sum":
        _partial(rule, spec, parts)
    nothing = _of(rule, spec, [])
    hold(
        nothing.total.shape == (size,) and not bool(nothing.total.any()) and not nothing.replies,
        f"{name}: of nothing comes no update",
        f"it counts {nothing.replies} replies and has the total {nothing.total.tolist()}",
        "return umbel.Aggregate.nothing(size) where nothing was added",
    )
    hold(
        same(before, attributes(rule)),
        f"{name}: a rule keeps nothing on self",
        "its attributes changed during a round",
        "keep what a round needs in the accumulator",
    )


def _order(
    rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution], whole: Aggregate
) -> None:
    shuffle = random.Random(0)
    for _ in range(5):
        order = shuffle.sample(range(len(parts)), len(parts))
        found = _of(rule, spec, [parts[i] for i in order])
        hold(
            same(_numbers(whole), _numbers(found)),
            f"{rule.name}: the order of arrival does not change the bits",
            f"contributions in the order {order} gave another result",
            "sort by `position` before you calculate",
        )


def _groups(
    rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution], whole: Aggregate
) -> None:
    cuts = sorted({0, len(parts) // 3, 2 * len(parts) // 3, len(parts)})
    pieces = [parts[a:b] for a, b in itertools.pairwise(cuts)]

    def accumulated() -> list[Any]:
        return [_added(rule, spec, piece) for piece in [*pieces, ()]]

    left = accumulated()
    for other in left[1:]:
        rule.merge(left[0], other)
    right = accumulated()
    for i in reversed(range(len(right) - 1)):
        rule.merge(right[i], right[i + 1])
    late = accumulated()
    for other in late[:-1]:
        rule.merge(late[-1], other)
    for how, acc in (("from the left", left[0]), ("from the right", right[0]), ("", late[-1])):
        found = rule.result(acc)
        hold(
            same(_numbers(whole), _numbers(found)),
            f"{rule.name}: `merge` is associative, and an empty accumulator changes nothing",
            f"parts of a round, merged {how or 'into an empty one'}, gave another result",
            "let `merge` take over what the other has by position, and calculate in `result`",
        )


def _bounds(
    rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution], whole: Aggregate
) -> None:
    first = parts[0].vector
    alike = _mean(_of(rule, spec, [replace(part, vector=first) for part in parts]))
    off = float((alike - first).abs().max())
    hold(
        off < CLOSE,
        f"{rule.name}: the mean of equal updates is that update",
        f"it was off by {off:.3g}",
        "set `total` to the result times `denominator`",
    )
    largest = torch.stack([part.vector for part in parts]).abs().amax(0)
    beyond = float((_mean(whole).abs() - largest).max())
    hold(
        beyond < CLOSE and math.isfinite(beyond),
        f"{rule.name}: no coordinate of the mean is beyond the largest that came",
        f"one was, by {beyond:.3g}",
        "weigh updates by what adds up to one",
    )


def _partial(rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution]) -> None:
    ones = [replace(part, weight=1.0) for part in parts]
    both = Contribution(
        ones[0].vector + ones[1].vector, 2.0, 2, node=FIRST, position=0, summed=True
    )
    singly, together = _of(rule, spec, ones), _of(rule, spec, [both, *ones[2:]])
    off = float((_mean(singly) - _mean(together)).abs().max())
    hold(
        off < CLOSE and singly.replies == together.replies,
        f"{rule.name}: a sum over several nodes counts as they would one by one",
        f"the mean was off by {off:.3g}, of {together.replies} in place of {singly.replies}",
        "add `part.vector` times `part.scale`, `part.weight` and `part.count`; or say kind='each'",
    )


def _parts(size: int, count: int) -> list[Contribution]:
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    return [
        Contribution(row.clone(), 1.0 + i, 1, {"loss": i / 10}, node=FIRST + i, position=i)
        for i, row in enumerate(rows)
    ]


def _added(rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution]) -> Any:
    acc = rule.empty(spec)
    for part in parts:
        rule.add(acc, part)
    return acc


def _of(rule: Aggregator[Any], spec: RoundSpec, parts: Sequence[Contribution]) -> Aggregate:
    return rule.result(_added(rule, spec, parts))


def _mean(found: Aggregate) -> Tensor:
    return found.total / found.denominator


def _numbers(found: Aggregate) -> dict[str, Any]:
    return {
        "total": found.total,
        "weight": found.weight,
        "replies": found.replies,
        "denominator": found.denominator,
        "metrics": dict(found.metrics),
        "judged": [(one.node_id, one.influence) for one in found.judged],
    }
