"""`check_collect`: the laws of `umbel.strategies.exchange.Exchange`, for one trip."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.core.flower import Envelope
from umbel.core.records import to_array
from umbel.strategies.collect import (
    EXAMPLES,
    METRICS,
    UPDATE,
    Aggregate,
    Exchange,
    RoundSpec,
    Seals,
)
from umbel.strategies.transform import Facts
from umbel.testing.laws import attributes, hold, same

NODES = (11, 12, 13, 14, 15)
COUNTS = (1, 2, 3, 4, 5)
"""Examples of the nodes: close to each other, so that no limit on influence is met."""
CLOSE = 1e-5

Replies = dict[int, Message]


def check_collect(collect: Exchange, size: int = 6) -> None:
    """Fail unless a way to collect replies keeps its laws.

    The order of arrival does not change the bits; equal updates have themselves as their mean; a
    `sum` is one (each update times its own weight, whatever the others are), its weights are
    those that `check` promises; NaN, a wrong shape or type, an error, a missing, a second or an
    unasked reply cost their sender only, who is named; a round without replies gives no update;
    nothing is kept on self.

        check_collect(MyMedian())

    Args:
        collect: the one to try; of one trip. What nodes seal cannot be played here.
        size: coordinates of an update.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    name = collect.name
    hold(
        not isinstance(collect, Seals),
        f"{name}: check_collect plays collects of one trip in the clear",
        "its nodes seal what they send",
        "test it with its own nodes, as tests/strategies/test_secure_sum.py does",
    )
    before = copy.deepcopy(attributes(collect))
    facts = collect.check(Facts(size))
    hold(
        facts.size == size,
        f"{name}: a collect does not change the size of an update",
        f"`check` made {facts.size} of {size}",
        "do that in a layer, which can undo it",
    )
    round_ = RoundSpec(1, size, torch.float32, float(len(NODES)), facts)
    updates = torch.randn(len(NODES), size, generator=torch.Generator().manual_seed(0))
    whole = _order(collect, updates, round_)
    _mean(collect, updates, whole, round_)
    _bad_replies(collect, updates, round_)
    _empty(collect, round_)
    hold(
        same(before, attributes(collect)),
        f"{name}: a collect keeps nothing on self",
        "its attributes changed during rounds",
        "keep what a round needs in the variables of `gather`",
    )


def _order(collect: Exchange, updates: Tensor, round_: RoundSpec) -> Aggregate:
    """The sum of all replies, once it is known to be the same in any order of arrival."""
    whole = _gathered(collect, _replies(updates), round_)
    hold(
        whole.replies == len(NODES) and not whole.rejected and not whole.aborted,
        f"{collect.name}: every good reply is used",
        f"{whole.replies} of {len(NODES)} were used; rejected: {_named(whole)} {whole.aborted}",
        "reject only what cannot be an update",
    )
    for order in itertools.islice(itertools.permutations(range(len(NODES))), 1, None, 17):
        replies = _replies(updates)
        other = _gathered(collect, {NODES[i]: replies[NODES[i]] for i in order}, round_)
        hold(
            same(_numbers(whole), _numbers(other)),
            f"{collect.name}: the order of arrival does not change the bits",
            f"replies in the order {order} gave another result",
            "add up by the place in the cohort (umbel.strategies.ordered_sum.Fold), or sort first",
        )
    return whole


