"""The graph: regular, symmetric, hard to cut, and of the degree that the bound asks for."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import graph


@given(st.integers(3, 60), st.integers(1, 12), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_every_node_has_as_many_neighbours_and_they_know_each_other(
    nodes: int, half: int, seed: bytes
) -> None:
    around = graph.ring(seed, nodes, 2 * half)
    for i, neighbours in enumerate(around):
        assert len(neighbours) == min(2 * half, nodes - 1)
        assert i not in neighbours and len(set(neighbours)) == len(neighbours)
        assert all(i in around[j] for j in neighbours)
    assert graph.ring(seed, nodes, 2 * half) == around


def connected(around: list[tuple[int, ...]], kept: set[int]) -> bool:
    reached, border = set(), [min(kept)]
    while border:
        i = border.pop()
        if i not in reached:
            reached.add(i)
            border += [j for j in around[i] if j in kept]
    return reached == kept


@pytest.mark.parametrize(("nodes", "k"), [(7, 4), (9, 4), (10, 2)])
def test_no_k_minus_one_nodes_cut_it_but_some_k_do(nodes: int, k: int) -> None:
    around = graph.ring(b"s" * 32, nodes, k)
    everyone = set(range(nodes))
    for gone in itertools.combinations(range(nodes), k - 1):
        assert connected(around, everyone - set(gone))
    assert any(
        not connected(around, everyone - set(gone))
        for gone in itertools.combinations(range(nodes), k)
    )


def test_another_session_has_another_ring() -> None:
    assert graph.ring(b"a" * 32, 200, 20) != graph.ring(b"b" * 32, 200, 20)
    assert sorted(graph.permutation(b"a" * 32, 500)) == list(range(500))


def tail(population: int, marked: int, draws: int, least: int) -> float:
    """log2 P[X >= least] by summing in floating point, the slow and obvious way."""
    terms = [
        math.exp(
            _log_comb(marked, x)
            + _log_comb(population - marked, draws - x)
            - _log_comb(population, draws)
        )
        for x in range(least, min(marked, draws) + 1)
    ]
    return math.log2(math.fsum(terms)) if terms else -math.inf


def _log_comb(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@pytest.mark.parametrize("nodes", [150, 200, 500, 1000, 5000, 10_000])
def test_the_degree_keeps_the_bound_and_is_the_smallest_that_does(nodes: int) -> None:
    found = graph.degree(nodes)
    assert found is not None
    bad, gone = math.ceil(0.1 * nodes), math.ceil(0.2 * nodes)

    def fails(k: int, t: int) -> float:
        read = tail(nodes - 1, bad, k, t)
        stuck = tail(nodes - 1, gone, k, k - t + 1)
        cut = tail(nodes, bad + gone, k // 2, k // 2)
        return math.log2(nodes * (2**read + 2**stuck + 2**cut))

    assert fails(found.neighbours, found.threshold) <= -graph.FAILURE_BITS
    assert all(fails(found.neighbours - 2, t) > -42 for t in range(1, found.neighbours - 1))


def test_the_table_in_the_documentation_is_what_the_derivation_gives() -> None:
    rows = [
        tuple(map(int, line.split()))
        for line in (graph.__doc__ or "").splitlines()
        if line.split() and all(word.isdigit() for word in line.split())
    ]
    assert len(rows) >= 5
    for nodes, neighbours, threshold in rows:
        assert graph.degree(nodes) == graph.Degree(neighbours, threshold)


def test_drop_outs_at_the_assumed_rate_leave_enough_holders() -> None:
    """A run of the event that the bound is about; it fails with probability below 1e-9."""
    found = graph.degree(1000)
    assert found is not None
    chosen = random.Random(5)
    around = graph.ring(b"x" * 32, 1000, found.neighbours)
    for _ in range(20):
        gone = set(chosen.sample(range(1000), 200))
        assert all(len(set(n) - gone) >= found.threshold for n in around)


def test_fractions_without_room_and_cohorts_too_small() -> None:
    with pytest.raises(ValueError, match="leave nobody"):
        graph.degree(1000, corrupt=0.5, dropped=0.5)
    assert graph.degree(6, corrupt=0.3, dropped=0.3) is None
