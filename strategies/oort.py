"""Oort: nodes take part whose examples are worth most, and now and then one that never did.

    worth      examples x loss, no more than that of 95 % of the nodes;
               plus sqrt(0.1 log(round) / the round in which the node trained last)
    cohort     a share of nodes that never trained, which falls from 0.9 to 0.2;
               the rest drawn in proportion to worth from those near the best

Lai, Zhu, Madhyastha and Chowdhury 2021 (https://arxiv.org/abs/2010.06081, algorithm 1). The root
mean square of a node's example losses is taken to be their mean, which is what nodes measure. How
long nodes take is left out, so that the same seeds choose the same nodes. The choice follows what
nodes measure, so a run that hides that is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from umbel.strategies.samplers import N, SamplingContext, examples_of, loss_of

FIRST, DECAY, LEAST = 0.9, 0.98, 0.2
"""The share of nodes that never trained: in the first round, from round to round, at least."""

CAP, NEAR = 0.95, 0.95
"""The quantile at which worth is cut, and how near to the best of it a node has to be."""


@dataclass(frozen=True)
class Oort:
    """Nodes by what training on them is worth.

    Args:
        size: of the cohort.
    """

    size: int
    name: Literal["oort"] = "oort"
    sampling: ClassVar[None] = None
    by_losses: ClassVar[bool] = True

    def bounds(self, population: int) -> tuple[float, int]:
        size = min(self.size, population)
        return float(size), size

    def select(self, nodes: Sequence[N], ctx: SamplingContext) -> list[N]:
        """The nodes of a round.

        Raises:
            RunError: a node trained and said no loss.
        """
        generator, count = ctx.generator(), min(self.size, len(nodes))
        losses = np.array([loss_of(node, ctx, self.name) for node in nodes])
        known, new = np.flatnonzero(np.isfinite(losses)), np.flatnonzero(~np.isfinite(losses))
        share = max(LEAST, FIRST * DECAY ** (ctx.number - 1))
        explored = min(len(new), max(round(share * count), count - len(known)))
        chosen = generator.choice(new, explored, replace=False).tolist()
        if explored < count:
            last = np.array([ctx.of(nodes[place]).last for place in known.tolist()])
            worth = losses[known] * examples_of(nodes, ctx)[known]
            worth = np.minimum(worth, np.quantile(worth, CAP))
            worth = worth + np.sqrt(0.1 * math.log(max(ctx.number, 1)) / np.maximum(last, 1))
            chosen += known[_drawn(worth, count - explored, generator)].tolist()
        return [nodes[place] for place in sorted(chosen)]


def _drawn(
    worth: "np.ndarray[Any, np.dtype[np.float64]]", count: int, generator: np.random.Generator
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """So many places, in proportion to worth, of those near the best so many."""
    near = np.flatnonzero(worth >= NEAR * np.sort(worth)[-count])
    weight = worth[near] + 1e-12  # losses of 0 are worth nothing, and still somebody has to come
    drawn = generator.choice(len(near), count, replace=False, p=weight / weight.sum())
    return near[drawn]
