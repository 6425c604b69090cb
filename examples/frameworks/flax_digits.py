"""Digits in Flax NNX: run it with `python -m umbel.examples.frameworks.flax_digits`."""

from flax import nnx

import umbel
from umbel import Dirichlet, Federation, JaxTrainer, Partitioned


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


federation = Federation(
    trainer=JaxTrainer(Net),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 0.3, "batch-size": 16, "local-epochs": 2},
    name="digits-flax",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
