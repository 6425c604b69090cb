"""Softmax regression on fixed features, one gradient step a round, from zero.

A node with one example sends -rate (p - y) x r, an outer product: r is its feature vector with a
one for the bias, scaled to length 1. So a cohort of thousands of such nodes is two matrix
products (`bundles`), while a node on its own (`train`) computes the same update.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.clients.data.arrays import not_a_number, plain_array
from umbel.clients.data.examples import Examples, each_of
from umbel.clients.data.features import Rows
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Tree, Weights
from umbel.clients.trainers.exported import Exported
from umbel.core.errors import ConfigError
from umbel.core.options import checked
from umbel.privacy.bounds.bundle import UNIT_STEP, Bundle, OuterProducts, UnitRows, Vectors

WEIGHT = "weight"
PIECE = 512

Prepare = Callable[[Tensor, Tree], Tensor]
"""Features (n, width) and the model's buffers to what the regression sees, (n, width)."""


@dataclass(frozen=True)
class SoftmaxTrainer:
    """Trains softmax regression on the features of `umbel.PrecomputedFeatures`.

    Attributes:
        width: of a feature vector, or a function of the options.
        classes: how many there are.
        prepare: makes a node's features ready, with what the model's buffers hold.
        buffers: the model's first buffers, or a function of the options that makes them.
        learning_rate: of the one local step, before clipping.
    """

    width: int | Callable[[Options], int]
    classes: int = 10
    prepare: Prepare | None = None
    buffers: Callable[[Options], Tree] | None = None
    learning_rate: float = 1.0
    USE: ClassVar[str] = "model.predict(x)"
    OPTIONS: Mapping[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    _ready: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "OPTIONS", {"learning-rate": self.learning_rate})

    def initial(self, options: Options, seed: int) -> Weights:  # noqa: ARG002 - it starts from zero
        width = self.width(options) if callable(self.width) else self.width
        buffers = self.buffers(options) if self.buffers is not None else {}
        return Weights({WEIGHT: torch.zeros(self.classes, width + 1)}, buffers)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """One step on the mean loss of the node's examples."""
        rows, y = self._rows(examples, weights)
        weight, rate = weights.parameters[WEIGHT], self._rate(job)
        step, losses = torch.zeros_like(weight), 0.0
        for start in range(0, len(y), PIECE):
            piece = slice(start, start + PIECE)
            right = rows(piece)
            error, loss = _errors(weight, right, y[piece])
            step += error.T @ (right.whole.float() * UNIT_STEP)
            losses += loss
        after = {WEIGHT: weight - step * (rate / len(y))}
        return Trained(Weights(after, weights.buffers), len(y), {"loss": losses / len(y)})

    def bundles(self, weights: Weights, examples: Examples, job: Job) -> Iterator[Bundle]:
        """The updates of many nodes: with one example each, outer products that are not formed."""
        rows, y = self._rows(examples, weights)
        weight, rate, each = weights.parameters[WEIGHT], self._rate(job), each_of(examples)
        for piece in _places(examples, each):
            right = rows(piece)
            error, _ = _errors(weight, right, y[piece])
            if each == 1:
                yield OuterProducts(error * -rate, right)
                continue
            left = (error * (-rate / each * UNIT_STEP)).view(-1, each, error.shape[1])
            inputs = right.whole.float().view(-1, each, right.whole.shape[1])
            yield Vectors(torch.bmm(left.mT, inputs).flatten(1))

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        rows, y = self._rows(examples, weights)
        weight = weights.parameters[WEIGHT]
        right, losses = 0, 0.0
        for start in range(0, len(y), PIECE):
            piece = slice(start, start + PIECE)
            logits = (rows(piece).whole.float() * UNIT_STEP) @ weight.T
            losses += float(torch.nn.functional.cross_entropy(logits, y[piece], reduction="sum"))
            right += int((logits.argmax(1) == y[piece]).sum())
        return Evaluated(len(y), {"loss": losses / len(y), "accuracy": right / len(y)})

    def ready(self, weights: Weights, options: Options) -> "SoftmaxModel":  # noqa: ARG002
        """Softmax regression of features."""
        return SoftmaxModel(self, weights)

    def exported(self, weights: Weights, options: Options) -> Exported:  # noqa: ARG002
        """From features to logits, without the rounding of features that only training needs."""
        return Exported(_Softmax(self.prepare, weights).eval(), "logits")

    def _rate(self, job: Job) -> float:
        if job.learning_rate is not None:
            return job.learning_rate
        return float(checked("learning-rate", job.options["learning-rate"], 1.0))

    def _rows(self, examples: Any, weights: Weights) -> tuple[Callable[[Any], UnitRows], Tensor]:
        """The prepared inputs by place, and the targets."""
        x, y = examples.x, _labels(examples.y, self.classes)
        if len(y) == 0:
            raise ConfigError("a node has no examples; every node needs at least one")
        if not isinstance(x, Rows):
            found = not_a_number(examples)
            if found:
                raise ConfigError(f"{found}; fill it or leave those examples out")
            inputs = torch.as_tensor(np.array(plain_array(x, "inputs")))
            whole = self._prepared(inputs, weights.buffers)
            return lambda places: UnitRows(whole[places], _peak(whole)), y
        derived = self._derived(x, weights)
        return lambda places: _unit(derived[places].tensor()), y

    def _derived(self, rows: Rows, weights: Weights) -> Rows:
        """The prepared rows, kept on disk for the run: their buffers do not change in it."""
        key = _digest(weights.buffers, self.prepare)
        width = weights.parameters[WEIGHT].shape[1]
        name = f"{key}-{rows.store.folder.name}"
        if name not in self._ready:
            buffers = {k: v.clone() for k, v in weights.buffers.items()}
            made = rows.derived(
                key, width, np.dtype(np.int16), lambda x: self._prepared(x, buffers)
            )
            self._ready[name] = made.store
        return Rows(self._ready[name], rows.index)

    def _prepared(self, features: Tensor, buffers: Tree) -> Tensor:
        """Features of shape (n, width) to whole numbers of shape (n, width + 1), int16."""
        ready = features.float().flatten(1)
        if self.prepare is not None:
            ready = self.prepare(ready, buffers)
        return UnitRows.of(torch.cat([ready, torch.ones(len(ready), 1)], 1)).whole

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}


