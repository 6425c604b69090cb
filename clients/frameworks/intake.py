"""A node's examples as NumPy batches, and outputs judged, alike for all frameworks.

What may be an example, what is refused and with which sentence, how pixels are scaled, and how
losses and metrics of an evaluation are computed is the same as for PyTorch: see
`umbel.clients.pytorch.batches` and `umbel.clients.pytorch.losses`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients.pytorch.batches import Source, open_source, to_model
from umbel.clients.pytorch.losses import MetricAccumulator, Objective
from umbel.clients.pytorch.rows import first_shape
from umbel.core.errors import ConfigError, UmbelError, described

Array = np.ndarray[Any, Any]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batches:
    """A node's examples, batch by batch.

    Attributes:
        source: where they come from.
        objective: whose targets they are.
    """

    source: Source
    objective: Objective

    @classmethod
    def of(cls, examples: Any, objective: Objective, target: str = "") -> "Batches":
        """Open what a node's `data` function returned.

        Raises:
            ConfigError: it is nothing to train on, or empty.
        """
        return cls(open_source(examples, _CPU, target), objective)

    @property
    def size(self) -> int:
        return self.source.size

    def take(self, rows: Tensor | None) -> tuple[Any, Tensor]:
        """Inputs and targets of these rows, or of all.

        Returns:
            Inputs as arrays (float32; int32 for whole numbers), in a list or a dict where the
            model has several; targets as the objective takes them, a tensor.
        """
        x, y = self.source.batch(rows)
        return arrays(to_model(x, _CPU, torch.float32)), self.objective.prepare(y)


def arrays(value: Any) -> Any:
    """Tensors as arrays of 32 bits, item by item.

    Raises:
        ConfigError: a whole number that 32 bits do not hold.
    """
    if isinstance(value, Mapping):
        return {name: arrays(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [arrays(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.int64:
        if value.numel() and not -(1 << 31) <= int(value.min()) <= int(value.max()) < 1 << 31:
            raise ConfigError(
                f"the examples hold whole numbers up to {int(value.abs().max())}, and the model "
                "computes with 32 bits; number them from 0, or make real numbers of them"
            )
        value = value.to(torch.int32)
    return value.numpy()


def padded(value: Any, size: int) -> Any:
    """Arrays with their first row repeated up to `size` rows; item by item."""
    if isinstance(value, Mapping):
        return {name: padded(item, size) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [padded(item, size) for item in value]
    lacking = size - len(value)
    if lacking <= 0:
        return value
    return np.concatenate([value, np.broadcast_to(value[:1], (lacking, *value.shape[1:]))])


def check_labels(targets: Tensor, classes: int) -> None:
    """Raises:
    ConfigError: a label that the model has no output for.
    """
    if targets.is_floating_point() or not targets.numel():
        return
    largest = int(targets.max())
    if largest >= classes:
        raise ConfigError(
            f"the targets do not fit the model's outputs (label {largest} of {classes} classes); "
            "class labels go from 0 to the number of outputs less 1"
        )


def failed(error: Exception, x: Any, y: Any) -> UmbelError:
    """A framework's complaint about a batch as a sentence."""
    if isinstance(error, UmbelError):
        return error
    shapes = f"inputs {first_shape(tensors(x))} and targets {first_shape(tensors(y))}"
    return ConfigError(f"the model or its loss fails on a batch with {shapes}: {described(error)}")


def tensors(value: Any) -> Any:
    """Arrays as tensors, item by item."""
    if isinstance(value, Mapping):
        return {name: tensors(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [tensors(item) for item in value]
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def judged(
    batches: Batches,
    outputs_of: Callable[[Any], Array],
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None,
    *,
    whole: bool,
    size: int,
) -> tuple[int, dict[str, float], dict[str, int]]:
    """Loss and metrics of a model on examples.

    Args:
        batches: the examples.
        outputs_of: inputs of a batch to outputs.
        metrics: the user's own, of arrays of outputs and targets.
        whole: whether these see everything at once.
        size: examples in a batch.

    Returns:
        The number of examples, the metrics, and of those that only some have, how many.
    """
    own = None if metrics is None else _of_arrays(metrics)
    tally = MetricAccumulator(batches.objective, own, whole)
    for start in range(0, batches.size, size):
        rows = torch.arange(start, min(start + size, batches.size))
        x, y = batches.take(None if len(rows) == batches.size else rows)
        outputs = torch.from_numpy(np.array(outputs_of(x)))
        if batches.objective.targets == "class" and isinstance(y, Tensor):
            check_labels(y, outputs.shape[-1])
            if outputs.ndim > 3 and outputs.shape[:-1] == y.shape:  # the last axis is the classes'
                outputs = outputs.movedim(-1, 1)
        tally.add(outputs, y, len(rows))
    return tally.examples, *tally.result()


def _of_arrays(
    metrics: Callable[[Any, Any], Mapping[str, Any]],
) -> Callable[[Any, Any], Mapping[str, Any]]:
    def given(outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        return metrics(outputs.numpy(), targets.numpy())

    return given
