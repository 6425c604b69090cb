"""The same linear model, data, order of batches and plain SGD, in the framework that is named.

    python linear_model.py FRAMEWORK OUT [OPTION=VALUE ...]

writes the federated model's weight (64, 10) and bias (10,) to OUT. Keras has one backend a process,
so each framework runs in its own.
"""

import os
import sys
from pathlib import Path
from typing import Any

if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # Keras would load it all the same

import numpy as np

import umbel
from umbel.clients.local_settings import LocalSettings
from umbel.clients.pytorch.batches import plan
from umbel.server.output.progress import SilentProgress
from umbel.strategies.methods.scaffold import Scaffold

OPTIONS = {"rounds": 3, "learning-rate": 0.2, "batch-size": 16, "local-epochs": 2, "seed": 3}


def torch_trainer() -> Any:
    from torch import nn

    def net() -> nn.Module:
        module = nn.Linear(64, 10)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        return module

    return umbel.TorchTrainer(net)


def keras_trainer() -> Any:
    def net() -> Any:
        import keras

        last = keras.layers.Dense(10, kernel_initializer="zeros")
        return keras.Sequential([keras.Input((64,)), last])

    return umbel.KerasTrainer(net)


def jax_trainer() -> Any:
    import jax.numpy as jnp

    def init(key: Any) -> Any:  # noqa: ARG001 - it starts from zero
        return {"weight": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}

    return umbel.JaxTrainer(init, lambda params, x: x @ params["weight"] + params["bias"])


def numpy_trainer() -> Any:
    def initial(_: Any) -> Any:
        return {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}

    def train(arrays: Any, examples: Any, job: Any) -> Any:
        x, y = np.asarray(examples.x), np.asarray(examples.y)
        options = job.options
        settings = LocalSettings(
            batch_size=options["batch-size"], local_epochs=options["local-epochs"]
        )
        for rows in plan(len(y), settings, job.seed):
            at = np.arange(len(y)) if rows is None else rows.numpy()
            scores = x[at] @ arrays["weight"] + arrays["bias"]
            scores = np.exp(scores - scores.max(1, keepdims=True))
            error = scores / scores.sum(1, keepdims=True) - np.eye(10, dtype=np.float32)[y[at]]
            arrays["weight"] -= job.learning_rate * x[at].T @ error / len(at)
            arrays["bias"] -= job.learning_rate * error.mean(0)
        return arrays, len(y), {}

    options = {"learning-rate": 0.1, "batch-size": 32, "local-epochs": 1}
    return umbel.FunctionTrainer(initial, train, options=options)


TRAINERS = {
    "torch": torch_trainer,
    "keras": keras_trainer,
    "jax": jax_trainer,
    "numpy": numpy_trainer,
}


def main(framework: str, out: Path, changes: dict[str, Any]) -> None:
    stack = umbel.Stack([Scaffold()] if changes.pop("scaffold", False) else [])
    federation = umbel.Federation(
        trainer=TRAINERS[framework](),
        data=umbel.Partitioned("digits", umbel.Dirichlet(alpha=1.0)),
        options=OPTIONS,
        stack=stack,
    )
    folder = out.with_suffix(".run")
    result = umbel.run(federation, options=changes, nodes=5, out=folder, progress=SilentProgress())
    from safetensors.numpy import load_file

    found = load_file(result.path / "model.safetensors")
    matrix = next(value for value in found.values() if value.ndim == 2)
    bias = next(value for value in found.values() if value.ndim == 1)
    np.savez(out, weight=matrix if matrix.shape == (64, 10) else matrix.T, bias=bias)


def value_of(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[3:])
    main(sys.argv[1], Path(sys.argv[2]), {n: value_of(v) for n, v in given.items()})
