"""Tasks of the tests of PyTorch's trainer."""

from typing import Any

import numpy as np
import torch
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.trainer import Job, Weights


def linear() -> nn.Module:
    return nn.Linear(6, 3)


def classes(n: int, shape: tuple[int, ...] = (6,), seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, *shape)) + y.reshape(-1, *(1,) * len(shape))
    return Examples(x.astype(np.float32), y)


def job(seed: int = 7, learning_rate: float | None = None, **options: Any) -> Job:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return Job(round=1, seed=seed, options=named, learning_rate=learning_rate)


def same(one: Weights, other: Weights) -> bool:
    pairs = [(one.parameters, other.parameters), (one.buffers, other.buffers)]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


def close(one: Weights, other: Weights, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for name, value in one.parameters.items():
        torch.testing.assert_close(value, other.parameters[name], rtol=rtol, atol=atol)


# --- seeds
