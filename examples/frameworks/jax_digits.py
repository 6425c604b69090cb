"""Digits in JAX: run it with `python -m umbel.examples.frameworks.jax_digits`."""

import jax
import jax.numpy as jnp

import umbel
from umbel import Dirichlet, Federation, JaxTrainer, Partitioned


def init(key):
    first, last = jax.random.split(key)
    return {
        "first": {"w": 0.2 * jax.random.normal(first, (64, 32)), "b": jnp.zeros(32)},
        "last": {"w": 0.2 * jax.random.normal(last, (32, 10)), "b": jnp.zeros(10)},
    }


def apply(params, x):
    hidden = jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["last"]["w"] + params["last"]["b"]


federation = Federation(
    trainer=JaxTrainer(init, apply),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 0.3, "batch-size": 16, "local-epochs": 2},
    name="digits-jax",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
