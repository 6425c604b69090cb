"""How an update is written down where it does not travel as one dense vector.

    node     layers, list order -> one vector -> pack    -> named parts
    server   named parts -> unpack -> one vector         -> the aggregator

One layer of a stack may say how (`Packs`): it stands where its other half belongs, for example
first, above what clips, and packs what comes out at the bottom of the stack. Rules, bounds and
noise see the vector that is unpacked, so they hold for what really arrived.

Every part has a type and a largest length, known to both sides before any reply comes. Whatever is
longer, missing, or of another type is refused by name before it is unfolded, and that node alone
is out of the round.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from umbel.core.names import BUFFERS, UPDATE
from umbel.core.records import from_array
from umbel.privacy.noise.lattice import round_to_zero
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts

Parts = Mapping[str, Tensor]
"""What travels of one update: vectors by name."""

TAIL = "tail"
"""The part for what layers below have put behind the packed coordinates; it travels as it is."""

SHRINK = 1 - 2.0**-22
"""What is scaled to this much of a bound stays within it after rounding to float32."""


@dataclass(frozen=True)
class Part:
    """What is known of a part before it comes.

    Attributes:
        dtype: of its numbers.
        most: the largest length.
        exact: whether it has just that length.
    """

    dtype: torch.dtype
    most: int
    exact: bool = True


@runtime_checkable
class Packs(Protocol):
    """A layer that writes updates down in fewer bytes."""

    @property
    def name(self) -> str:
        """The layer's name."""
        ...

    @property
    def keeps_shape(self) -> bool:
        """Whether layers below must leave zeros and equal values as they are, to be packed."""
        ...

    def layout(self, size: int, dtype: torch.dtype) -> Mapping[str, Part]:
        """The parts that `size` coordinates of a type travel in."""
        ...

    def pack(self, vector: Tensor, bound: float, ctx: NodeContext) -> Parts:
        """Node: a vector of shape (size,) as parts.

        Args:
            vector: from the bottom of the stack; not to be changed.
            bound: what `unpack` gives must not be longer; infinity is no bound.
            ctx: of this layer.
        """
        ...

    def unpack(self, parts: Parts, size: int, dtype: torch.dtype) -> Tensor:
        """Server: parts of a right `layout` as a vector of shape (size,).

        Raises:
            ValueError: their values cannot be of any update; what is wrong.
        """
        ...


@dataclass(frozen=True)
class Packing:
    """What a server knows of the payloads of a round.

    Attributes:
        layer: unpacks them.
        covers: coordinates, from the first, that it packs.
        behind: coordinates after them, which travel as they are.
    """

    layer: Packs
    covers: int
    behind: int

    def read(self, record: ArrayRecord, dtype: torch.dtype, facts: Facts) -> tuple[Tensor, int]:
        """A reply's update and its size in bytes.

        Args:
            record: of the reply.
            dtype: of the model.
            facts: at the bottom of the stack; the update is put on their grid.

        Raises:
            ValueError: what is wrong with it.
        """
        layout = dict(self.layer.layout(self.covers, dtype))
        if self.behind:
            layout[TAIL] = Part(dtype, self.behind)
        names = {f"{UPDATE}.{name}" for name in layout}
        found = set(record) - {BUFFERS}
        if found != names:
            raise ValueError(
                f"an update of {', '.join(map(repr, sorted(found))) or 'nothing'}, but "
                f"{self.layer.name} is made of {', '.join(map(repr, sorted(names)))}"
            )
        parts = {
            name: _checked(from_array(record[f"{UPDATE}.{name}"]), name, part)
            for name, part in layout.items()
        }
        size = sum(part.numel() * part.element_size() for part in parts.values())
        vector = self.layer.unpack(parts, self.covers, dtype)
        if facts.grid is not None:  # never longer, so bounds hold
            vector = round_to_zero(vector, facts.grid)
        return (torch.cat([vector, parts[TAIL]]) if self.behind else vector), size


def packed(layer: Packs, vector: Tensor, covers: int, bound: float, ctx: NodeContext) -> Parts:
    """Node: a vector from the bottom of the stack as the parts that travel, by their whole names.

    Args:
        layer: packs.
        vector: shape (size,).
        covers: coordinates that it packs; those behind travel as they are.
        bound: of the whole vector; infinity is none.
        ctx: of the layer.
    """
    tail = vector[covers:]
    rest = math.sqrt(max(0.0, bound**2 - float(tail.double().square().sum())))
    parts = dict(layer.pack(vector[:covers], rest, ctx))
    if tail.numel():
        parts[TAIL] = tail
    return {f"{UPDATE}.{name}": part for name, part in parts.items()}


def _checked(tensor: Tensor, name: str, part: Part) -> Tensor:
    if tensor.dtype != part.dtype or tensor.dim() != 1:
        raise ValueError(
            f"the part {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not "
            f"{part.dtype} of one dimension"
        )
    if tensor.numel() > part.most or (part.exact and tensor.numel() != part.most):
        raise ValueError(
            f"the part {name!r} has {tensor.numel()} numbers, not "
            f"{'' if part.exact else 'up to '}{part.most}"
        )
    return tensor
