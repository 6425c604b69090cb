"""How an update is written down where it does not travel as one dense vector.

    node     layers, list order -> one vector -> pack    -> named parts
    server   named parts -> unpack -> one vector         -> the aggregator

One layer of a stack may say how (`Packs`): it stands where its other half belongs, for example
first, above what clips, and packs what comes out at the bottom of the stack. Rules, bounds and
noise see the vector that is unpacked, so they hold for what really arrived.

Every part has a type and a largest length, known to both sides before any reply comes. Whatever is
longer, missing, or of another type is refused by name before it is unfolded, and that node alone
is out of the round.

Bytes that are not evenly spread, such as those of few bits a coordinate, travel entropy coded, in a
part whose name ends in `.deflate` (RFC 1951 in a zlib stream, Huffman codes only). Whether that
pays is measured on a sample of each part. No more is unfolded than the part may have.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
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

DEFLATE = ".deflate"
"""How the name of a part ends that is entropy coded."""

SAMPLE = 1 << 16
"""Bytes on which it is tried whether coding pays."""

PAYS = 0.9
"""A part is coded if that takes less than this of its bytes: what is saved of more is hardly worth
the time."""

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
        coded = {name for name in found if name.removesuffix(DEFLATE) in names - found}
        if {name.removesuffix(DEFLATE) for name in coded} | (found - coded) != names:
            raise ValueError(
                f"an update of {', '.join(map(repr, sorted(found))) or 'nothing'}, but "
                f"{self.layer.name} is made of {', '.join(map(repr, sorted(names)))}"
            )
        size, parts = 0, {}
        for name, part in layout.items():
            whole = f"{UPDATE}.{name}"
            tensor = from_array(record[whole + DEFLATE if whole + DEFLATE in coded else whole])
            size += tensor.numel() * tensor.element_size()
            if whole + DEFLATE in coded:
                tensor = _inflated(tensor, name, part)
            parts[name] = _checked(tensor, name, part)
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
    return dict(_written(f"{UPDATE}.{name}", part) for name, part in parts.items())


def _written(name: str, part: Tensor) -> tuple[str, Tensor]:
    """A part as it travels, by its name: entropy coded where that pays."""
    if part.dtype != torch.uint8:
        return name, part
    data = part.numpy()
    middle = max(0, (data.size - SAMPLE) // 2)
    sample = data[middle : middle + SAMPLE]
    if len(_deflated(sample)) >= PAYS * sample.size:
        return name, part
    coded = _deflated(data)
    if len(coded) >= data.size:  # the sample was not like the rest
        return name, part
    return name + DEFLATE, torch.from_numpy(np.frombuffer(coded, np.uint8).copy())


def _deflated(data: np.ndarray[Any, Any]) -> bytes:
    """Huffman codes alone: numbers that were rounded at random hardly repeat each other."""
    coder = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.data) + coder.flush()


def _inflated(tensor: Tensor, name: str, part: Part) -> Tensor:
    """What a part was before it was coded; no more is unfolded than the part may have."""
    _checked(tensor, name + DEFLATE, Part(torch.uint8, part.most, exact=False))
    if part.dtype != torch.uint8:
        raise ValueError(f"the part {name!r} is entropy coded, which only bytes are")
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(tensor.numpy().data, part.most + 1)
    except zlib.error as error:
        raise ValueError(f"the part {name!r} cannot be unfolded: {error}") from error
    if not decoder.eof or decoder.unused_data:
        raise ValueError(
            f"the part {name!r} is not what it says: its code does not end after {part.most} bytes"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


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
