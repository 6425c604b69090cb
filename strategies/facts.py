"""What is known of an update at a place of the stack, and what a layer promises for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # importing it takes a second, which a run without privacy need not wait
    from dp_accounting import DpEvent, NeighboringRelation

Segments = tuple[tuple[str, int], ...]
"""Names and sizes of the parts of an update, in order."""


@dataclass(frozen=True)
class Facts:
    """What is known of one node's update at a point of the stack.

    Attributes:
        size: number of coordinates.
        l2_bound: no update is longer than this, in the update's own unit; None is no bound.
        weight_bound: no update is multiplied by more than this before it is summed; None is
            no bound (weights such as numbers of examples).
        modulus: coordinates are integers modulo this; None is real numbers.
        server_sees: each update, or only their sum.
        min_replies: the smallest number of updates that a sum is ever made of.
        grid: coordinates are multiples of this power of two, so that sums are exact; None is
            any real number.
        public_denominator: the sum is divided by a number that does not depend on who came.
        round: the round that the facts are about, from 1; 0 before the first.
        expected_replies: the expected number of updates in a sum; 0 is not known.
        max_replies: the largest number of updates in a sum; 0 is not known.
        spread: standard deviation of a coordinate of any one update, after a random rotation
            that spreads it evenly; None is without.
        noise: standard deviation of the noise that all nodes together add to a coordinate.
        wide: an update needs float64, because float32 does not hold every value that it can have.
        kind: what the collect makes of the updates: their `sum`, or a choice that it makes by
            looking at `each` (a median); None where it does not say. Noise that hides one
            update in the result, and secure sums, need a sum.
        averages_buffers: the collect also averages the nodes' running statistics.
        population: how many nodes there are, of whom a round asks some; 0 is not known.
        segments: the parts that layers have put behind the update, by name and size; what comes
            before them is the update of the model. Clipping, noise and secure sums act on the
            whole vector.
    """

    size: int
    l2_bound: float | None = None
    weight_bound: float | None = None
    modulus: int | None = None
    server_sees: Literal["each", "sum"] = "each"
    min_replies: int = 1
    grid: float | None = None
    public_denominator: bool = False
    round: int = 0
    expected_replies: float = 0.0
    max_replies: int = 0
    spread: float | None = None
    noise: float = 0.0
    wide: bool = False
    kind: Literal["sum", "each"] | None = None
    averages_buffers: bool = False
    population: int = 0
    segments: Segments = ()

    def replace(self, **changes: Any) -> Facts:
        """These facts with some replaced."""
        return replace(self, **changes)

    def longer(self, name: str, size: int, l2_bound: float | None = None) -> Facts:
        """The facts of an update that has got one more segment at its end.

        Args:
            name: of the segment.
            size: its coordinates.
            l2_bound: of the whole longer update; None is no bound, so that it is clipped again.
        """
        return self.replace(
            size=self.size + size,
            l2_bound=l2_bound,
            grid=None,
            segments=(*self.segments, (name, size)),
        )


@dataclass(frozen=True)
class Claim:
    """What one round costs, and to whom it is promised.

    Attributes:
        event: the mechanism of one round, without subsampling (the cohort adds that).
        unit: whose presence is hidden.
        relation: the neighbouring relation that the event's parameters refer to.
        against: who may look at the output of the mechanism.
        sampled: whether the cohort's secret sampling amplifies it.
        repeat_event: the event of a round that is run once more after a crash; None is `event`.
        extra_delta: what the round adds to delta.
        seen_in_sum_only: who it is against sees it in the round's sum only, once that is released.
        separation: a unit takes part at most once in this many consecutive rounds.
        mechanism: how the noise is made, in the words of the option `mechanism`, such as `local`;
            empty for another way.
    """

    event: DpEvent
    unit: Literal["client", "example"]
    relation: NeighboringRelation
    against: Literal["model-user", "server", "other-clients"]
    sampled: bool = True
    repeat_event: DpEvent | None = None
    extra_delta: float = 0.0
    seen_in_sum_only: bool = False
    separation: int = 1
    mechanism: str = ""
