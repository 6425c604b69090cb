"""Sums of many clipped updates: as if added one by one, exact in any order, bounded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umbel.privacy.bounds.bundle import UNIT_STEP, Bundle, Grams, OuterProducts, UnitRows, Vectors
from umbel.privacy.bounds.clipping import clip, l2_norm
from umbel.privacy.noise.lattice import grid_step, on_grid

KINDS = ["vectors", "outer", "grams"]


def _bundle(kind: str, seed: int, count: int, scale: float) -> Bundle:
    source = torch.Generator().manual_seed(seed)
    if kind == "vectors":
        return Vectors(torch.randn(count, 30, generator=source) * scale)
    if kind == "grams":
        return Grams(torch.randn(count, 5, 7, generator=source) * math.sqrt(scale))
    right = UnitRows.of(torch.randn(count, 12, generator=source))
    return OuterProducts(torch.randn(count, 4, generator=source) * scale, right)


def _row(bundle: Bundle, i: int) -> Bundle:
    match bundle:
        case OuterProducts():
            right = UnitRows(bundle.right.whole[i : i + 1], bundle.right.peak)
            return OuterProducts(bundle.left[i : i + 1], right, bundle.unit)
        case Vectors():
            return Vectors(bundle.values[i : i + 1], bundle.unit)
        case Grams():
            return Grams(bundle.values[i : i + 1], bundle.on_grid)
    raise TypeError(type(bundle))


def _dense(bundle: Bundle, i: int) -> Tensor:
    return _row(bundle, i).total()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    norm=st.floats(1e-4, 100),
)
def test_each_update_is_bounded_and_the_sum_exact(
    kind: str, seed: int, count: int, scale: float, norm: float
) -> None:
    clipped = _bundle(kind, seed, count, scale).clipped(norm)
    one_by_one = [_dense(clipped, i) for i in range(count)]
    assert all(l2_norm(update) <= norm for update in one_by_one)
    forward, backward = torch.zeros_like(one_by_one[0]), torch.zeros_like(one_by_one[0])
    for update in one_by_one:
        forward += update
    for update in reversed(one_by_one):
        backward += update
    assert torch.equal(clipped.total(), forward)
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_clipping_is_that_of_a_single_update(kind: str, seed: int, scale: float) -> None:
    norm = 1.0
    bundle = _bundle(kind, seed, 8, scale)
    clipped = bundle.clipped(norm)
    for i in range(8):
        alone = clip(_dense(bundle, i), norm).update
        # A Gram matrix is bounded by the squared length of what it is made of, not by its own.
        if isinstance(bundle, Grams) and l2_norm(bundle.values[i]) ** 2 > norm:
            continue
        assert torch.allclose(_dense(clipped, i), alone, atol=0.004 if kind == "outer" else 1e-3)


def test_vectors_lie_on_the_grid_that_the_server_checks() -> None:
    clipped = _bundle("vectors", 1, 9, 2.0).clipped(0.3)
    assert on_grid(clipped.total(), grid_step(0.3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_broken_update_counts_as_no_more_than_one(bad: float) -> None:
    good = torch.randn(5, 30)
    broken = torch.cat([good, torch.full((1, 30), bad)])
    moved = Vectors(broken).clipped(1.0).total() - Vectors(good).clipped(1.0).total()
    assert l2_norm(moved) <= 1.0
    right = UnitRows.of(torch.randn(6, 12))
    left = torch.cat([torch.randn(5, 4), torch.full((1, 4), bad)])
    with_it = OuterProducts(left, right).clipped(1.0).total()
    without = OuterProducts(left[:5], UnitRows(right.whole[:5], right.peak)).clipped(1.0).total()
    assert l2_norm(with_it - without) <= 1.0


def test_large_rows_add_up_without_rounding() -> None:
    rows = torch.zeros(1000, 3)
    rows[:, 0], rows[:, 1] = 1.9999, 1e-4  # as near the next power of two as it can be
    clipped = Vectors(rows).clipped(1.9999)
    assert torch.equal(clipped.total(), _dense(clipped, 0) * 1000)
    assert torch.equal(Vectors(rows.double()).clipped(1.9999).total()[2:], torch.zeros(1).double())


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1.0, 1e12, 1e18])
def test_long_rows_are_no_longer_than_the_norm_and_nearly_as_long(scale: float) -> None:
    rows = torch.randn(3, 26_010, generator=torch.Generator().manual_seed(1)) * scale
    norm = scale * 3
    clipped = Vectors(rows).clipped(norm)
    for i in range(3):
        length = l2_norm(_dense(clipped, i))
        assert 0.99 * norm < length <= norm


def test_a_large_sum_of_outer_products_does_not_round() -> None:
    right = UnitRows.of(torch.ones(3000, 2))  # every coordinate as large as it can be
    clipped = OuterProducts(torch.full((3000, 3), 1.0), right).clipped(1.0)
    single = _dense(clipped, 0)
    assert torch.equal(clipped.total(), single * 3000)


def test_unit_rows_are_no_longer_than_one() -> None:
    rows = UnitRows.of(torch.randn(50, 4000) * torch.logspace(-20, 20, 50)[:, None])
    assert float((rows.whole.double() * UNIT_STEP).norm(dim=1).max()) <= 1.0
    assert float((rows.whole.double() * UNIT_STEP).norm(dim=1).min()) > 0.95


def test_nothing_sums_to_zero() -> None:
    empty = UnitRows.of(torch.zeros(0, 5))
    assert OuterProducts(torch.zeros(0, 2), empty).clipped(1.0).total().tolist() == [0.0] * 10