class _Softmax(torch.nn.Module):
    """Prepared features with a one for the bias, scaled to length 1, times the weights."""

    def __init__(self, prepare: Prepare | None, weights: Weights) -> None:
        super().__init__()
        self.prepare = prepare
        self.weight = torch.nn.Parameter(weights.parameters[WEIGHT].float())
        self.names = {name: f"buffer_{place}" for place, name in enumerate(weights.buffers)}
        for name, held in self.names.items():
            self.register_buffer(held, weights.buffers[name].clone())

    def forward(self, x: Tensor) -> Tensor:
        ready = x.float().flatten(1)
        if self.prepare is not None:
            buffers = {name: getattr(self, held) for name, held in self.names.items()}
            ready = self.prepare(ready, buffers)
        rows = torch.cat([ready, torch.ones_like(ready[:, :1])], 1)
        unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        logits: Tensor = unit @ self.weight.T
        return logits


@dataclass(frozen=True)
class SoftmaxModel:
    """A trained softmax regression.

    Attributes:
        trainer: whose features it takes.
        weights: the trained ones.
    """

    trainer: SoftmaxTrainer
    weights: Weights

    def predict_proba(self, features: Any) -> Tensor:
        """Shares of the classes for features of shape (n, width), shape (n, classes)."""
        inputs = features.tensor() if isinstance(features, Rows) else features
        inputs = torch.as_tensor(np.array(plain_array(inputs, "inputs")))
        whole = self.trainer._prepared(inputs, self.weights.buffers)
        logits = (whole.float() * UNIT_STEP) @ self.weights.parameters[WEIGHT].T
        return logits.softmax(1)

    def predict(self, features: Any) -> Tensor:
        """The likeliest class of each row, shape (n,)."""
        return self.predict_proba(features).argmax(1)


def _labels(values: Any, classes: int) -> Tensor:
    """Class labels as int64.

    Raises:
        ConfigError: they are not whole numbers from 0 to the number of classes less 1.
    """
    given = np.asarray(plain_array(values, "targets"))
    labels = given.astype(np.int64)
    if len(labels) and ((labels != given).any() or labels.min() < 0 or labels.max() >= classes):
        raise ConfigError(
            f"class labels go from {given.min()} to {given.max()}; with classes={classes} they "
            f"have to be whole numbers from 0 to {classes - 1}"
        )
    return torch.from_numpy(labels)


def _errors(weight: Tensor, right: UnitRows, y: Tensor) -> tuple[Tensor, float]:
    """Softmax minus one-hot, shape (n, classes), and the summed loss."""
    logits = (right.whole.float() @ weight.T) * UNIT_STEP
    shares = logits.log_softmax(1)
    loss = -float(shares.gather(1, y[:, None]).sum())
    error = shares.exp_()
    error[torch.arange(len(y)), y] -= 1
    return error, loss


def _places(examples: Examples, each: int) -> Iterator[Any]:
    """Pieces of whole nodes; of stored rows, those of one file at a time where that is possible."""
    if isinstance(examples.x, Rows) and each == 1:
        yield from examples.x.parts()
        return
    size = each * max(1, PIECE // each)
    for start in range(0, len(examples), size):
        yield slice(start, start + size)


def _unit(whole: Tensor) -> UnitRows:
    return UnitRows(whole.float(), _peak(whole))


def _peak(whole: Tensor) -> int:
    return int(max(whole.max(), -whole.min())) if whole.numel() else 0


def _digest(buffers: Tree, prepare: Prepare | None) -> str:
    """What prepared rows depend on beside the features."""
    total = hashlib.sha256(f"{UNIT_STEP} {getattr(prepare, '__qualname__', '')}".encode())
    code = getattr(prepare, "__code__", None)
    total.update(b"" if code is None else code.co_code + repr(code.co_names).encode())
    for name, value in buffers.items():
        total.update(name.encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