def _mean(collect: Exchange, updates: Tensor, whole: Aggregate, round_: RoundSpec) -> None:
    name, facts = collect.name, round_.facts
    alike = _gathered(collect, _replies(updates[:1].expand_as(updates).clone()), round_)
    far = float((_average(alike) - updates[0]).abs().max())
    hold(
        far < CLOSE,
        f"{name}: the mean of equal updates is that update",
        f"it was off by {far:.3g}",
        "set `denominator` to what turns `total` into an average",
    )
    if facts.kind == "each":
        return
    weights = []
    for i in range(len(NODES)):
        alone = torch.zeros_like(updates)
        alone[i, 0] = 1.0
        weights.append(float(_gathered(collect, _replies(alone), round_).total[0]))
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * updates).sum(0)
    off = float((whole.total - expected).abs().max())
    hold(
        off < CLOSE * sum(map(abs, weights)),
        f"{name}: a sum counts each update times a weight that no other update changes",
        f"with weights {_short(weights)} the total was off by {off:.3g}",
        "let `check` say kind='each' where the result is a choice among updates, else add them up",
    )
    hold(
        math.isclose(sum(weights), whole.weight, rel_tol=CLOSE) and min(weights) > 0,
        f"{name}: `weight` is the sum of the updates' weights, each above 0",
        f"it is {whole.weight:g}, and the updates counted {_short(weights)}",
        "add up the same weights that the updates are multiplied by",
    )
    bound = facts.weight_bound
    hold(
        bound is None or max(weights) <= bound * (1 + CLOSE),
        f"{name}: no update counts for more than the weight_bound of `check`",
        f"one counted {max(weights):g}, and {bound} was promised",
        "say the true bound, or None where there is none",
    )
    few = _gathered(collect, _replies(updates[:3]), round_)
    if facts.public_denominator:
        hold(
            few.denominator == whole.denominator,
            f"{name}: a public denominator does not depend on who came",
            f"it was {whole.denominator:g} for 5 replies and {few.denominator:g} for 3",
            "divide by the expected cohort, or say public_denominator=False in `check`",
        )
    else:
        hold(
            math.isclose(few.denominator, few.weight, rel_tol=CLOSE),
            f"{name}: the weighted mean is the total over the sum of the weights",
            f"the denominator is {few.denominator:g} where the weights sum up to {few.weight:g}",
            "divide by the weights of those who came",
        )


def _bad_replies(collect: Exchange, updates: Tensor, round_: RoundSpec) -> None:
    bad, size = NODES[2], round_.size
    good = {n: m for n, m in _replies(updates).items() if n != bad}
    expected = _numbers(_gathered(collect, good, round_))
    update = updates[2]
    broken: dict[str, Callable[[], Message | None]] = {
        "an update with NaN": lambda: _reply(bad, _with(update, math.nan), 3),
        "an update with infinity": lambda: _reply(bad, _with(update, math.inf), 3),
        "an update that is too long": lambda: _reply(bad, update.repeat(2), 3),
        "an update of shape (1, size)": lambda: _reply(bad, update.view(1, size), 3),
        "an update of whole numbers": lambda: _reply(bad, update.to(torch.int64), 3),
        "a reply without update": lambda: _reply(bad, None, 3),
        "an error": lambda: Message(Error(1, "out of memory"), reply_to=_request(bad)),
        "no reply": lambda: None,
    }
    for what, make in broken.items():
        message = make()
        replies = dict(_replies(updates))
        replies.pop(bad)
        if message is not None:
            replies = {bad: message, **replies}
        law = f"{collect.name}: {what} costs its sender only"
        try:
            found = _gathered(collect, replies, round_)
        except Exception as error:
            raise AssertionError(
                f"{law}, but the round broke off with {type(error).__name__}: {error}; catch what "
                "is wrong with a single reply, and reject it"
            ) from error
        _only(law, bad, found, expected, "check shape, type and finiteness of each reply")
    _unasked(collect, updates, round_)


def _unasked(collect: Exchange, updates: Tensor, round_: RoundSpec) -> None:
    """A stranger's reply and a second one of a node count for nothing."""
    replies = _replies(updates)
    expected = _numbers(_gathered(collect, _replies(updates), round_))
    for what, more, who in (
        ("a reply of a node that was not asked", _reply(99, updates[0] + 1, 3), 99),
        ("a second reply", _reply(NODES[0], updates[0] + 1, 3), NODES[0]),
    ):
        found = _played(collect, [*replies.values(), more], round_)
        law = f"{collect.name}: {what} counts for nothing and is named"
        _only(law, who, found, expected, "take each node of the request off a list, once")


