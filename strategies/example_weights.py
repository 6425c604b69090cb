"""Means by examples in which no node counts for too much.

A number of examples is what a node says of itself. One that says 2^53 would be the whole mean,
so a node counts for at most `TIMES` times the median number of its round, or for what the option
`max-examples` says.

    weight = min(examples, limit),   limit = max-examples, or TIMES x median of the round

The median is the lower one (of 10 and 1000 it is 10), over the replies that are used. It is
known when all of them are there, so terms wait, as references to what has arrived, while they
fit into the memory that a fold may hold back. Where they do not, the limit is that of the terms
so far, at least of three. Terms come in the order of the cohort, so the weights and the bits of
the sum do not depend on the order of arrival.
"""

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from umbel.strategies.ordered_sum import BLOCK, OrderedSum

TIMES = 10
"""No node counts for more than so many times the median of its round."""
LEAST = 3
"""Terms whose median is not the word of one."""


@dataclass(frozen=True)
class Counted:
    """What a node's claim came to.

    Attributes:
        said: its number of examples, as it said it.
        weight: what it counts for.
        median: that decided it; 0 where the limit is fixed.
    """

    said: float
    weight: float
    median: float


@dataclass(frozen=True)
class Patience:
    """When a fold decides on weights.

    Attributes:
        most: the largest weight; 0 is `TIMES` times the median.
        wait: terms from which the median is taken.
        eager: the terms are too large to wait; they are added as long as they agree.
    """

    most: float
    wait: int
    eager: bool

    @classmethod
    def of(cls, most: float, term_bytes: int, hold_bytes: int) -> "Patience":
        """For terms of so many bytes, of which `hold_bytes` may wait in memory."""
        fit = hold_bytes // max(1, term_bytes)
        return cls(most, max(LEAST, fit), eager=fit < LEAST)


class LimitedFold(OrderedSum):
    """A fold that limits the weights of its terms as it adds them, in the order of the cohort.

    Args:
        size: coordinates of a vector.
        dtype: of the sum.
        hold_bytes: as of `OrderedSum`.
        patience: when weights are decided; folds of one round share it, and so their weights.
        block: as of `OrderedSum`.

    Attributes:
        counted: for each term, in the order of the cohort.
        patience: as given.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        hold_bytes: int = 32 << 20,
        *,
        patience: Patience,
        block: int = BLOCK,
    ) -> None:
        super().__init__(size, dtype, hold_bytes, block)
        self.counted: list[Counted] = []
        self.patience = patience
        self._said: list[float] = []  # in ascending order
        self._waiting: list[tuple[Tensor, float]] = []
        self._decided = False

    def finish(self) -> Tensor:
        for position in sorted(self._held):
            self._take(self._held.pop(position))
        self._decide()
        return super().finish()

    def _adopt(self, other: OrderedSum) -> None:
        super()._adopt(other)
        assert isinstance(other, LimitedFold)
        self.counted, self._said = other.counted, other._said
        self._waiting, self._decided = other._waiting, other._decided

    def _add(self, vector: Tensor, weight: float) -> None:
        most, wait = self.patience.most, self.patience.wait
        bisect.insort(self._said, weight)
        if most:
            self._count(vector, weight, most, 0.0)
        elif self._decided or len(self._said) >= wait:
            self._decide()
            self._limited(vector, weight)
        elif self.patience.eager and self._said[-1] <= TIMES * self._said[0]:
            self._count(vector, weight, weight, weight)
        else:
            self._waiting.append((vector, weight))

    def _decide(self) -> None:
        """Add what waits; and if what was added at once counted for too much, shrink that."""
        if self._decided or not self._said or self.patience.most:
            return
        self._decided = True
        largest = max((one.weight for one in self.counted), default=0.0)
        limit = TIMES * self._median
        if largest > limit:  # then it is the first term alone: all that were added agreed
            self._block.mul_(limit / largest)
            if self._total is not None:
                self._total.mul_(limit / largest)
            self.counted = [
                Counted(one.said, one.weight * limit / largest, self._median)
                for one in self.counted
            ]
        waiting, self._waiting = self._waiting, []
        for vector, weight in waiting:
            self._limited(vector, weight)

    @property
    def _median(self) -> float:
        return self._said[(len(self._said) - 1) // 2]

    def _limited(self, vector: Tensor, weight: float) -> None:
        self._count(vector, weight, TIMES * self._median, self._median)

    def _count(self, vector: Tensor, weight: float, limit: float, median: float) -> None:
        counted = min(weight, limit)
        self.counted.append(Counted(weight, counted, median))
        super()._add(vector, counted)
