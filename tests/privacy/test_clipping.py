"""Clipping holds its bound in floating point, for any input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umbel.privacy.bounds.clipping import clip, clip_to_grid, is_within, l2_norm
from umbel.privacy.noise.lattice import grid_step, on_grid, round_to_zero

updates = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
).map(lambda values: torch.tensor(values, dtype=torch.float32))
norms = st.floats(1e-6, 1e6)


@given(updates, norms)
@settings(deadline=None)
def test_the_bound_holds(update: Tensor, norm: float) -> None:
    before = update.clone()
    result = clip(update, norm)
    assert l2_norm(result.update) <= norm
    assert torch.equal(update, before)
    assert result.was_clipped == (result.length > norm)


@given(updates, norms)
@settings(deadline=None)
def test_short_updates_are_left_alone_and_long_ones_keep_their_direction(
    update: Tensor, norm: float
) -> None:
    result = clip(update, norm)
    if not result.was_clipped:
        assert result.update is update
    elif result.length < 1e30:
        expected = update.double() * (norm / result.length)
        torch.testing.assert_close(result.update.double(), expected, rtol=1e-4, atol=norm * 1e-6)


@given(updates, norms)
@settings(deadline=None)
def test_rounding_never_raises_the_norm(update: Tensor, norm: float) -> None:
    clipped = clip(update, norm).update
    step = grid_step(norm)
    rounded = round_to_zero(clipped, step)
    assert bool((rounded.abs() <= clipped.abs()).all())
    assert bool(((clipped - rounded).abs() < step).all())
    assert on_grid(rounded, step)
    assert l2_norm(rounded) <= norm


@given(norms)
@settings(deadline=None)
def test_the_grid_is_fine_and_sums_of_32_are_exact(norm: float) -> None:
    step = grid_step(norm)
    assert 2**17 <= norm / step < 2**18
    longest = 2 * norm / step  # with a bit and metrics behind the update, each less than the norm
    assert 32 * longest <= 2**24
    assert math.frexp(step)[0] == 0.5


def test_off_the_grid_is_seen() -> None:
    step = grid_step(1.0)
    assert not on_grid(torch.tensor([0.1]), step)
    assert on_grid(torch.tensor([0.0, -3 * step]), step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_clipped(dtype: torch.dtype) -> None:
    result = clip(torch.full((1000,), 7.0, dtype=dtype), 1.0)
    assert result.update.dtype == dtype
    assert l2_norm(result.update) <= 1.0
    assert l2_norm(result.update) > 0.9


def test_huge_numbers_do_not_overflow() -> None:
    assert l2_norm(torch.full((4,), 1e30)) == pytest.approx(2e30, rel=1e-6)
    assert l2_norm(torch.full((4,), 1e300, dtype=torch.float64)) == pytest.approx(2e300)
    assert l2_norm(clip(torch.full((4,), 1e30), 1.0).update) == pytest.approx(1.0)


def test_zero_stays_zero() -> None:
    result = clip(torch.zeros(3), 1.0)
    assert result.update.tolist() == [0, 0, 0]
    assert not result.was_clipped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clip(torch.tensor([1.0, bad]), 1.0)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="integer buffers"):
        clip(torch.tensor([1, 2]), 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_bad_norms_are_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="norm"):
        clip(torch.ones(2), norm)


def _long(kind: str, size: int = 40_000) -> Tensor:
    source = torch.Generator().manual_seed(5)
    values = torch.randn(size, generator=source)
    match kind:
        case "spread":
            return values
        case "few":
            return values * (torch.rand(size, generator=source) < 1e-3)
        case "unlike":
            return values * torch.exp(8 * torch.randn(size, generator=source))
        case "tiny":
            return values * 1e-25
        case "huge":
            return values * 1e25
    return torch.zeros(size)


@pytest.mark.parametrize("kind", ["spread", "few", "unlike", "tiny", "huge", "zero"])
@pytest.mark.parametrize("part", [0.5, 1 - 2.0**-15, 1.0, 1 + 2.0**-15, 1 + 2.0**-10, 30.0])
def test_long_updates_are_clipped_to_the_grid_in_one_go(kind: str, part: float) -> None:
    """Around the norm a first look in float32 leaves a doubt; then float64 decides."""
    update = _long(kind)
    before, length = update.clone(), l2_norm(update)
    norm = length / part or 1.0
    result = clip_to_grid(update, norm)
    assert torch.equal(update, before)
    assert l2_norm(result.update) <= norm
    assert on_grid(result.update, grid_step(norm))
    assert result.was_clipped == (length > norm) == (result.length > norm)
    assert result.length == pytest.approx(length, rel=1e-4)
    expected = round_to_zero(clip(update, norm).update, grid_step(norm)).double()
    room = norm * 2.0**-12 + grid_step(norm) * math.sqrt(len(update)) * 0.5
    assert float((result.update.double() - expected).norm()) <= room


@pytest.mark.parametrize("kind", ["spread", "few", "unlike", "tiny", "huge", "zero"])
def test_whether_an_update_is_within_a_limit_is_decided_exactly(kind: str) -> None:
    update = _long(kind)
    length = l2_norm(update)
    for limit in (length, math.nextafter(length, math.inf), 2 * length + 1):
        assert is_within(update, limit)
    if length:
        for limit in (math.nextafter(length, 0.0), length * (1 - 2.0**-14), length / 2):
            assert not is_within(update, limit)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_long_updates_that_are_not_finite_are_seen(bad: float) -> None:
    update = _long("spread")
    update[20_000] = bad
    assert not is_within(update, 1e300)
    with pytest.raises(ValueError, match="not finite"):
        clip_to_grid(update, 1.0)
