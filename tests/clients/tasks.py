"""Tasks of the tests of PyTorch's trainer."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.loop import Share
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Trained, Weights


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


class Counting(TorchTrainer):
    """Keeps in its memory how often this node was trained, and learns at that rate."""

    def train_share(self, weights: Weights, examples: Any, job: Job, share: Share) -> Trained:
        before = job.memory.get("own")
        times = int(before["n"]) + 1 if isinstance(before, MetricRecord) else 1  # type: ignore[arg-type]
        job.memory["own"] = MetricRecord({"n": times})
        rate = 0.1 * times
        return super().train_share(weights, examples, replace(job, learning_rate=rate), share)
