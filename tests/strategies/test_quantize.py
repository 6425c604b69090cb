"""Quantize and Rotate: on the grid, within the widened bound, unbiased, and back again."""

import math

import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import clip, l2_norm
from umbel.privacy.noise.lattice import on_grid
from umbel.strategies.collect import Sum
from umbel.strategies.secure.quantize import Quantize, step_for, widened
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, NodeContext, Round

NORMS = st.sampled_from([1e-3, 0.1, 1.0, 7.3, 1e3])


@given(st.integers(1, 500), NORMS, st.integers(1, 4096), st.sampled_from(["nearest", "stochastic"]))
@settings(deadline=None, max_examples=80)
def test_whole_steps_within_the_bound_that_is_planned_on(
    size: int, norm: float, levels: int, rounding: str
) -> None:
    layer = Quantize(levels, rounding)  # type: ignore[arg-type]
    facts = layer.check(Facts(size=size, l2_bound=norm), None)
    assert facts.grid is not None and facts.l2_bound is not None
    update = clip(torch.randn(size, dtype=torch.float64) * norm, norm).update
    out = layer.encode(update, NodeContext({"bound": norm}))
    assert on_grid(out, facts.grid)
    assert l2_norm(out) <= facts.l2_bound * (1 + 1e-12)
    assert float((out - update).abs().max()) <= facts.grid * (0.5 if rounding == "nearest" else 1)
    assert math.frexp(facts.grid)[0] == 0.5
    assert norm / math.sqrt(size) / levels / 2 < facts.grid <= norm / math.sqrt(size) / levels


def test_stochastic_rounding_has_no_bias() -> None:
    """The mean of 4,000 roundings; six standard errors of a fair coin are 1e-9."""
    layer = Quantize(1, "stochastic")
    update = torch.full((50,), 0.3 / math.sqrt(50), dtype=torch.float64)
    step = step_for(1.0, 50, 1)
    total = sum(layer.encode(update, NodeContext({"bound": 1.0})) for _ in range(4000))
    error = float((total / 4000 - update).mean().abs())
    assert error < 6 * step * 0.5 / math.sqrt(4000 * 50) + 0.02 * step


def test_the_conditional_bound_is_hardly_longer_than_the_norm() -> None:
    step = step_for(1.0, 1 << 20, 64)
    assert 1 < widened(1.0, 1 << 20, step, "stochastic") < 1.0001
    assert widened(1.0, 1 << 20, step, "nearest") < 1.01


@pytest.mark.parametrize("size", [1, 5, 100, 1000])
def test_a_rotation_never_lengthens_and_comes_back(size: int) -> None:
    layer = Rotate()
    update = clip(torch.randn(size), 1.0).update
    rotated = layer.encode(update, NodeContext({"round": 4}))
    assert l2_norm(rotated) <= l2_norm(update)
    rnd = Round(4, 1.0, 1, 1.0, Facts(len(rotated)), torch.Generator(), Facts(size))
    back, _ = layer.decode(rotated, None, rnd)
    assert torch.allclose(back, update, atol=1e-5)


def test_a_rotation_tells_how_far_coordinates_spread() -> None:
    facts = Rotate().check(Facts(size=1000, l2_bound=2.0), None)
    assert facts.size == 1024 and facts.spread == pytest.approx(2 / 32)


def test_orders_that_cannot_be() -> None:
    for layers, cure in (
        ((Quantize(),), "put Clip before it"),
        ((Rotate(),), "put Clip before it"),
    ):
        with pytest.raises(StackError, match=cure):
            Stack(layers).check(Facts(size=4), (None,))
    with pytest.raises(StackError, match="noise away"):
        Quantize().check(Facts(size=4, l2_bound=1.0, noise=1.0), None)
    for bad in ({"levels": 0}, {"rounding": "up"}):
        with pytest.raises(StackError):
            Quantize(**bad)  # type: ignore[arg-type]


def test_the_zero_update_stays_zero() -> None:
    stack = Stack((Rotate(), Quantize(8, "stochastic")))
    config = {"rotate.round": 1, "rotate.bound": 1.0, "quantize.bound": 1.0}
    out, _ = stack.encode(torch.zeros(9), config, RecordDict())
    assert not bool(out.any())
    assert Sum(out, 1.0, 1, 1.0).replies == 1
