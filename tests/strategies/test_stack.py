"""Layers in list order on the node, in reverse on the server, over one collect."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation
from flwr.app import RecordDict

from tests.fakes import PlusOne, Times, collected, gathering, reply
from umbel.core.errors import StackError
from umbel.strategies.collect import PlainSum
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts, NodeContext, Round, Stateless

NODES = (1001, 1002, 1003)
UPDATES = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]), torch.tensor([3.0, 3.0])]
BOTH = [Stack([PlusOne(), Times()]), Stack([Times(), PlusOne()])]


def one_round(stack: Stack, states: Any, number: int = 1, collect: Any = None) -> Any:
    """All of a round but the wire."""
    facts = stack.check(Facts(2), states)
    config = stack.publish(states, Facts(2))
    replies = []
    for node, update in zip(NODES, UPDATES, strict=True):
        sent, metrics = stack.encode(update, config, RecordDict(), {"num-examples": 2, "loss": 1.0})
        assert metrics.pop("num-examples") == 2
        replies.append(reply(node, sent, 2, metrics=metrics))
    total = collected(collect or stack.collect, replies, NODES, gathering(2))
    rnd = Round(number, 3.0, total.replies, total.weight, facts, torch.Generator())
    return stack.decode(total, states, rnd)


@pytest.mark.parametrize("stack", BOTH, ids=str)
def test_decode_undoes_encode_in_reverse(stack: Stack) -> None:
    """PlusOne and Times do not commute: any other order would leave a remainder."""
    average, states, metrics = one_round(stack, stack.init(2))
    torch.testing.assert_close(average, torch.stack(UPDATES).mean(0))
    assert metrics["plus-one.replies"] == 3.0
    assert metrics["loss"] == 1.0
    assert [state["rounds"] for state in states if state] == [1]


def test_encode_goes_in_list_order() -> None:
    config = BOTH[0].publish(BOTH[0].init(2), Facts(2))
    assert BOTH[0].encode(torch.ones(2), config, RecordDict())[0].tolist() == [6.0, 6.0]
    assert BOTH[1].encode(torch.ones(2), config, RecordDict())[0].tolist() == [4.0, 4.0]


def test_an_empty_stack_is_the_mean() -> None:
    average, _, _ = one_round(Stack(), ())
    torch.testing.assert_close(average, torch.stack(UPDATES).mean(0))


def test_state_is_passed_and_never_kept() -> None:
    stack = BOTH[0]
    first = stack.init(2)
    _, second, _ = one_round(stack, first)
    _, third, metrics = one_round(stack, second, 2)
    assert [states[0]["rounds"] for states in (first, second, third)] == [0, 1, 2]
    assert first[0]["seen"].tolist() == [0.0, 0.0]
    assert stack.publish(third, Facts(2)) == {"plus-one.rounds": 2}
    assert metrics["plus-one.rounds"] == 1.0, "the node saw what the server published"
    assert one_round(stack, first)[1][0]["rounds"] == 1, "the same state gives the same round"


def test_nothing_arrived_is_no_average_but_layers_still_see_the_round() -> None:
    stack = BOTH[0]
    states = stack.init(2)
    total = collected(stack.collect, [], NODES, gathering(2))
    rnd = Round(1, 3.0, 0, 0.0, stack.check(Facts(2), states), torch.Generator())
    average, after, _ = stack.decode(total, states, rnd)
    assert average is None
    assert after[0]["rounds"] == 1


def test_a_fixed_denominator_is_used() -> None:
    stack = Stack(collect=PlainSum("fixed"))
    average, _, _ = one_round(stack, (), collect=stack.collect)
    torch.testing.assert_close(average, torch.stack(UPDATES).sum(0) / 1.0)


@dataclass(frozen=True)
class Bounded(Stateless):
    """Knows a bound; claims on the facts it is shown."""

    name: str = "bounded"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        return facts.replace(l2_bound=1.0)

    def claim(self, facts: Facts) -> Claim:
        assert facts.l2_bound is not None
        event = GaussianDpEvent(1.0 / facts.l2_bound)
        return Claim(event, "client", NeighboringRelation.ADD_OR_REMOVE_ONE, "model-user")


def test_claims_are_made_on_the_facts_at_the_bottom() -> None:
    stack = Stack([Bounded(), Times(4.0)])
    facts = stack.check(Facts(2), stack.init(2))
    (claim,) = stack.claims(facts)
    assert claim.event == GaussianDpEvent(0.25)


@dataclass(frozen=True)
class NeedsBound(Stateless):
    """Refuses what no one has bounded."""

    name: str = "needs-bound"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        if facts.l2_bound is None:
            raise StackError("needs-bound needs a bounded update; put Bounded before it")
        return facts


def test_a_wrong_order_is_refused_with_the_cure() -> None:
    right, wrong = Stack([Bounded(), NeedsBound()]), Stack([NeedsBound(), Bounded()])
    assert right.check(Facts(2), right.init(2)).l2_bound == 1.0
    with pytest.raises(StackError, match="put Bounded before it"):
        wrong.check(Facts(2), wrong.init(2))


def test_two_layers_of_one_name_are_refused() -> None:
    with pytest.raises(StackError, match="two layers are called 'times'"):
        Stack([Times(), PlusOne(), Times()])
    assert str(Stack([Times(name="a"), Times(name="b")])) == "a -> b -> plain-sum"


@dataclass(frozen=True)
class Witness(Stateless):
    """Takes what a node measured into the update, and claims to hide it."""

    name: str = "witness"

    needs: ClassVar[frozenset[str]] = frozenset({"metrics"})

    def encode(self, update: torch.Tensor, ctx: NodeContext) -> torch.Tensor:
        return torch.cat([update, torch.tensor([ctx.metrics["loss"]])])

    def claim(self, facts: Facts) -> Claim:  # noqa: ARG002
        event = GaussianDpEvent(1.0)
        return Claim(event, "client", NeighboringRelation.ADD_OR_REMOVE_ONE, "model-user")


def test_under_a_private_stack_metrics_leave_a_node_in_the_update_only() -> None:
    stack = Stack([Witness(), Times()])
    sent, beside = stack.encode(torch.ones(2), {}, RecordDict(), {"loss": 0.5})
    assert (sent.tolist(), beside) == ([3.0, 3.0, 1.5], {})
