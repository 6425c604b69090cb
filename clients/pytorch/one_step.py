"""One gradient step a node a round, and many nodes' steps at once.

A node whose whole training is one step on a few examples sends -rate x its mean gradient. For
thousands of such nodes in one process, each node's gradient comes out of one forward and one
backward pass over all their examples (`umbel.privacy.bounds.ghost`); each is clipped by itself
afterwards, as it would be alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from umbel.clients.data.examples import Examples, each_of
from umbel.clients.data.features import Rows
from umbel.clients.pytorch.batches import to_device, to_model
from umbel.clients.pytorch.intake import opened
from umbel.clients.pytorch.loop import explained
from umbel.clients.pytorch.settings import choose_device
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Tree, Weights
from umbel.clients.trainers.exported import Exported
from umbel.core.errors import ConfigError
from umbel.privacy.bounds.bundle import Vectors
from umbel.privacy.bounds.ghost import PerExample

PIECE = 64
"""Examples at a time: their gradients stay in the cache until they are added up."""


@dataclass(frozen=True)
class OneStep:
    """One step of SGD on the mean loss of all the node's examples.

    Attributes:
        trainer: the model, its loss and its metrics; of its settings only the learning rate
            counts.

    Raises:
        ConfigError: the loss has no value for each example.
    """

    trainer: TorchTrainer
    USE: ClassVar[str] = TorchTrainer.USE
    OPTIONS: Mapping[str, bool | int | float | str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "OPTIONS", {"learning-rate": self.trainer.learning_rate})
        if self.trainer.objective.each is None:
            raise ConfigError(
                f"OneStep needs a loss for each example, and {self.trainer.objective.name} gives "
                "only their mean; use cross-entropy, binary-cross-entropy or mse"
            )

    def starting_from(self, module: torch.nn.Module) -> Self:
        """A trainer like this one whose first model is a copy of `module`."""
        return replace(self, trainer=self.trainer.starting_from(module))

    def initial(self, options: Options, seed: int) -> Weights:
        return self.trainer.initial(options, seed)

    def ready(self, weights: Weights, options: Options) -> torch.nn.Module:
        """The trained module."""
        return self.trainer.ready(weights, options)

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The trained module for other formats."""
        return self.trainer.exported(weights, options)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        return self.trainer.evaluate(weights, _read(examples), options)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """One step; `weights` is not mutated.

        Raises:
            ConfigError: a node without examples, or a model that mixes the examples of a batch.
        """
        total, count = torch.zeros(_size(weights.parameters)), len(examples)
        if count == 0:
            raise ConfigError("a node has no examples; every node needs at least one")
        for steps in self._steps(weights, examples, job):
            total += steps.sum(0)
        after, start = {}, 0
        for name, value in weights.parameters.items():
            step = total[start : start + value.numel()].view_as(value)
            after[name] = value + step / count
            start += value.numel()
        return Trained(Weights(after, weights.buffers), count)

    def bundles(self, weights: Weights, examples: Examples, job: Job) -> Iterator[Vectors]:
        """The updates of many nodes; one with several examples sends the mean of their steps."""
        each = each_of(examples)
        for steps in self._steps(weights, examples, job, each):
            yield Vectors(steps if each == 1 else steps.view(-1, each, steps.shape[1]).mean(1))

    def _steps(self, weights: Weights, examples: Any, job: Job, each: int = 1) -> Iterator[Tensor]:
        """-rate x the gradient of each example, in pieces of whole nodes: (n, parameters)."""
        settings = self.trainer.settings(job.options, job.learning_rate)
        device, objective = choose_device(settings.device), self.trainer.objective
        piece = self.trainer.bench.piece(job.options, device)
        if len(examples):  # shows the model how they come, before the weights are filled in
            opened(piece, _read(examples.take(slice(0, 2))))
        piece.load(weights)
        module = piece.module.train()
        try:
            gradients = PerExample(module)
        except ValueError as error:
            raise ConfigError(str(error)) from error

        def losses(outputs: Tensor, targets: Tensor) -> Tensor:
            assert objective.each is not None  # checked when the trainer was made
            return objective.each(outputs, targets) * -settings.learning_rate

        with seeded(job.seed, device):
            size = each * max(1, PIECE // each)
            for start in range(0, len(examples), size):
                rows = _read(examples.take(slice(start, start + size)))
                x, y = opened(piece, rows).batch(None)
                targets = objective.prepare(to_device(y, device))
                inputs = to_model(x, device, piece.real)
                # In the order of the model's own vector, as both follow the module's.
                with explained(inputs, targets):
                    steps = gradients.each(inputs, targets, losses).cpu()
                yield steps


def _read(examples: Any) -> Any:
    """Stored rows as arrays."""
    if isinstance(examples, Examples) and isinstance(examples.x, Rows):
        return Examples(examples.x.tensor(), examples.y)
    return examples


def _size(parameters: Tree) -> int:
    return sum(value.numel() for value in parameters.values())
