"""A private mean is what it promises: shape, bound, noise, claim."""

from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent
from flwr.app import RecordDict
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.bundle import Grams
from umbel.strategies.collect import Sum
from umbel.strategies.private.private_mean import (
    END,
    PrivateMean,
    private_histogram,
    private_second_moment,
)
from umbel.strategies.transform import Facts, Round


def _rows(examples: Tensor, public: Any) -> Tensor:  # noqa: ARG001 - the contract
    return examples


def _mean(**changes: Any) -> PrivateMean:
    arguments = {"name": "m", "of": _rows, "shape": (4,), "noise_multiplier": 3.0, **changes}
    return PrivateMean(**arguments)


def _released(question: PrivateMean, vectors: list[Tensor]) -> Tensor:
    """What the server makes of the nodes' vectors."""
    stack = question.stack
    states = stack.init(question.size)
    before = Facts(size=question.size)
    facts = stack.check(before, states)
    config = stack.publish(states, before)
    sent = [stack.encode(v.float(), config, RecordDict())[0] for v in vectors]
    total = torch.stack(sent).double().sum(0)
    count = float(len(vectors))
    rnd = Round(1, count, len(vectors), count, facts, torch.Generator())
    mean, _, _ = stack.decode(Sum(total, count, len(vectors), count), states, rnd, before)
    assert mean is not None
    return next(iter(question.answer(mean, {}).values()))


def test_every_node_is_asked_so_nothing_is_amplified() -> None:
    (claim,) = _mean(noise_multiplier=30.0).claims()
    assert claim.event == GaussianDpEvent(30.0)
    assert (claim.sampled, claim.unit, claim.against) == (False, "client", "model-user")
    assert 0 < claim.extra_delta < 1e-9


def test_a_nodes_vector_is_the_mean_of_its_examples() -> None:
    examples = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert _mean().vector(examples, {}).tolist() == [0.5, 0.5, 0, 0]


def test_one_node_moves_the_answer_by_the_norm_at_most() -> None:
    question = _mean(norm=0.5, insecure_seed=1)
    others = [torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    zero = torch.zeros(4)
    moved = _released(question, [*others, torch.full((4,), 1e30)]) - _released(
        question, [*others, zero]
    )
    assert float(moved.norm()) * 6 <= 0.5 * (1 + 1e-5)


def test_noise_has_the_promised_deviation() -> None:
    question = _mean(shape=(4000,), norm=2.0, noise_multiplier=5.0)
    released = _released(question, [torch.zeros(4000)] * 10)
    # 4,000 draws: a relative error beyond 6 % has probability below 1e-6.
    assert float(released.std()) == pytest.approx(5.0 * 2.0 / 10, rel=0.06)


def test_a_second_moment_is_symmetric_and_its_noise_averaged() -> None:
    def matrices(examples: Tensor, public: Any) -> Tensor:  # noqa: ARG001
        return examples

    question = private_second_moment("s", matrices, 60, 4.0)
    x = torch.randn(7, 60, 3)
    assert isinstance(question.bundle(x, {}), Grams)
    alone = question.vector(x[:1], {}).view(60, 60)
    assert torch.allclose(alone, (x[0] @ x[0].T).double(), atol=1e-5)
    released = _released(question, [torch.zeros(3600)])
    assert torch.equal(released, released.T)
    apart = released[torch.triu(torch.ones(60, 60), 1) > 0]
    # 1,770 draws: a relative error beyond 9 % has probability below 1e-6.
    assert float(apart.std()) == pytest.approx(4.0 / 2**0.5, rel=0.09)


def test_a_histogram_counts_nodes() -> None:
    question = private_histogram("h", _rows, 3, 1e-4)
    votes = [question.vector(torch.tensor([k]), {}) for k in (0, 0, 2, 2, 2)]
    assert _released(question, votes).tolist() == pytest.approx([0.4, 0.0, 0.6], abs=1e-3)


def test_what_is_derived_takes_the_place_of_the_answer() -> None:
    question = _mean(derive=lambda mean, public: {"a": mean + public["b"], "c": -mean})
    answer = question.answer(torch.ones(4), {"b": torch.ones(4)})
    assert answer["a"].tolist() == [2.0] * 4
    assert answer["c"].tolist() == [-1.0] * 4
    assert _mean(derive=lambda mean, _: mean * 2).answer(torch.ones(4), {})["m"].sum() == 8


@pytest.mark.parametrize(("after", "due"), [(0, [0]), (2, [2]), (END, [5]), (9, [])])
def test_it_is_asked_once_its_rounds_are_over(after: int, due: list[int]) -> None:
    question = _mean(after=after)
    assert [n for n in range(6) if question.due(n, 5)] == due


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": ()}, "at least one coordinate"),
        ({"shape": (0,)}, "at least one coordinate"),
        ({"after": -2}, "0 or more rounds"),
        ({"norm": 0.0}, "norm"),
        ({"noise_multiplier": float("nan")}, "noise-multiplier"),
        ({"symmetric": True}, "square"),
    ],
)
def test_a_question_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StackError, match=said):
        _mean(**changes)


def test_another_shape_than_promised_is_refused() -> None:
    with pytest.raises(StackError, match="promises 4 coordinates"):
        _mean().vector(torch.ones(2, 3), {})
