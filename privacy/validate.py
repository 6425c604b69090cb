"""Checks by keyword: each says the name, the value and the cure in one sentence.

    positive(norm=norm)        raises ValueError: norm must be a finite number above 0, ...

A value is returned as a float (or int), so that a check can stand where the value is used.
"""

import math
from numbers import Integral, Real

Number = int | float


def _only(named: dict[str, Number]) -> tuple[str, Number]:
    if len(named) != 1:
        raise TypeError(f"a validator takes one keyword, not {len(named)}")
    name, value = next(iter(named.items()))
    return name.replace("_", "-"), value


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def positive(**named: Number) -> float:
    """A finite number above 0.

    Raises:
        ValueError: it is not.
    """
    name, value = _only(named)
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, but it is {value!r}")
    return float(value)


def nonnegative(**named: Number) -> float:
    """A finite number that is 0 or more.

    Raises:
        ValueError: it is not.
    """
    name, value = _only(named)
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of 0 or more, but it is {value!r}")
    return float(value)


def fraction(**named: Number) -> float:
    """A number above 0 and at most 1, such as a sampling rate.

    Raises:
        ValueError: it is not.
    """
    name, value = _only(named)
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, but it is {value!r}")
    return float(value)


def inside_unit(**named: Number) -> float:
    """A number strictly between 0 and 1, such as delta or a quantile.

    Raises:
        ValueError: it is not.
    """
    name, value = _only(named)
    if not _is_number(value) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, but it is {value!r}")
    return float(value)


def count(**named: Number) -> int:
    """A whole number of 1 or more.

    Raises:
        ValueError: it is not.
    """
    name, value = _only(named)
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, but it is {value!r}")
    return int(value)
