# ruff: noqa: ARG002
"""A NumPyClient, as tutorials of 2024 wrote it."""

import numpy as np
from flwr.client import ClientApp, NumPyClient


class Client(NumPyClient):
    def __init__(self, partition):
        rng = np.random.default_rng(partition)
        self.x = rng.normal(size=(30, 4)).astype(np.float32)
        self.y = self.x @ np.arange(4, dtype=np.float32)

    def get_parameters(self, config):
        return [np.zeros(4, np.float32)]

    def fit(self, parameters, config):
        (w,) = parameters
        for _ in range(20):
            w = w - 0.2 * self.x.T @ (self.x @ w - self.y) / len(self.y)
        return [w.astype(np.float32)], len(self.y), {}

    def evaluate(self, parameters, config):
        loss = float(((self.x @ parameters[0] - self.y) ** 2).mean())
        return loss, len(self.y), {"distance": loss**0.5}


def client_fn(context):
    return Client(int(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn=client_fn)
