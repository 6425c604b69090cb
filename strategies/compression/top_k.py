"""Top-k with error feedback: the largest coordinates, of each node its own.

    node             update + what was left unsent; the k largest leave, the rest stays
    node -> server   counts, places: which coordinates; values: what they are
    server           the values in their places, zeros elsewhere, to the rule as any update

The layer stands first, so clipping bounds the k numbers with all that was left over in them, and
noise that the server adds is for the whole vector. Nothing is lost over rounds: what has arrived of
a node and what it still keeps are the sum of its updates (Stich, Cordonnier and Jaggi 2018,
https://arxiv.org/abs/1809.07599, algorithm 1).

Nodes send different coordinates, and which they are tells about their data; no sum in secret can
be made of them.

On the wire the vector is cut into stretches of 65,536 coordinates: `counts` says how many of each
stretch are sent, `places` where they are in it, in order, and `values` what they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.strategies.compression.unsent import Unsent
from umbel.strategies.contexts import NodeContext
from umbel.strategies.payload import Part, Parts

STRETCH = 1 << 16


@dataclass(frozen=True)
class TopK(Unsent):
    """Sends the largest coordinates, and keeps the rest for later rounds.

    Args:
        fraction: of the coordinates, above 0 and up to a half, beyond which the whole update would
            be shorter; at least one is sent.

    Raises:
        StackError: a fraction out of range, or a layer before it has put more behind the update
            than the model's change, which must arrive whole.

    Metrics: `unsent`, the length of what a node keeps over the length of what it had to send.
    """

    fraction: float = 0.05
    name: str = "top-k"
    keeps_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise StackError(
                f"the fraction of {self.name} is {self.fraction:g}; give 0 < f <= 0.5, for each "
                "coordinate that is sent takes its place beside its value"
            )

    def count(self, size: int) -> int:
        """How many of `size` coordinates are sent."""
        return max(1, round(self.fraction * size))

    def chosen(self, whole: Tensor) -> Tensor:
        places = whole.abs().topk(self.count(whole.numel()), sorted=False).indices
        sent = torch.zeros_like(whole)
        sent[places] = whole[places]
        return sent

    def layout(self, size: int, dtype: torch.dtype) -> Mapping[str, Part]:
        most = self.count(size)
        return {
            "counts": Part(torch.int32, -(-size // STRETCH)),
            "places": Part(torch.uint16, most, exact=False),
            "values": Part(dtype, most, exact=False),
        }

    def pack(self, vector: Tensor, bound: float, ctx: NodeContext) -> Parts:  # noqa: ARG002
        values = vector.detach().contiguous().numpy()
        where = np.flatnonzero(values)
        if len(where) > self.count(len(values)):
            raise RunError(
                f"a layer below {self.name} has made {len(where)} numbers of the "
                f"{self.count(len(values))} that it chose; put that layer before it, or take "
                "compression=random-k"
            )
        stretches = -(-len(values) // STRETCH)
        counts = np.bincount(where // STRETCH, minlength=stretches).astype(np.int32)
        return {
            "counts": torch.from_numpy(counts),
            "places": torch.from_numpy((where % STRETCH).astype(np.uint16)),
            "values": torch.from_numpy(values[where]),
        }

    def unpack(self, parts: Parts, size: int, dtype: torch.dtype) -> Tensor:
        counts, places = parts["counts"].numpy(), parts["places"].numpy()
        values = parts["values"].numpy()
        total = int(counts.sum(dtype=np.int64))
        if (counts < 0).any() or total != len(places) or total != len(values):
            raise ValueError(
                f"counts of {total} coordinates, with {len(places)} places and {len(values)} values"
            )
        where = np.repeat(np.arange(len(counts), dtype=np.int64) * STRETCH, counts) + places
        if len(where) and ((np.diff(where) <= 0).any() or where[-1] >= size):
            raise ValueError(f"places that are not in order below {size}")
        out = np.zeros(size, values.dtype)
        out[where] = values
        return torch.from_numpy(out).to(dtype)
