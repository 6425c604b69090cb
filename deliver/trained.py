"""A trained model as the commands of this room take it: weights, and everything about them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umbel.clients.data.examples import Examples
from umbel.clients.data.features import Rows
from umbel.clients.data.inputs import Inputs, Plain
from umbel.clients.pytorch.batches import open_source, to_model
from umbel.clients.trainers.base import Trainer, Weights
from umbel.clients.trainers.exported import Exported, exported_by
from umbel.core.errors import ConfigError, described
from umbel.core.options import Options
from umbel.deliver.made_up import example_of
from umbel.deliver.signature import Signature
from umbel.server.output.rundir import RunDirectory

Array = np.ndarray[Any, Any]
BATCH = 512


@dataclass(frozen=True)
class HeldOut:
    """Examples that the model was not trained on, as it takes them.

    Attributes:
        x: shape (n, ...), float32 or int64.
        y: shape (n, ...).
    """

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Any) -> "HeldOut":
        """The examples at `rows`."""
        return HeldOut(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class TrainedModel:
    """What a run ended with.

    Attributes:
        name: of the app.
        run: its directory.
        trainer: that trained it.
        weights: the final ones.
        options: of the run.
        inputs: how what people have becomes what the model takes; None where nobody said.
        labels: names of the classes.
        examples: held-out ones as the app gives them; None where it has none.
    """

    name: str
    run: RunDirectory
    trainer: Trainer
    weights: Weights
    options: Options
    inputs: Inputs | None = None
    labels: tuple[str, ...] = ()
    examples: Any = None

    def exported(self) -> Exported:
        """The model as a module.

        Raises:
            ConfigError: its trainer has none.
        """
        return exported_by(self.trainer, self.weights, self.options)

    def held_out(self) -> HeldOut | None:
        """The held-out examples as the model takes them.

        Raises:
            ConfigError: an example is more than one array.
        """
        if self.examples is None:
            return None
        x = self.examples.x if isinstance(self.examples, Examples) else None
        if isinstance(x, Rows):
            return HeldOut(x.tensor().float().numpy(), np.asarray(self.examples.y))
        inputs, targets = open_source(self.examples, torch.device("cpu")).batch(None)
        made = to_model(inputs, torch.device("cpu"), torch.float32)
        if not isinstance(made, Tensor) or not isinstance(targets, Tensor):
            raise ConfigError(
                f"the model {self.name} takes several arrays for an example, and only models of "
                "one can be delivered as a graph; export it with --to safetensors"
            )
        return HeldOut(made.numpy(), targets.numpy())

    def described(self, module: nn.Module, output: str) -> Signature:
        """The signature of a module that stands for this model.

        Raises:
            ConfigError: nobody says what it takes, or what is said does not fit.
        """
        held_out = self.held_out()
        inputs = self._inputs(held_out)
        x = torch.from_numpy(example_of(inputs) if held_out is None else held_out.x[:2])
        try:
            with torch.no_grad():
                y = module(x)
        except Exception as error:
            raise ConfigError(
                f"the model {self.name} does not take inputs of the shape "
                f"{tuple(x.shape[1:])} that its signature says: {described(error, longest=200)}; "
                "correct Federation(inputs=...)"
            ) from error
        if not isinstance(y, Tensor):
            raise ConfigError(
                f"the model {self.name} returns a {type(y).__name__}, and only models that return "
                "one tensor can be delivered as a graph; export it with --to safetensors"
            )
        size = int(np.prod(y.shape[1:], dtype=np.int64))
        fits = self.labels and output != "number" and len(self.labels) == max(size, 2)
        return Signature(self.name, inputs, output, size, self.labels if fits else ())

    def _inputs(self, held_out: HeldOut | None) -> Inputs:
        if held_out is None and self.inputs is None:
            raise ConfigError(
                f"the model {self.name} has no signature: the app says nothing about its inputs "
                "and has no held-out examples that would show them; give "
                "Federation(inputs=umbel.Columns(...)), or another kind of inputs"
            )
        if held_out is None:
            return self.inputs  # type: ignore[return-value]  # one of both is there
        shape = tuple(held_out.x.shape[1:])
        if self.inputs is None:
            own = self.examples.x if isinstance(self.examples, Examples) else held_out.x
            pixels = str(own.dtype).removeprefix("torch.") == "uint8"
            return Plain(shape, "uint8" if pixels else str(held_out.x.dtype))
        if self.inputs.shape != shape:
            raise ConfigError(
                f"the inputs of {self.name} are said to have the shape {self.inputs.shape}, but "
                f"its held-out examples have {shape}; correct Federation(inputs=...)"
            )
        return self.inputs

    def with_weights(self, weights: Weights) -> "TrainedModel":
        """The same model with other weights."""
        return replace(self, weights=weights)


def outputs_of(module: nn.Module, x: Array) -> Array:
    """What a module gives for inputs of shape (n, ...), in batches."""
    with torch.no_grad():
        parts = [
            module(torch.from_numpy(x[start : start + BATCH])) for start in range(0, len(x), BATCH)
        ]
    found: Array = torch.cat(parts).numpy()
    return found
