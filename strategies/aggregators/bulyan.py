"""Bulyan over Krum (El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927, section 4).

Krum takes one update after the other off the round until n - 2 f are chosen; of them, each
coordinate is the mean of the n - 4 f values that are nearest to their median. So no liar can hide a
large change of one coordinate in a small distance.

Stands f liars among n >= 4 f + 3 updates: fewer than a quarter.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from umbel.strategies.aggregators.each import Choice, EachRule, Rows, sorted_block
from umbel.strategies.aggregators.krum import scores


@dataclass(frozen=True)
class Bulyan(EachRule):
    """See the module; `EachRule` has the arguments."""

    name: str = "bulyan"
    STANDS: ClassVar[float] = 0.25

    def need(self, liars: int) -> tuple[int, str]:
        return 4 * liars + 3, f"4 x {liars} + 3"

    def choose(self, rows: Rows, liars: int) -> Choice:
        left = list(range(len(rows)))
        chosen: list[int] = []
        for _ in range(len(rows) - 2 * liars):
            near = rows.distances[left][:, left]
            first = int(scores(near, liars).argsort(stable=True)[0])
            chosen.append(left.pop(first))
        selected = Rows([rows.vectors[i] for i in sorted(chosen)])
        made = torch.empty(rows.size, dtype=torch.float64)
        for start, stop, block in selected.blocks():
            made[start:stop] = nearest_to_median(sorted_block(block), len(selected) - 2 * liars)
        return Choice(made, [float(i in chosen) for i in range(len(rows))])


def nearest_to_median(ordered: torch.Tensor, keep: int) -> torch.Tensor:
    """The mean of the `keep` values of each row that are nearest to its median.

    They are neighbours in the order: a window that moves up as long as what it would take in is
    nearer than what it would leave. Of two that are as near, the lower stays.

    Args:
        ordered: shape (coordinates, values), ascending along the second.
        keep: how many.
    """
    count = ordered.shape[1]
    wide = ordered.double()
    middle = (wide[:, (count - 1) // 2] + wide[:, count // 2]) / 2
    leaves, takes = middle[:, None] - wide[:, : count - keep], wide[:, keep:] - middle[:, None]
    first = (leaves > takes).sum(1)
    sums = torch.nn.functional.pad(wide.cumsum(1), (1, 0))
    total = sums.gather(1, (first + keep)[:, None]) - sums.gather(1, first[:, None])
    return total[:, 0] / keep
