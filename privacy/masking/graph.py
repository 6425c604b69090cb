"""Who shares masks with whom: everybody, or k neighbours on a ring in random order.

Up to 100 nodes the graph is complete. Above, nodes are put on a ring by a permutation that every
node derives from the session (so nobody chooses it alone) and each is joined to the k/2 nodes on
either side: Harary's graph, the sparsest that stays connected when any k - 1 nodes are removed
(Bell et al. 2020, section 3). The secrets of a node are shared among its k neighbours and itself.

The degree. Let a fraction c of the n nodes be corrupt and a fraction d drop out, both at random
with respect to the ring. Three things must not happen, each with probability above 2^-41.6 so
that all three together stay below 2^-40:

    read       some node has t or more corrupt neighbours, who hold its secrets:
                   n · P[Hypergeometric(n-1, cn, k) >= t]
    stuck      some node's secrets have fewer than t holders left:
                   n · P[Hypergeometric(n-1, n - dn, k) < t]
    cut        the honest survivors fall apart, so that the sums of the parts show; for that a run
               of k/2 nodes in a row must be corrupt or gone:
                   n · P[Hypergeometric(n, (c+d)n, k/2) = k/2]

`degree` finds the smallest even k for which a threshold t exists. With c = 1/10 and d = 1/5:

    n      k    t
    150    48   16
    200    52   21
    500    74   31
    1000   86   36
    5000   98   42
    10000  102  43

A node that can try many sessions and choose its own keys after it has seen the others' may search
for a ring that suits it; s tries cost log2(s) bits of the bound.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COMPLETE_UP_TO = 100
FAILURE_BITS = 40


@dataclass(frozen=True)
class Degree:
    """How many neighbours a node has, and how many holders give its secrets back."""

    neighbours: int
    threshold: int


@lru_cache(maxsize=1024)
def degree(
    nodes: int, corrupt: float = 0.1, dropped: float = 0.2, failure_bits: int = FAILURE_BITS
) -> Degree | None:
    """The smallest degree that keeps the bound, or None where only the complete graph does.

    Args:
        nodes: how many take part.
        corrupt: fraction that works together against the others.
        dropped: fraction that may vanish.
        failure_bits: the failure probability is at most 2^-failure_bits.

    Raises:
        ValueError: the fractions are negative or leave no room for a threshold between them.
    """
    if corrupt < 0 or dropped < 0 or corrupt + dropped >= 1:
        raise ValueError(
            f"{corrupt:.2f} of the nodes corrupt and {dropped:.2f} gone leave nobody; "
            "their sum must stay below 1."
        )
    bad, gone = math.ceil(corrupt * nodes), math.ceil(dropped * nodes)
    each = -(failure_bits + math.log2(3)) - math.log2(nodes)
    for k in range(2, nodes - 1, 2):
        if _log2_run(nodes, min(nodes, bad + gone), k // 2) > each:
            continue
        # The least threshold that corrupt neighbours cannot reach; then enough must survive.
        read = _log2_upper_tails(nodes - 1, bad, k)
        threshold = next((t for t in range(1, k + 1) if read[t] <= each), None)
        if threshold is None:
            continue
        # With t holders needed besides the node itself, too few are left if k - t + 1 are gone.
        if _log2_upper_tails(nodes - 1, gone, k)[k - threshold + 1] <= each:
            return Degree(k, threshold)
    return None


def ring(seed: bytes, nodes: int, neighbours: int) -> list[tuple[int, ...]]:
    """The neighbours of each of `nodes` positions, sorted; complete if there are enough.

    Args:
        seed: 32 bytes that all nodes agree on.
        nodes: number of positions.
        neighbours: even, or at least nodes - 1 for the complete graph.
    """
    if neighbours >= nodes - 1:
        return [tuple(j for j in range(nodes) if j != i) for i in range(nodes)]
    order = permutation(seed, nodes)
    around = [0] * nodes
    for place, node in enumerate(order):
        around[node] = place
    half = neighbours // 2
    return [
        tuple(sorted(order[(around[i] + step) % nodes] for step in range(-half, half + 1) if step))
        for i in range(nodes)
    ]


def permutation(seed: bytes, size: int) -> list[int]:
    """0 .. size - 1 in the order of 128-bit draws of SHAKE-256, the same on every machine."""
    drawn = hashlib.shake_256(b"umbel ring" + seed).digest(16 * size)
    return sorted(range(size), key=lambda i: drawn[16 * i : 16 * i + 16])


def _log2_upper_tails(population: int, marked: int, draws: int) -> list[float]:
    """log2 P[X >= x] for x = 0 .. draws + 1, X hypergeometric."""
    total = math.comb(population, draws)
    counts = [
        math.comb(marked, x) * math.comb(population - marked, draws - x) for x in range(draws + 1)
    ]
    tails, above = [-math.inf], 0
    for count in reversed(counts):
        above += count
        tails.append(_log2(above) - _log2(total))
    return tails[::-1]


def _log2_run(population: int, marked: int, run: int) -> float:
    """log2 of the probability that `run` places in a row are all marked."""
    return _log2(math.comb(marked, run)) - _log2(math.comb(population, run))


def _log2(number: int) -> float:
    if number == 0:
        return -math.inf
    shift = max(0, number.bit_length() - 900)
    return float(np.log2(float(number >> shift))) + shift
