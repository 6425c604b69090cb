"""Digits in NumPy: run it with `python -m umbel.examples.frameworks.numpy_digits`."""

import numpy as np

import umbel
from umbel import Dirichlet, Federation, FunctionTrainer, Partitioned


def shares(arrays, x):
    scores = np.exp(x @ arrays["w"] + arrays["b"])
    return scores / scores.sum(1, keepdims=True)


def train(arrays, examples, job):
    x, y = np.asarray(examples.x), np.asarray(examples.y)
    for _ in range(job.options["local-epochs"]):
        error = (shares(arrays, x) - np.eye(10)[y]) / len(y)
        arrays["w"] -= job.learning_rate * x.T @ error
        arrays["b"] -= job.learning_rate * error.sum(0)
    return arrays, len(y), {}


def evaluate(arrays, examples):
    return {"accuracy": float((shares(arrays, examples.x).argmax(1) == examples.y).mean())}


federation = Federation(
    trainer=FunctionTrainer(
        lambda _: {"w": np.zeros((64, 10)), "b": np.zeros(10)}, train, evaluate
    ),
    data=Partitioned("digits", Dirichlet(alpha=1.0)),
    options={"rounds": 10, "learning-rate": 1.0, "local-epochs": 10},
    name="digits-numpy",
)

if __name__ == "__main__":
    print(umbel.run(federation)["metrics"])