def _only(law: str, who: int, found: Aggregate, expected: Mapping[str, Any], cure: str) -> None:
    hold(
        same(_numbers(found), expected),
        law,
        "the result is not the one without it",
        cure,
    )
    hold(
        _named(found) == [who],
        law,
        f"`rejected` names {_named(found)} in place of [{who}]",
        "add a Rejected with the node and the reason for it",
    )


def _empty(collect: Exchange, round_: RoundSpec) -> None:
    law = f"{collect.name}: a round without replies gives no update"
    cure = "return zeros with replies=0 and weight=0"
    try:
        none = _gathered(collect, {}, round_)
    except Exception as error:
        raise AssertionError(
            f"{law}, but it was {type(error).__name__}: {error}; {cure}"
        ) from error
    nothing = none.total.shape == (round_.size,) and not bool(none.total.any())
    hold(
        nothing and none.replies == 0 and none.weight == 0,
        law,
        f"it had the weight {none.weight:g}, {none.replies} replies, and "
        f"{'no total' if nothing else 'a total that is not zeros of the shape (size,)'}",
        cure,
    )
    hold(
        none.denominator == (round_.cohort if round_.facts.public_denominator else 0),
        law,
        f"the denominator is {none.denominator:g}",
        "set it to 0, or to the expected cohort where `check` says that it is public",
    )
    hold(
        sorted(_named(none)) == sorted(NODES),
        f"{collect.name}: nodes that said nothing are named",
        f"`rejected` names {_named(none)}",
        "add a Rejected for every node that is still expected when the replies end",
    )


def _gathered(collect: Exchange, replies: Replies, round_: RoundSpec) -> Aggregate:
    return _played(collect, list(replies.values()), round_)


def _played(collect: Exchange, replies: Sequence[Message], round_: RoundSpec) -> Aggregate:
    """Drive one trip with these replies, in this order."""
    steps = collect.gather([_request(node) for node in NODES], round_)
    next(steps)
    try:
        steps.send(iter(replies))
    except StopIteration as end:
        hold(
            isinstance(end.value, Aggregate),
            f"{collect.name}: `gather` returns an Aggregate",
            f"it returned {type(end.value).__name__}",
            "return umbel.Aggregate",
        )
        result: Aggregate = end.value
        return result
    raise AssertionError(
        f"{collect.name}: check_collect plays collects of one trip, but it made a second; test it "
        "with nodes of its own"
    )


def _request(node: int) -> Message:
    return Envelope(1, f"m{node}", node, "1", 0.0, 3600.0, "train").message(RecordDict())


def _reply(node: int, update: Tensor | None, examples: int) -> Message:
    content = RecordDict()
    if update is not None:
        content[UPDATE] = ArrayRecord({UPDATE: to_array(update)})
    content[METRICS] = MetricRecord({EXAMPLES: examples, "loss": examples / 10})
    return Message(content, reply_to=_request(node))


def _replies(updates: Tensor) -> Replies:
    """By node; those beyond the given updates are missing."""
    rows = zip(NODES, updates, COUNTS, strict=False)
    return {node: _reply(node, update.clone(), count) for node, update, count in rows}


def _with(update: Tensor, value: float) -> Tensor:
    changed = update.clone()
    changed[-1] = value
    return changed


def _numbers(found: Aggregate) -> dict[str, Any]:
    return {
        "total": found.total,
        "weight": found.weight,
        "replies": found.replies,
        "denominator": found.denominator,
        "metrics": dict(found.metrics),
    }


def _average(found: Aggregate) -> Tensor:
    return found.total / found.denominator


def _named(found: Aggregate) -> list[int]:
    return [one.node_id for one in found.rejected]


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
