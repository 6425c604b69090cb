"""The one place where tensors become Flower records and records become tensors.

A model travels as one flat vector and a manifest that both sides hold. `numpy.save` bytes are
what Flower's `Array` stores; they are written with one copy and read with none.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from umbel.core.held import Held, HeldArray, array_of, buffer_of
from umbel.core.npy import STYPE, header_of, values_in

Tree = dict[str, Tensor]


@dataclass(frozen=True)
class Manifest:
    """Names, shapes and dtypes of a flat vector's tensors, in order.

    A complex number is two coordinates of the vector, its real and its imaginary part.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tree: Mapping[str, Tensor]) -> "Manifest":
        """The manifest of a tree of tensors."""
        return cls(
            tuple(tree),
            tuple(tuple(tensor.shape) for tensor in tree.values()),
            tuple(tensor.dtype for tensor in tree.values()),
        )

    @cached_property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(self._sizes)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Coordinates of each tensor."""
        each = zip(self.shapes, self.dtypes, strict=True)
        return tuple(prod(shape) * (2 if dtype.is_complex else 1) for shape, dtype in each)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The vector's dtype: float64 if any tensor needs it, else float32."""
        wide = torch.float64 in self.dtypes or torch.complex128 in self.dtypes
        return torch.float64 if wide else torch.float32

    @cached_property
    def digest(self) -> str:
        """A short hash that two sides compare before they trust a vector's layout."""
        text = json.dumps([self.names, self.shapes, [str(dtype) for dtype in self.dtypes]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """The tree as a new vector of shape (size,); one copy."""
        vector = torch.empty(self.size, dtype=self.dtype)
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self._sizes, strict=True):
            stop, value = start + size, tree[name].detach()
            if value.is_complex():
                vector[start:stop].view(*shape, 2).copy_(torch.view_as_real(value.resolve_conj()))
            else:
                vector[start:stop].view(shape).copy_(value)
            start = stop
        return vector

    def unflatten(self, vector: Tensor) -> Tree:
        """The vector as named tensors: views where the dtype is the vector's own."""
        tree: Tree = {}
        start = 0
        kinds = zip(self.names, self.shapes, self.dtypes, self._sizes, strict=True)
        for name, shape, dtype, size in kinds:
            stop = start + size
            if dtype.is_complex:
                pairs = vector[start:stop].view(*shape, 2).to(dtype.to_real())
                odd = pairs.storage_offset() % 2  # no address of a complex number
                tree[name] = torch.view_as_complex(pairs.clone() if odd else pairs)
            else:
                tree[name] = vector[start:stop].view(shape).to(dtype)
            start = stop
        return tree


def to_array(vector: Tensor, hold: Callable[[Sequence[Any]], Held] | None = None) -> Array:
    """A tensor as a Flower `Array`; its bytes are copied once. bfloat16 travels as float32.

    Args:
        vector: the tensor.
        hold: puts what it is given, in parts, where the array's bytes shall lie; they are the
            array's own if None.
    """
    if vector.dtype == torch.bfloat16:  # numpy has no such type
        vector = vector.float()
    values = vector.detach().cpu().contiguous().numpy()
    parts = (header_of(values.dtype.str, values.shape), values.reshape(-1).data.cast("B"))
    name = _name_of(values.dtype)
    if hold is None:
        return array_of(name, values.shape, STYPE, b"".join(parts))
    return HeldArray(name, values.shape, STYPE, hold(parts))


def record_of(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of these very arrays; Flower's own way to make one makes each array anew."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def kept_array(tensor: Tensor) -> Array:
    """A tensor of any dtype as an `Array`, for whoever knows its dtype and shape.

    Complex and 8-bit floating-point numbers, which messages do not carry, go as their bytes.
    """
    if _as_bytes(tensor.dtype):
        return to_array(_bytes_of(tensor))
    return to_array(tensor)


def from_kept(array: Array, like: Tensor) -> Tensor:
    """What `kept_array` was given: a tensor of the dtype and shape of `like`.

    Raises:
        ValueError: the bytes are of something else.
    """
    value = from_array(array)
    if not _as_bytes(like.dtype):
        return value.to(like.dtype)
    if value.dtype != torch.uint8 or value.numel() != like.numel() * like.element_size():
        raise ValueError(f"{value.numel()} bytes are no {like.dtype} of {tuple(like.shape)}")
    return value.clone().view(like.dtype).reshape(like.shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes; NaN is like itself."""
    return one.dtype == other.dtype and torch.equal(_bytes_of(one), _bytes_of(other))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _as_bytes(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1)


def from_array(array: Array) -> Tensor:
    """A Flower `Array` as a tensor over the array's own bytes: no copy, never write to it.

    Raises:
        ValueError: the bytes are not those of a plain numeric array.
    """
    values = values_in(buffer_of(array), array.stype)
    if values.size == 0:
        return torch.from_numpy(values.copy())
    return torch.from_numpy(np.asarray(_Writable(values)))


class _Writable:
    """A view that calls itself writable, because torch warns about read-only memory."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        interface = dict(values.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.keep_alive = values


_name_of: Callable[[np.dtype[Any]], str] = lru_cache(maxsize=256)(str)
"""A dtype's name, which NumPy puts together every time that it is asked."""
