"""How contributions become one result: the rule that an exchange feeds.

    exchange -> empty      once a round, with the facts of what will come
    exchange -> add        a contribution: a node's update, or a sum over several
    exchange -> skip       a place of the cohort from which nothing will come
    exchange -> merge      two accumulators of one round, wherever they were made
    exchange -> result     an aggregate

An aggregator is a monoid: `merge` is associative, `empty` changes nothing, and neither the order
of arrival nor the grouping changes a bit of the result, because contributions say their position
in the cohort. So threads, pools, relays and clusters may each add up a part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

import torch
from flwr.app import Message
from torch import Tensor

from umbel.core.names import EXAMPLES
from umbel.strategies.transform import Facts, Metrics

if TYPE_CHECKING:  # it is about stacks, which have an exchange
    from umbel.strategies.contract import Contract
    from umbel.strategies.payload import Packing

A = TypeVar("A")

LARGEST_METRIC = 1e100
"""Whatever a node reports beyond this is no measurement; sums of smaller ones stay finite."""


@dataclass(frozen=True)
class Contribution:
    """What one node, or several nodes together, add to a round.

    Attributes:
        vector: the update of one node, shape (size,); nobody may change it. Where `summed`, it is
            the sum of several updates, each times its weight.
        weight: what the update counts for as its sender says it; where `summed`, the sum of the
            weights that are in the vector.
        count: of how many nodes it is.
        metrics: what the nodes measured; means where there are several.
        buffers: their running statistics as one vector, where those travel.
        node: the sender's id.
        position: its place in the cohort, from 0; no two contributions share one.
        version: the round whose model the update starts from.
        summed: whether the vector is such a sum.
    """

    vector: Tensor
    weight: float = 1.0
    count: int = 1
    metrics: Metrics = field(default_factory=dict)
    buffers: Tensor | None = None
    node: int = 0
    position: int = 0
    version: int = 0
    summed: bool = False

    @property
    def scale(self) -> float:
        """What the vector is multiplied by in a weighted sum."""
        return 1.0 if self.summed else self.weight

    @property
    def mean(self) -> Tensor:
        """The mean update, shape (size,)."""
        return self.vector / self.weight if self.summed else self.vector


@dataclass(frozen=True)
class RoundSpec:
    """What is known of a round before its replies come.

    Attributes:
        number: the round, from 1.
        size: coordinates of an update.
        dtype: of an update before any layer.
        cohort: the expected number of nodes; the denominator of a fixed average.
        facts: at the bottom of the stack.
        buffers: coordinates of the nodes' buffers; 0 where they stay local.
        run_id: of Flower's run.
        contract: what nodes act on, as the server reckons it; None takes their word.
        request: one of the messages that nodes were sent, for a rule that answers it itself.
        packing: how updates are written down; None where they travel as one dense vector.
        factors: what the updates of nodes are multiplied by as they come, by id; a node without
            counts whole. Asynchronous rounds fill it while replies come.
    """

    number: int
    size: int
    dtype: torch.dtype
    cohort: float
    facts: Facts
    buffers: int = 0
    run_id: int = 0
    contract: "Contract | None" = None
    request: Message | None = None
    packing: "Packing | None" = None
    factors: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A reply that was not used."""

    node_id: int
    reason: str


@dataclass(frozen=True)
class Limited:
    """A reply that counts for less than its sender said.

    Attributes:
        node_id: the sender.
        said: its number of examples, as it said it.
        counted: the weight that it got.
        why: the limit, in words.
    """

    node_id: int
    said: float
    counted: float
    why: str


@dataclass(frozen=True)
class Judged:
    """A good reply that the rule lets count for less than others.

    Attributes:
        node_id: the sender.
        influence: what it counts for, from 0 (left out) to 1 (as any other).
        why: in words.
    """

    node_id: int
    influence: float
    why: str


