"""The weighted mean: contributions are added up as they come, in the order of the cohort.

By number of examples it is the rule of McMahan et al. 2017 (section 2). It stands no liar: one
node moves the mean as far as an update may be long, so a bound on updates is all that limits it.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from umbel.core.errors import StackError
from umbel.core.names import EXAMPLES
from umbel.strategies.aggregator import (
    Aggregate,
    Aggregator,
    Contribution,
    Limited,
    MeanMetrics,
    RoundSpec,
)
from umbel.strategies.example_weights import TIMES, Counted, LimitedFold, Patience
from umbel.strategies.ordered_sum import OrderedSum, exact_block
from umbel.strategies.transform import Facts, Metrics

Weighting = Literal["examples", "equal", "fixed"]

FEW = 8
"""Where float32 adds up fewer updates exactly, adding in float64 at once is no more work."""


@dataclass(frozen=True)
class _Row:
    """What is kept of a contribution whose vector is in the sum."""

    node: int
    weight: float
    count: int
    summed: bool
    metrics: Metrics


@dataclass
class Sums:
    """The accumulator.

    Attributes:
        spec: of the round.
        single: adds up single updates.
        limits: the same, where it limits their weights.
        several: adds up sums over several nodes, from the first of them on.
        buffers: adds up running statistics, where they travel.
        rows: what has come, by position.
        places: all positions of which something is known.
    """

    spec: RoundSpec
    single: OrderedSum
    limits: LimitedFold | None
    buffers: OrderedSum | None
    several: OrderedSum | None = None
    rows: dict[int, _Row] = field(default_factory=dict)
    places: set[int] = field(default_factory=set)

    def over_several(self) -> OrderedSum:
        """`several`, which takes room for a model."""
        if self.several is None:
            self.several = OrderedSum(self.spec.size, torch.float64)
            for position in self.places:
                self.several.skip(position)
        return self.several


@dataclass(frozen=True)
class WeightedMean(Aggregator[Sums]):
    """The mean of the updates; see `umbel.PlainSum` for the arguments.

    Where a contribution is a sum over several nodes, its weights were decided by whoever added
    it up, so `max_examples` is for single nodes.
    """

    weighting: Weighting = "examples"
    hold_bytes: int = 32 << 20
    max_examples: int = 0
    name: str = "weighted-mean"
    kind: Literal["sum"] = "sum"

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "equal", "fixed"):
            raise StackError(f"weighting is {self.weighting!r}; it can be examples, equal or fixed")

    def check(self, facts: Facts) -> Facts:
        return facts.replace(
            kind="sum",
            averages_buffers=True,
            weight_bound=None if self.weighting == "examples" else 1.0,
            public_denominator=self.weighting == "fixed",
        )

    def empty(self, spec: RoundSpec) -> Sums:
        spec = replace(spec, request=None)  # with it goes the model that was sent
        if self.weighting == "examples":
            dtype = torch.float64 if spec.facts.wide else spec.dtype
            patience = Patience.of(self.max_examples, spec.size * dtype.itemsize, self.hold_bytes)
            limits = LimitedFold(spec.size, dtype, self.hold_bytes, patience=patience)
            buffers: OrderedSum | None = None
            if spec.buffers:  # in which the same nodes count the same
                buffers = LimitedFold(
                    spec.buffers, torch.float64, self.hold_bytes, patience=patience
                )
            return Sums(spec, limits, limits, buffers)
        buffers = OrderedSum(spec.buffers, torch.float64) if spec.buffers else None
        return Sums(spec, self._equal(spec), None, buffers)

    def add(self, acc: Sums, part: Contribution) -> None:
        where = part.position
        weight = part.weight if self.weighting == "examples" else float(part.count)
        if not 0 < weight < 2**53:
            raise ValueError(f"{EXAMPLES} is {weight!r}, which is no weight")
        if part.summed:
            acc.over_several().offer(where, part.vector, 1.0)
            acc.single.skip(where)
        else:
            acc.single.offer(where, part.vector, weight)
            if acc.several is not None:
                acc.several.skip(where)
        if acc.buffers is not None:
            assert part.buffers is not None, "an exchange reads buffers where they travel"
            acc.buffers.offer(where, part.buffers, weight)
        acc.rows[where] = _Row(part.node, weight, part.count, part.summed, part.metrics)
        acc.places.add(where)

    def skip(self, acc: Sums, position: int) -> None:
        for fold in (acc.single, acc.several, acc.buffers):
            if fold is not None:
                fold.skip(position)
        acc.places.add(position)

    def merge(self, acc: Sums, other: Sums) -> None:
        acc.single.merge(other.single)
        if other.several is not None:
            acc.over_several().merge(other.several)
        if acc.buffers is not None and other.buffers is not None:
            acc.buffers.merge(other.buffers)
        acc.rows |= other.rows
        acc.places |= other.places

    def result(self, acc: Sums) -> Aggregate:
        rows = {where: acc.rows[where] for where in sorted(acc.rows)}
        total = acc.single.finish()
        if acc.several is not None:
            several = acc.several.finish()
            total = several if all(row.summed for row in rows.values()) else several.add_(total)
        weights, limited = self._counted(acc.limits, rows)
        means = MeanMetrics()
        for where, weight in weights.items():
            means.add(where, rows[where].metrics, weight)
        weight = math.fsum(weights.values())
        return Aggregate(
            total=total,
            weight=weight,
            replies=sum(row.count for row in rows.values()),
            denominator=acc.spec.cohort if self.weighting == "fixed" else weight,
            metrics=means.result(),
            buffers=acc.buffers.finish() / weight if acc.buffers is not None and weight else None,
            limited=limited,
        )

    def _equal(self, spec: RoundSpec) -> OrderedSum:
        """Where equal weights are added up: exactly, if the updates lie on a grid."""
        facts = spec.facts
        block = exact_block(facts.l2_bound, facts.grid)
        off_grid = facts.l2_bound is not None and facts.grid is None
        if facts.wide or off_grid or block < FEW:
            return OrderedSum(spec.size, torch.float64, self.hold_bytes)
        return OrderedSum(spec.size, spec.dtype, self.hold_bytes, block)

    def _counted(
        self, fold: LimitedFold | None, rows: dict[int, _Row]
    ) -> tuple[dict[int, float], tuple[Limited, ...]]:
        """By position what each contribution counts for; and those that were limited."""
        weights = {where: row.weight for where, row in rows.items()}
        if fold is None:
            return weights, ()
        limited: list[Limited] = []
        single = [where for where, row in rows.items() if not row.summed]
        for where, one in zip(single, fold.counted, strict=True):
            weights[where] = one.weight
            if one.weight < one.said:
                node, why = rows[where].node, self._limit_in_words(one)
                limited.append(Limited(node, one.said, one.weight, why))
        return weights, tuple(limited)

    def _limit_in_words(self, one: Counted) -> str:
        if self.max_examples:
            return f"max-examples is {self.max_examples}"
        return (
            f"no node counts for more than {TIMES} times the median of its round, which is "
            f"{one.median:g}; max-examples=N sets a limit of your own"
        )
