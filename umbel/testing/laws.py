"""What all conformance checks share: how a law fails, and when two values have the same bits."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


def hold(true: bool, law: str, found: str, cure: str) -> None:
    """Fail unless a law holds.

    Raises:
        AssertionError: one sentence of the law, what was found, and what to do.
    """
    if not true:
        raise AssertionError(f"{law}, but {found}; {cure}")


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same bits: tensors, arrays, and whatever is made of them.

    Objects are the same where their attributes are. Values that only cache something
    (`functools.cached_property`, fields of dataclasses with `compare=False`) do not count. What
    cannot be looked into is compared by `==`, and by identity where that says nothing.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and _bits(one, other)
    if isinstance(one, np.ndarray):
        if one.dtype == object:
            return one.shape == other.shape and same(one.tolist(), other.tolist())
        return one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype.kind in "fc"
        )
    if isinstance(one, float):
        return one == other or (one != one and other != other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str | bytes):
        return len(one) == len(other) and all(map(same, one, other))
    if callable(one) or not hasattr(one, "__dict__"):
        return bool(one == other) or _silent(type(one))
    return same(attributes(one), attributes(other))


def _silent(kind: type[Any]) -> bool:
    """Whether `==` of this type compares identities only."""
    return not any("__eq__" in vars(base) for base in kind.__mro__ if base is not object)


def _bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(
        one.is_floating_point() and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    )


def attributes(value: object) -> dict[str, Any]:
    """An object's own attributes by name, without those that only cache something."""
    expendable = {f.name for f in fields(value) if not f.compare} if is_dataclass(value) else set()
    return {
        name: held
        for name, held in sorted(vars(value).items())
        if name not in expendable
        and not isinstance(getattr(type(value), name, None), cached_property)
    }
