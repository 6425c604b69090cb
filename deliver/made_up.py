"""Inputs that nobody has: of the right shape and type, to try a model with."""

from typing import Any

import numpy as np

from umbel.clients.data.inputs import Inputs

Array = np.ndarray[Any, Any]


def example_of(inputs: Inputs, count: int = 2) -> Array:
    """Made-up inputs of the right shape and type, the same ones each time."""
    shape = (count, *inputs.shape)
    if inputs.model_dtype == "int64":
        return np.zeros(shape, np.int64)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