@dataclass(frozen=True)
class Aggregate:
    """What a round comes to.

    Attributes:
        total: weighted sum of the updates, shape (size,); zeros when nothing arrived. Of a rule
            that makes no sum, its result times `denominator`.
        weight: sum of the weights.
        replies: how many updates are in it.
        denominator: what turns the total into an average; 0 where there is none.
        metrics: weighted means of the nodes' metrics, over the nodes that sent each.
        buffers: weighted mean of the nodes' buffers, where they travel.
        rejected: replies that were not used, and why.
        bytes_up: size of all replies.
        aborted: why there is no sum at all, or empty. The model then stays as it was.
        revealed: somebody could know the sum; it is False only where that is impossible.
        about: what the run should write down of how the sum came about.
        limited: replies that count for less than their senders said.
        judged: replies that the rule has weighed down or left out, though nothing is wrong with
            their form.
    """

    total: Tensor
    weight: float
    replies: int
    denominator: float
    metrics: Metrics = field(default_factory=dict)
    buffers: Tensor | None = None
    rejected: tuple[Rejected, ...] = ()
    bytes_up: int = 0
    aborted: str = ""
    revealed: bool = True
    about: Mapping[str, str | int] = field(default_factory=dict)
    limited: tuple[Limited, ...] = ()
    judged: tuple[Judged, ...] = ()

    @classmethod
    def of(
        cls,
        mean: Tensor,
        parts: Sequence[Contribution],
        influence: Sequence[float] | None = None,
        why: str = "",
    ) -> "Aggregate":
        """What a rule that must see each update has made of a round.

        Args:
            mean: the result, shape (size,).
            parts: all contributions, in the order of their positions.
            influence: of each of them, from 0 to 1, where the rule weighs whole updates; metrics
                and buffers are then means with these weights.
            why: in words, what is said of those with less than 1.
        """
        weights = [1.0] * len(parts) if influence is None else list(influence)
        means = MeanMetrics()
        for part, weight in zip(parts, weights, strict=True):
            if weight > 0:
                means.add(part.position, part.metrics, weight)
        judged = [
            Judged(part.node, weight, why)
            for part, weight in zip(parts, weights, strict=True)
            if weight < 1
        ]
        count = sum(part.count for part in parts)
        return cls(mean, float(count), count, 1.0, metrics=means.result(), judged=tuple(judged))

    @classmethod
    def nothing(cls, size: int) -> "Aggregate":
        """Of a round in which nothing came."""
        return cls(torch.zeros(size, dtype=torch.float64), 0.0, 0, 0.0)


@runtime_checkable
class Aggregator(Protocol[A]):
    """A rule; frozen, with the accumulator of a round passed in and out.

    `kind` says what the rule must be given: a `sum` can take sums over several nodes, so noise,
    secure sums and partial sums work with it; `each` must see every update. What the result is,
    and so whether noise can hide one update in it, `check` says among the facts.
    """

    @property
    def name(self) -> str:
        """In configs and reports."""
        ...

    @property
    def kind(self) -> Literal["sum", "each"]:
        """What the rule must be given."""
        ...

    def check(self, facts: Facts) -> Facts:
        """The facts of the result, from those of one update; raises StackError with the cure.

        Without more, a result of this `kind` in which every update counts once.
        """
        return facts.replace(
            kind=self.kind, averages_buffers=False, weight_bound=1.0, public_denominator=False
        )

    def empty(self, spec: RoundSpec) -> A:
        """An accumulator to which nothing has been added."""
        ...

    def add(self, acc: A, part: Contribution) -> None:
        """Take a contribution, whose tensors are not changed.

        Raises:
            ValueError: it cannot be used, and why; its sender is then rejected, and the
                accumulator is as it was.
        """
        ...

    def skip(self, acc: A, position: int) -> None:  # noqa: ARG002
        """Hear that nothing will come from a place, so that nobody waits for it."""
        return

    def merge(self, acc: A, other: A) -> None:
        """Take what another accumulator of the same round has, which is used up."""
        ...

    def result(self, acc: A) -> Aggregate:
        """The aggregate of everything that was added; the accumulator is used up."""
        ...


class MeanMetrics:
    """Weighted means of metrics, whose bits do not depend on the order of arrival."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[dict[str, float], float]] = {}

    def add(self, position: int, metrics: Mapping[str, float], weight: float) -> None:
        """Take one node's metrics."""
        self._rows[position] = ({k: v for k, v in metrics.items() if k != EXAMPLES}, weight)

    def result(self) -> dict[str, float]:
        """The means, each over the nodes that sent a value that can be one."""
        terms: dict[str, list[tuple[float, float]]] = {}
        for metrics, weight in self._rows.values():
            for name, value in metrics.items():
                if abs(value) <= LARGEST_METRIC:  # not true of NaN
                    terms.setdefault(name, []).append((value * weight, weight))
        return {
            name: math.fsum(value for value, _ in rows) / math.fsum(weight for _, weight in rows)
            for name, rows in sorted(terms.items())
        }
