"""A lying coordinator on somebody's own app: what Umbel refuses, and that a leak would be seen."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umbel.benchmarks.attack import lies
from umbel.benchmarks.attack.verdicts import Verdict
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.federation import Federation
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.stack import Stack
from umbel.strategies.transform import NodeContext, RoundContext, Stateless
from umbel.testing import assert_records_private, assert_withstands_lies


def model() -> nn.Module:
    return nn.Linear(64, 10)


OPEN = Federation(
    trainer=TorchTrainer(model), data=Partitioned("digits", test_fraction=0.2), name="own"
)
RECORDS = replace(OPEN, trainer=PrivateSgd(trainer=TorchTrainer(model)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"secure": True},
            {"other options": "refused", "asked twice": "refused", "beside": "holds"}
            | {"errors": "holds"},
        ),
        (
            {"epsilon": 4.0, "mechanism": "local"},
            {"asked twice": "refused", "beside": "holds", "errors": "holds"}
            | {"exact numbers": "holds"},
        ),
        ({"epsilon": 4.0, "release-metrics": "loss:5"}, {"exact numbers": "holds"}),
        ({}, {}),
    ],
)
def test_no_lie_goes_through(options: dict[str, Any], expected: dict[str, str]) -> None:
    found = assert_withstands_lies(OPEN, options=options)
    assert {one.what.removeprefix("lie: "): one.outcome for one in found} == expected
    for one in found:
        if one.what == "lie: other options":
            assert "the node has other options than this run" in one.words


def test_nothing_travels_beside_hidden_records() -> None:
    found = assert_withstands_lies(RECORDS)
    assert {one.what: one.outcome for one in found} == {
        "lie: beside": "holds",
        "lie: errors": "holds",
    }
    assert_records_private(RECORDS, epsilon=3.0)
    with pytest.raises(AssertionError, match=r"but 2 is allowed"):
        assert_records_private(RECORDS, epsilon=2.0)
    with pytest.raises(AssertionError, match="promises nothing for single records"):
        assert_records_private(OPEN)


# ---- where nothing protects, every scene finds what it looks for


@dataclass(frozen=True)
class Hiss(Stateless):
    """Somebody's own noise on nodes, new whenever it is asked for."""

    name: str = "hiss"

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return update + torch.rand(len(update)) * 1e-3


@dataclass(frozen=True)
class Telling(Gaussian):
    """Releases how long the exact sum is, or noise whose size says so."""

    by_size: bool = False

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        exact = float(total.norm())
        noisy, state = super().decode(total, state, ctx)
        ctx.report("exact", exact)
        return noisy * (1 + exact * self.by_size), state


def stacked(*layers: Any) -> Federation:
    return replace(OPEN, stack=Stack(layers, PlainSum(weighting="fixed")))


def _leaks(found: Verdict, words: str) -> None:
    assert found.outcome == "leaks"
    assert words in found.words
    assert found.bad


def test_a_plain_sum_of_one_is_seen() -> None:
    _leaks(lies.other_options(stacked(Clip(1.0)), {}), "the sum is one's update")


def test_a_second_answer_is_seen() -> None:
    _leaks(lies.asked_twice(stacked(Hiss()), {}), "9 of 9 nodes answered a round twice")
    assert lies.asked_twice(stacked(), {}).outcome == "holds"  # the same answer twice


def test_messages_beside_updates_are_seen() -> None:
    _leaks(lies.beside(OPEN, {}), "evaluate: accuracy")


def test_texts_of_errors_are_seen() -> None:
    _leaks(lies.errors(OPEN, {}), "text of an exception")


def test_exact_numbers_are_seen() -> None:
    federation = stacked(Clip(1.0), Telling(1.0))
    _leaks(lies.exact_numbers(federation, {"sampling": "all"}), "exact had no noise")


def test_noise_whose_size_tells_is_seen() -> None:
    @dataclass(frozen=True)
    class Loud(Telling):
        def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
            noisy, state = super().decode(total, state, ctx)
            del ctx.reports["exact"]
            return noisy, state

    federation = stacked(Clip(1.0), Loud(1.0, by_size=True))
    _leaks(lies.exact_numbers(federation, {"sampling": "all"}), "the noise is")
