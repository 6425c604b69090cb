"""What all rules share that must see each update: they keep a round's updates, and look at them
coordinates at a time.

A rule states how many liars it stands (`STANDS`, `need`), and what it makes of the rows
(`choose`). Everybody counts once: numbers of examples are what a liar would lie about first.
"""

import math
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.aggregator import Aggregate, Aggregator, Contribution, RoundSpec
from umbel.strategies.transform import Facts

BLOCK_BYTES = 2 << 20
"""Of a block of coordinates over all rows: what a cache holds."""
HOLD_BYTES = 4 << 30
"""Updates of a round that stay in memory; those beyond lie in unnamed files."""
SAMPLED = 1 << 14
"""Coordinates by which it is judged how much of a node is in a result that is made by each."""


class Rows:
    """The updates of a round, in the order of the cohort.

    Args:
        vectors: each of shape (size,).
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self.vectors = list(vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def size(self) -> int:
        """Coordinates of a row."""
        return self.vectors[0].numel()

    def block(self, start: int, stop: int) -> Tensor:
        """Coordinates `start` to `stop` of every row, shape (rows, stop - start)."""
        return torch.stack([vector[start:stop] for vector in self.vectors])

    def blocks(self, row_bytes: int = 4) -> Iterator[tuple[int, int, Tensor]]:
        """All coordinates, a block after the other, each with where it begins and ends."""
        width = max(64, BLOCK_BYTES // (row_bytes * max(1, len(self))))
        for start in range(0, self.size, width):
            stop = min(self.size, start + width)
            yield start, stop, self.block(start, stop)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the rows, shape (rows, rows), in float64, in one pass.

        From the row of the median norm, not from the origin, and not from the mean, which a row of
        any length would move so far that the others' distances are lost in rounding.
        """
        centre = int(self.norms.argsort(stable=True)[(len(self) - 1) // 2])
        return self._products(centre)

    @cached_property
    def products(self) -> Tensor:
        """Inner products of the rows from the origin, shape (rows, rows), in float64."""
        return self._products(None)

    def _products(self, centre: int | None) -> Tensor:
        found = torch.zeros(len(self), len(self), dtype=torch.float64)
        for _, _, block in self.blocks(8):
            wide = block.double()
            if centre is not None:
                wide -= wide[centre].clone()
            values = wide.numpy()
            found += torch.from_numpy(values @ values.T)  # NumPy multiplies one half only
        return found

    @cached_property
    def distances(self) -> Tensor:
        """Squared Euclidean distances between rows, shape (rows, rows), exactly 0 to itself."""
        squares = self.gram.diagonal()
        found = (squares[:, None] + squares - 2 * self.gram).clamp_(min=0)
        return found.fill_diagonal_(0)

    @cached_property
    def norms(self) -> Tensor:
        """Euclidean norms, shape (rows,), in float64."""
        return torch.stack([row.double().norm() for row in self.vectors])

    def combined(self, weights: Tensor) -> Tensor:
        """The sum of the rows times their weights, shape (size,), in float64."""
        made = torch.empty(self.size, dtype=torch.float64)
        used = [i for i, weight in enumerate(weights.tolist()) if weight != 0]
        chosen = Rows([self.vectors[i] for i in used])
        if not used:
            return made.zero_()
        for start, stop, block in chosen.blocks(8):
            made[start:stop] = weights[used] @ block.double()
        return made

    def sample(self) -> "Rows":
        """At most `SAMPLED` coordinates of each row, evenly spread."""
        step = max(1, self.size // SAMPLED)
        return Rows([vector[::step] for vector in self.vectors])


@dataclass(frozen=True)
class Choice:
    """What a rule makes of rows.

    Attributes:
        mean: shape (size,).
        influence: of each row, from 0 (left out) to 1 (as any other).
    """

    mean: Tensor
    influence: Sequence[float]


@dataclass
class Kept:
    """The accumulator: what has come, by position; beyond a limit in files."""

    spec: RoundSpec
    room: int
    parts: dict[int, Contribution] = field(default_factory=dict)

    def keep(self, part: Contribution) -> None:
        """Take a contribution."""
        vector = part.vector
        need = vector.numel() * vector.element_size()
        if need > self.room:
            part = replace(part, vector=_on_disk(vector))
        else:
            self.room -= need
        self.parts[part.position] = part


def _on_disk(vector: Tensor) -> Tensor:
    """The vector over a file without a name, which goes with the last that looks at it."""
    values = vector.contiguous().numpy()
    with tempfile.TemporaryFile(prefix="umbel-replies-") as file:
        file.write(values.data)
        file.flush()
        return torch.from_numpy(np.memmap(file, values.dtype, "c", 0, values.shape))


@dataclass(frozen=True)
class EachRule(Aggregator[Kept]):
    """A rule that must see each update.

    Args:
        liars: the share of the nodes that may send whatever they like.
        hold_bytes: updates of a round that stay in memory; those beyond go into files.

    Raises:
        StackError: a share that the rule does not stand, or a cohort that is too small.
    """

    liars: float = 0.2
    hold_bytes: int = HOLD_BYTES
    name: str = ""
    kind: Literal["each"] = "each"

    STANDS: ClassVar[float] = 0.5
    """The share of liars that no rule of this kind stands; all below it does."""

    def __post_init__(self) -> None:
        if not 0 <= self.liars < self.STANDS:
            raise StackError(
                f"liars is {self.liars:g}, but {self.name} stands fewer than {self.STANDS:g} of "
                "the nodes; lower liars, or take another rule (docs/robust.md compares them)"
            )

    def count(self, rows: int) -> int:
        """How many liars there may be among so many."""
        return max(1, math.floor(self.liars * rows + 1e-9)) if self.liars else 0

    def need(self, liars: int) -> tuple[int, str]:
        """The fewest updates that stand so many liars, and the arithmetic."""
        return 2 * liars + 1, f"2 x {liars} + 1"

    @abstractmethod
    def choose(self, rows: Rows, liars: int) -> Choice:
        """The result, where so many of the rows may be anything; there are enough of them."""

    def too_few(self, rows: int) -> str:
        """Why so few updates are not enough; empty where they are."""
        liars = self.count(rows)
        need, sum_ = self.need(liars)
        if rows >= need:
            return ""
        who = f"{liars} liar" + ("s" if liars != 1 else "")
        return f"{self.name} needs {need} updates to stand {who} ({sum_})"

    def check(self, facts: Facts) -> Facts:
        for most in (facts.max_replies, math.floor(facts.expected_replies)):
            why = self.too_few(most) if most else ""
            if why:
                raise StackError(
                    f"{why}, but {most} are expected in a round; take more nodes, or lower liars"
                )
        return super().check(facts)

    def empty(self, spec: RoundSpec) -> Kept:
        return Kept(spec, self.hold_bytes)

    def add(self, acc: Kept, part: Contribution) -> None:
        if part.summed:
            raise ValueError(f"a sum over {part.count} nodes, but {self.name} must see each update")
        # A sum that is finite has no term that is not; it costs a part of looking at each.
        vector = part.vector
        if not (math.isfinite(vector.sum()) or bool(torch.isfinite(vector).all())):
            raise ValueError("an update with NaN or infinity")
        acc.keep(part)

    def merge(self, acc: Kept, other: Kept) -> None:
        for part in other.parts.values():
            acc.keep(part)

    def result(self, acc: Kept) -> Aggregate:
        return self.made(acc, self.choose)

    def made(self, acc: Kept, choose: Callable[[Rows, int], Choice]) -> Aggregate:
        """The aggregate of what `choose` makes of the rows, where there are enough of them."""
        parts = [acc.parts[position] for position in sorted(acc.parts)]
        if not parts:
            return Aggregate.nothing(acc.spec.size)
        why = self.too_few(len(parts))
        if why:
            nothing = Aggregate.nothing(acc.spec.size)
            return replace(nothing, aborted=f"{why}, and {len(parts)} could be used")
        choice = choose(Rows([part.vector for part in parts]), self.count(len(parts)))
        return Aggregate.of(choice.mean, parts, choice.influence, self.name)


def sorted_block(block: Tensor) -> Tensor:
    """The rows of each coordinate in ascending order, shape (coordinates, rows).

    NumPy sorts short contiguous rows with vector instructions, several times faster than a
    partition or a sort along the other axis.
    """
    turned = np.ascontiguousarray(block.numpy().T)
    turned.sort(axis=1)
    return torch.from_numpy(turned)


def part_inside(rows: Rows, cut: int) -> list[float]:
    """How often each row is neither among the `cut` lowest nor the `cut` highest of a coordinate.

    As a part of what is expected of a row that is like the others, at most 1; below a half it is
    told, above it is 1, because chance moves honest rows too. On a sample of the coordinates.
    """
    count = len(rows)
    if not cut or count <= 2 * cut:
        return [1.0] * count
    sample = rows.sample()
    inside = torch.zeros(count, dtype=torch.float64)
    for _, _, block in sample.blocks():
        ordered = sorted_block(block)
        low, high = ordered[:, cut], ordered[:, count - 1 - cut]
        inside += ((block >= low) & (block <= high)).double().sum(1)
    share = inside / sample.size / ((count - 2 * cut) / count)
    return [1.0 if value >= 0.5 else value for value in share.tolist()]
