"""Losses by name, and the metrics that go with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from umbel.clients.metrics import Means, named_numbers
from umbel.core.errors import ConfigError

Loss = Callable[[Any, Any], Tensor]
"""`(outputs, targets)` to the mean loss of a batch, a scalar."""

BatchMetrics = Callable[[Any, Any], Mapping[str, Any]]
"""`(outputs, targets)` to metrics, each a mean over the batch: a number or a scalar tensor.

A metric that the batch does not have is NaN, or left out."""


@dataclass(frozen=True)
class Objective:
    """A loss, and what it expects of its targets.

    Attributes:
        name: as the user gave it.
        loss: mean over a batch.
        each: the same before the mean, the first axis being the example; None if unknown.
        targets: "class" indices (or, as floats of the outputs' shape, class probabilities),
            "real" numbers of the outputs' shape, or "any".
    """

    name: str
    loss: Loss
    targets: Literal["class", "real", "any"]
    each: Loss | None = None

    def outputs(self, value: Any) -> Any:
        """What the loss and metrics see of a model's outputs; a loss of the user's sees all."""
        return outputs_of(value) if self.each is not None else value

    def prepare(self, targets: Any) -> Any:
        """Targets in the type that the loss takes: int64 or float32.

        Raises:
            ConfigError: the targets cannot be what the loss expects.
        """
        if not isinstance(targets, Tensor):
            return targets
        if self.targets == "class":
            if targets.is_floating_point() and targets.ndim == 1:
                raise ConfigError(
                    f"the loss {self.name} needs integer class labels, but the targets are "
                    f"{_type_name(targets)}; convert them to integers, or use loss='mse'"
                )
            if not targets.is_floating_point() and targets.ndim == 2 and targets.shape[1] == 1:
                targets = targets.squeeze(1)
        elif self.targets == "real":
            return targets.to(torch.float32)
        wanted = torch.float32 if targets.is_floating_point() else torch.int64
        return targets if targets.dtype == wanted else targets.to(wanted)


def objective(loss: str | Loss) -> Objective:
    """The objective that a trainer's `loss` names.

    Raises:
        ConfigError: the name is unknown.
    """
    if not isinstance(loss, str):
        return Objective(getattr(loss, "__name__", type(loss).__name__), _scalar(loss), "any")
    if loss not in NAMED:
        raise ConfigError(
            f"loss is {loss!r}; choose one of {', '.join(NAMED)}, or give a function of "
            "outputs and targets"
        )
    return NAMED[loss]


def outputs_of(value: Any) -> Any:
    """The tensor that a built-in loss is about, where a model returns more than that.

    Models of Hugging Face return an object with `logits`, those of torchvision for segmentation a
    dict with `out`.

    Raises:
        ConfigError: it cannot be told which of several values it is.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "logits", None), Tensor):
        return value.logits
    if isinstance(value, Mapping):
        tensors = {name: part for name, part in value.items() if isinstance(part, Tensor)}
        for name in ("logits", "out", *tensors):
            if name in tensors and (name in ("logits", "out") or len(tensors) == 1):
                return tensors[name]
        what = f"a dict with the keys {', '.join(map(str, value))}"
    elif isinstance(value, tuple | list):
        what = f"a {type(value).__name__} of {len(value)} values"
    else:
        what = f"a {type(value).__name__}"
    raise ConfigError(
        f"the model returned {what}; return one tensor, or give TorchTrainer a loss function of "
        "outputs and targets that knows what to take"
    )


