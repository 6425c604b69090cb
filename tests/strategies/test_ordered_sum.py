"""A sum whose bits do not depend on arrival, in memory that does not depend on the cohort."""

import math
import random
import tracemalloc
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fakes import collected, gathering, reply
from umbel.privacy.noise.lattice import on_grid
from umbel.strategies.collect import PlainSum
from umbel.strategies.ordered_sum import BLOCK, OrderedSum, exact_block
from umbel.strategies.private.clip import Clip
from umbel.strategies.transform import Facts

SIZE = 37


def term(position: int, dtype: torch.dtype = torch.float32, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(position)
    scale = 10.0 ** (position % 7 - 3)  # of unlike size, so that the order matters
    return torch.randn(size, generator=generator, dtype=dtype) * scale


def folded(
    order: Sequence[int],
    weights: Mapping[int, float],
    dtype: torch.dtype = torch.float32,
    hold_bytes: int = 64 << 20,
) -> Tensor:
    fold = OrderedSum(SIZE, dtype, hold_bytes)
    for position in order:
        if position in weights:
            fold.offer(position, term(position, dtype), weights[position])
        else:
            fold.skip(position)
    return fold.finish()


@given(
    count=st.integers(1, 3 * BLOCK),
    seed=st.integers(0, 10**6),
    holes=st.sets(st.integers(0, 3 * BLOCK), max_size=20),
    lost=st.sets(st.integers(0, 3 * BLOCK), max_size=5),
    hold_bytes=st.sampled_from([0, SIZE * 4, 5 * SIZE * 4, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_order_gives_the_same_bits(
    count: int,
    seed: int,
    holes: set[int],
    lost: set[int],
    hold_bytes: int,
    dtype: torch.dtype,
) -> None:
    """Holes were skipped by name; lost terms were neither offered nor skipped."""
    weights = {i: 1.0 + i % 5 for i in range(count) if i not in holes | lost}
    said = [i for i in range(count) if i not in lost]
    shuffled = said[:]
    random.Random(seed).shuffle(shuffled)
    straight = folded(said, weights, dtype)
    assert torch.equal(folded(shuffled, weights, dtype, hold_bytes), straight)
    assert torch.equal(folded(said[::-1], weights, dtype, hold_bytes), straight)
    # and the bits do not depend on whether a missing term was announced
    assert torch.equal(folded([i for i in said if i in weights], weights, dtype), straight)


def test_the_sum_is_right() -> None:
    weights = {i: float(1 + i % 9) for i in range(200)}
    exact = sum(w * term(i).numpy().astype(np.float64) for i, w in weights.items())
    scale = sum(w * term(i).abs().numpy().astype(np.float64) for i, w in weights.items())
    error = np.abs(folded(range(200), weights).double().numpy() - exact)
    assert (error <= scale * BLOCK * 2.0**-24).all()


def test_a_long_sum_does_not_drift() -> None:
    """4,096 equal terms: single precision alone would lose the last digits."""
    fold = OrderedSum(1, torch.float32)
    for position in range(4096):
        fold.offer(position, torch.tensor([0.1]), 1.0)
    assert float(fold.finish()) == pytest.approx(4096 * float(np.float32(0.1)), rel=1e-6)


def test_nothing_is_zero() -> None:
    fold = OrderedSum(3, torch.float32)
    fold.skip(0)
    assert fold.finish().tolist() == [0.0, 0.0, 0.0]


def test_terms_are_not_changed() -> None:
    fold, vector = OrderedSum(4, torch.float32, 0), torch.arange(4.0)
    for position in (2, 0, 1):
        fold.offer(position, vector, 3.0)
    fold.finish()
    assert vector.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("hold_bytes", [0, 1 << 20])
def test_a_term_of_another_precision_is_the_same_when_it_comes_early(hold_bytes: int) -> None:
    """Buffers are added up in double precision, and travel in single."""
    sums = []
    for order in ([0, 1, 2], [2, 1, 0]):
        fold = OrderedSum(SIZE, torch.float64, hold_bytes)
        for position in order:
            fold.offer(position, term(position), 2.0)
        sums.append(fold.finish())
    assert torch.equal(*sums)


@pytest.mark.parametrize("order", ["as sent", "reversed"])
def test_memory_does_not_grow_with_the_number_of_replies(order: str) -> None:
    size, hold = 100_000, 1 << 20
    data = np.ones(size, np.float32).tobytes()

    def peak(count: int) -> int:
        """Bytes that Python and numpy held at most; each term comes in memory of its own."""
        tracemalloc.start()
        fold = OrderedSum(size, torch.float32, hold)
        positions = range(count) if order == "as sent" else range(count - 1, -1, -1)
        for position in positions:
            fold.offer(position, torch.from_numpy(np.frombuffer(bytearray(data), np.float32)), 1.0)
        assert float(fold.finish()[0]) == count
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(120) < peak(20) + len(data)


@pytest.mark.parametrize("norm", [1.0, 1.9, 0.7])
@pytest.mark.parametrize("count", [BLOCK, 3000])
def test_sums_of_equal_terms_on_a_grid_are_exact(norm: float, count: int) -> None:
    """All of them along one coordinate, as long as the norm allows: 128 at a time would round."""
    facts = Clip(norm).check(Facts(size=2), None)
    step = facts.grid or 0
    largest = math.floor(norm / step) * step
    terms = [torch.tensor([largest - (i % 7) * step, -step]) for i in range(count)]
    nodes = range(1, count + 1)
    replies = [reply(node, one) for node, one in zip(nodes, terms, strict=True)]
    round_ = gathering(2, facts=PlainSum("fixed").check(facts))
    found = collected(PlainSum("fixed"), replies, nodes, round_)
    exact = [math.fsum(float(one[k]) for one in terms) for k in (0, 1)]
    assert found.total.double().tolist() == exact
    assert on_grid(found.total.double(), step)


def test_how_many_terms_are_added_in_single_precision() -> None:
    assert exact_block(1.0, 2.0**-17) == BLOCK
    assert exact_block(1.9, 2.0**-17) == 67
    assert exact_block(1.0, 2.0**-25) == 0
    assert exact_block(None, None) == BLOCK
