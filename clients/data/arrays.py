"""What a node's examples may be made of: plain numbers, whatever library holds them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients.data.examples import ArrayLike
from umbel.core.errors import ConfigError, described


def plain_array(values: Any, what: str) -> ArrayLike:
    """`values` as a tensor (as it is, but dense and without a graph) or an array of numbers.

    Args:
        values: a tensor, an array, or anything that NumPy makes an array of.
        what: "inputs" or "targets".

    Raises:
        ConfigError: they are not numbers, or some are masked.
    """
    if isinstance(values, Tensor):
        dense = values.to_dense() if values.layout != torch.strided else values
        return dense.detach()
    if isinstance(values, np.ma.MaskedArray):
        raise ConfigError(
            f"the {what} of a node are a masked array, and a model would see what is under the "
            "mask; give values.filled(number), or leave those examples out"
        )
    if hasattr(values, "toarray") and hasattr(values, "nnz"):  # SciPy's sparse arrays
        values = values.toarray()
    try:
        array = values if isinstance(values, np.ndarray) else np.asarray(values)
    except Exception as error:
        raise ConfigError(
            f"no array can be made of the {what} of a node: {described(error)}; are the rows "
            "unequal?"
        ) from error
    if array.dtype.kind not in "biufc":
        raise ConfigError(_not_numbers(array, what))
    return array


def _not_numbers(array: np.ndarray[Any, Any], what: str) -> str:
    """Why an array of this type is none of numbers."""
    first = next(iter(array.flat), None) if array.dtype.kind in "OUSV" else None
    said = f"the {what} of a node hold values of type {array.dtype}"
    if isinstance(first, str | bytes):
        cure = (
            "number the classes, in the same order on every node: "
            "y = np.searchsorted(sorted_names, names)"
            if what == "targets"
            else "give numbers"
        )
        return f"{said}, such as {first[:40]!r}; {cure}"
    if array.dtype.kind == "O":
        lengths = {len(row) for row in array.flat if hasattr(row, "__len__")}
        if len(lengths) > 1:
            return f"{said}: the rows are unequal; pad or crop them to one shape"
        return f"{said}; give numbers, without None"
    return f"{said}; give numbers"


def not_a_number(examples: Any) -> str:
    """Where the first number is that is none: `inputs, row 3, column 2`; empty if nowhere."""
    for what in ("x", "y"):
        values = getattr(examples, what, None)
        if isinstance(examples, tuple) and len(examples) == 2:
            values = examples["xy".index(what)]
        if not isinstance(values, Tensor | np.ndarray):
            continue
        array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
        if array.dtype.kind not in "fc":
            continue
        places = np.argwhere(~np.isfinite(array))
        if len(places):
            return _place(array, places, "inputs" if what == "x" else "targets")
    return ""


def _place(array: np.ndarray[Any, Any], places: np.ndarray[Any, Any], what: str) -> str:
    row, *rest = places[0].tolist()
    word = "NaN" if np.isnan(array[tuple(places[0])]) else "infinity"
    column = ""
    if len(rest) == 1:
        column = f", column {rest[0]}"
    elif rest:
        column = f", place {tuple(rest)}"
    count = len(places)
    more = f", and {count - 1:,} more" if count > 1 else ""
    return f"{word} in the data: {what}, row {row}{column}{more}"
