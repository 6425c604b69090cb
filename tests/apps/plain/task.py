"""Least squares on data that a node makes from its partition."""

import numpy as np


def data(partition):
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(20 + 5 * partition, 4)).astype(np.float32)
    return x, x @ np.arange(4, dtype=np.float32)


def step(w, x, y, rate):
    return (w - rate * x.T @ (x @ w - y) / len(y)).astype(np.float32)
