"""The mean of each coordinate without its lowest and highest values (Yin et al. 2018,
https://arxiv.org/abs/1803.01498, definition 2).

Stands fewer than half of the nodes: with f liars, the f lowest and the f highest of each coordinate
are left out, so that what remains lies between honest values.
"""

from dataclasses import dataclass

import torch

from umbel.strategies.aggregators.each import Choice, EachRule, Rows, part_inside, sorted_block


@dataclass(frozen=True)
class TrimmedMean(EachRule):
    """The trimmed mean of each coordinate; see `EachRule` for the arguments."""

    name: str = "trimmed-mean"

    def choose(self, rows: Rows, liars: int) -> Choice:
        made = torch.empty(rows.size, dtype=torch.float64)
        for start, stop, block in rows.blocks():
            inner = sorted_block(block)[:, liars : len(rows) - liars]
            made[start:stop] = inner.mean(1, dtype=torch.float64)
        return Choice(made, part_inside(rows, liars))
