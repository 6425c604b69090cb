"""The median of each coordinate (Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 1).

Stands fewer than half of the nodes. Of an even number it is the mean of the two in the middle.
Where nodes' data differ, their updates do, and the median of a coordinate is not its mean.
"""

from dataclasses import dataclass

import torch

from umbel.strategies.aggregators.each import Choice, EachRule, Rows, part_inside, sorted_block


@dataclass(frozen=True)
class Median(EachRule):
    """The median of each coordinate; see `EachRule` for the arguments."""

    name: str = "median"

    def choose(self, rows: Rows, liars: int) -> Choice:
        made = torch.empty(rows.size, dtype=rows.vectors[0].dtype)
        low, high = (len(rows) - 1) // 2, len(rows) // 2
        for start, stop, block in rows.blocks():
            ordered = sorted_block(block)
            # halves first: the sum of two large numbers may be no number any more
            made[start:stop] = ordered[:, low] / 2 + ordered[:, high] / 2
        return Choice(made, part_inside(rows, min(max(liars, len(rows) // 4), low)))