def _scalar(loss: Loss) -> Loss:
    """The user's loss, which has to give one number for a batch."""

    def checked(outputs: Any, targets: Any) -> Tensor:
        value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ConfigError(
                f"the loss function returned {what} for a batch; return a tensor with one number, "
                "the mean over the batch"
            )
        return value

    return checked


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _classes_last(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs are (batch, positions, classes), as in models of sequences."""
    return outputs.ndim == 3 and targets.ndim == 2 and outputs.shape[:2] == targets.shape


def cross_entropy(outputs: Any, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Softmax cross-entropy; outputs (B, C), (B, C, ...) or, for sequences, (B, T, C)."""
    outputs = outputs_of(outputs)
    if _classes_last(outputs, targets):
        outputs = outputs.movedim(-1, 1)
    return functional.cross_entropy(outputs, targets, reduction=reduction)


def binary_cross_entropy(outputs: Any, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Logistic loss of logits; targets 0 or 1, of the outputs' number of elements."""
    outputs = outputs_of(outputs)
    targets = _like(targets, outputs)
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)


def mean_squared_error(outputs: Any, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error; targets of the outputs' number of elements."""
    outputs = outputs_of(outputs)
    return functional.mse_loss(outputs, _like(targets, outputs), reduction=reduction)


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    if targets.shape == outputs.shape:
        return targets
    if targets.numel() != outputs.numel():
        raise ConfigError(
            f"a batch of targets has shape {tuple(targets.shape)}, but the model's outputs have "
            f"{tuple(outputs.shape)}; the loss needs one target for each output"
        )
    return targets.reshape(outputs.shape)


def _built_in(name: str, loss: Callable[..., Tensor], targets: Any) -> Objective:
    return Objective(name, loss, targets, partial(loss, reduction="none"))


NAMED: Mapping[str, Objective] = {
    "cross-entropy": _built_in("cross-entropy", cross_entropy, "class"),
    "binary-cross-entropy": _built_in("binary-cross-entropy", binary_cross_entropy, "real"),
    "mse": _built_in("mse", mean_squared_error, "real"),
}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of right classes; positions with a negative target are left out, NaN if all are."""
    classes = outputs.argmax(-1 if _classes_last(outputs, targets) else 1)
    if targets.shape == outputs.shape:
        targets = targets.argmax(1)
    known = targets >= 0
    return float((classes == targets)[known].float().mean())


def known_share(targets: Any) -> float:
    """The share of a batch's targets that count: negative classes are left out of means."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.numel():
        return 1.0
    return float((targets >= 0).float().mean()) if bool((targets < 0).any()) else 1.0


@dataclass
class MetricAccumulator:
    """Metrics of a whole data set, gathered batch by batch.

    The loss and per-batch metrics are averaged over the examples that have them; `rmse` and `r2`
    come from sums over all of them, and `r2` is left out where the targets do not vary. Metrics
    that are not means of batches (an AUC, an F1) are given all outputs and targets at the end.

    Attributes:
        objective: the loss.
        metrics: the user's own, if any.
        whole: whether these see everything at once; outputs are then kept on the CPU.
    """

    objective: Objective
    metrics: BatchMetrics | None = None
    whole: bool = False
    examples: int = 0
    means: Means = field(default_factory=Means)
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    kept: list[tuple[Any, Any]] = field(default_factory=list)

    def add(self, outputs: Any, targets: Any, count: int) -> None:
        """Take in one batch of `count` examples."""
        self.examples += count
        counted = count * known_share(targets) if self.objective.targets == "class" else count
        self.means.add("loss", float(self.objective.loss(outputs, targets)), counted)
        outputs = self.objective.outputs(outputs)
        if self.metrics is not None and self.whole:
            self.kept.append((_on_cpu(outputs), _on_cpu(targets)))
        elif self.metrics is not None:
            found = named_numbers(self.metrics(outputs, targets), WHO)
            for name, value in found.items():
                self.means.add(_own(name), value, count)
        elif self.objective.name == "mse":
            self._add_moments(outputs, _like(targets, outputs))
        elif self.objective.name == "binary-cross-entropy":
            right = (outputs > 0) == (_like(targets, outputs) > 0.5)
            self.means.add("accuracy", float(right.float().mean()), count)
        elif self.objective.targets == "class" or _looks_like_classes(outputs, targets):
            self.means.add("accuracy", accuracy(outputs, targets), count * known_share(targets))

    def result(self) -> tuple[dict[str, float], dict[str, int]]:
        """The metrics of everything that was added, and how many examples had each of them."""
        result, weights = self.means.result(), dict(self.means.weights)
        if self.metrics is not None and self.whole:
            outputs, targets = _together(self.kept)
            for name, value in named_numbers(self.metrics(outputs, targets), WHO).items():
                result[_own(name)], weights[_own(name)] = value, self.examples
        for name in [name for name in result if name.startswith(OWN)]:
            # The user's own metric of a name that there is takes its place.
            result[name.removeprefix(OWN)] = result.pop(name)
            weights[name.removeprefix(OWN)] = weights.pop(name)
        n, total, squares, errors = self.moments
        if n:
            result["rmse"] = (errors / n) ** 0.5
            spread = squares - total * total / n
            if spread > 1e-12 * squares:
                result["r2"] = 1.0 - errors / spread
        fewer = {
            name: round(weight) for name, weight in weights.items() if round(weight) < self.examples
        }
        return result, fewer

    def _add_moments(self, outputs: Tensor, targets: Tensor) -> None:
        y, error = targets.cpu().double(), (outputs - targets).cpu().double()
        sums = torch.stack([y.sum(), y.square().sum(), error.square().sum()]).tolist()
        more = [y.numel(), *sums]
        self.moments = [old + new for old, new in zip(self.moments, more, strict=True)]


OWN = "\0"
WHO = "the function `metrics`"


def _own(name: str) -> str:
    return OWN + name


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _together(batches: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """All outputs and all targets.

    Raises:
        ConfigError: they are no tensors that could be joined.
    """
    try:
        outputs = torch.cat([o for o, _ in batches])
        return outputs, torch.cat([t for _, t in batches])
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"whole=True joins the outputs and targets of all batches, which fails ({error}); "
            "return one tensor of one shape from the model, or use metrics of single batches"
        ) from error


def _looks_like_classes(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and outputs.shape[1] > 1
        and targets.ndim == 1
        and targets.dtype == torch.int64
    )
