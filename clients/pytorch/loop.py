"""The local training loop: steps of an optimiser over a node's batches.

The loop is that of a plain PyTorch script. What a federation adds to a step: the correction of a
local objective, a limit on the gradient's norm, and batches worked through in parts. A step may be
shared by several processes (`Share`), each with its part of every batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from umbel.clients.data.arrays import not_a_number
from umbel.clients.pytorch.batches import (
    Source,
    plan,
    real_type,
    to_device,
    to_model,
    whole_source,
)
from umbel.clients.pytorch.correcting import Correcting
from umbel.clients.pytorch.losses import Objective
from umbel.clients.pytorch.rows import first_shape
from umbel.clients.pytorch.settings import TorchSettings, mixed_precision
from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.core.options import dashed


class OptimizerLike(Protocol):
    """The part of `torch.optim.Optimizer` that the loop needs."""

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]
"""`(parameters, learning rate)` to an optimiser, as `torch.optim.Adam`."""

PENDING_LOSSES = 1000
"""Losses are read from the device after this many steps, and at the end."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this process's: the `rank`-th of `world`."""

    rank: int = 0
    world: int = 1

    def of(self, rows: Tensor) -> tuple[Tensor, float]:
        """This process's rows, and the factor that makes the mean over processes the batch's.

        A batch with fewer rows than processes gives some of them none: they compute the first
        row with factor 0, because every process has to take part in every step.
        """
        if self.world == 1:
            return rows, 1.0
        mine = rows.tensor_split(self.world)[self.rank]
        if len(mine) == 0:
            return rows[:1], 0.0
        return mine, len(mine) * self.world / len(rows)


@dataclass(frozen=True)
class Task:
    """One local training: a module that holds the weights to start from, and what to do with it.

    Attributes:
        module: called on the inputs; may be a wrapper of the module that holds the parameters.
        parameters: those that are trained.
        least: the smallest batch that the module can be trained on.
        seed: of the shuffles (the caller seeds the global generators).
        correction: what is added to every gradient, a tensor for each of `parameters`.
        ahead: gradients are those at w - ahead x gradient(w) on the next batch; 0 is at w.
    """

    module: nn.Module
    parameters: list[nn.Parameter]
    objective: Objective
    optimizer: OptimizerLike
    least: int
    settings: TorchSettings
    device: torch.device
    seed: int
    share: Share = Share()
    correction: Correcting | None = None
    ahead: float = 0.0


def make_optimizer(
    make: MakeOptimizer | None, parameters: list[nn.Parameter], settings: TorchSettings
) -> OptimizerLike:
    """The user's optimiser, or SGD with the settings' momentum and weight decay.

    On the CPU that is `PlainSgd`: the same numbers as `torch.optim.SGD`, whose fixed cost of a
    step is as much as a whole forward pass of a small model.

    Raises:
        ConfigError: momentum or weight decay are set, but the optimiser is the user's own.
    """
    if make is None and parameters[0].device.type == "cpu":
        return PlainSgd(
            parameters, settings.learning_rate, settings.momentum, settings.weight_decay
        )
    if make is None:
        return torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    for name in ("momentum", "weight_decay"):
        if getattr(settings, name):
            raise ConfigError(
                f"{dashed(name)} is {getattr(settings, name)}, but the trainer has an "
                "optimizer of its own; set it there, or leave the optimizer out (SGD)"
            )
    return make(parameters, settings.learning_rate)


class PlainSgd:
    """SGD with momentum and weight decay, as `torch.optim.SGD` defines them (no Nesterov)."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.parameters = parameters
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.velocity: list[Tensor | None] = [None] * len(parameters)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for index, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if self.weight_decay:
                gradient = gradient.add(parameter, alpha=self.weight_decay)
            if self.momentum:
                gradient = self._with_momentum(index, gradient)
            parameter.add_(gradient, alpha=-self.learning_rate)

    def _with_momentum(self, index: int, gradient: Tensor) -> Tensor:
        velocity = self.velocity[index]
        if velocity is None:
            self.velocity[index] = gradient.clone()
            return gradient
        return velocity.mul_(self.momentum).add_(gradient)


def call(module: nn.Module, inputs: Any) -> Any:
    """The model's outputs; a list of inputs are its arguments, a mapping its keywords."""
    if isinstance(inputs, Tensor):
        return module(inputs)
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, list) else module(inputs)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision where the settings and the device have it."""
    lower = mixed_precision(precision, device)
    return nullcontext() if lower is None else torch.autocast(device.type, lower)


def fit(task: Task, source: Source) -> tuple[float, int]:
    """Train, in place.

    Returns:
        The mean loss over all steps, each counted by its number of examples; and the steps.

    Raises:
        RunError: the loss became infinite or not a number.
        ConfigError: the examples do not fit the model or its loss.
    """
    task.module.train()
    real = real_type(task.parameters[0].dtype)
    lower = mixed_precision(task.settings.precision, task.device)
    scaler = torch.amp.GradScaler("cuda") if lower == torch.float16 else None
    losses = _Losses(task.settings.learning_rate)
    steps = 0
    batches = plan(source.size, task.settings, task.seed, least=task.least, mixed=source.mixed)
    for rows, back in _ahead(batches, task, source, real) if task.ahead else _here(batches):
        steps += 1
        task.optimizer.zero_grad()
        count = source.size if rows is None else len(rows)
        for part, factor in _parts(rows, source.size, task):
            x, y = source.batch(part)
            inputs = to_model(x, task.device, real)
            targets = task.objective.prepare(to_device(y, task.device))
            with explained(inputs, targets):
                with autocast(task.settings.precision, task.device):
                    loss = task.objective.loss(call(task.module, inputs), targets)
                if factor != 1.0:
                    loss = loss * factor
                (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
            losses.add(loss, count)
            count = 0
        back()
        if scaler is None:
            _shape_gradient(task)
            task.optimizer.step()
        else:
            _scaled_step(scaler, task)
    return losses.mean(), steps


Batches = Iterator[Tensor | None]
"""The rows of each step; None is all rows."""


def _here(batches: Batches) -> Iterator[tuple[Tensor | None, Callable[[], None]]]:
    """Each step's rows, with gradients where the parameters are."""
    for rows in batches:
        yield rows, lambda: None


def _ahead(
    batches: Batches, task: Task, source: Source, real: torch.dtype
) -> Iterator[tuple[Tensor | None, Callable[[], None]]]:
    """Each step's rows, once the parameters are where a step on the next batch leads.

    The last step goes ahead on the first batch. What comes with the rows brings the parameters
    back, and leaves the gradients.
    """
    whole_source(source, "a step ahead")
    each = list(batches)
    for rows, other in zip(each, [*each[1:], each[0]], strict=True):
        before = [parameter.detach().clone() for parameter in task.parameters]
        task.optimizer.zero_grad()
        for part, factor in _parts(other, source.size, task):
            x, y = source.batch(part)
            inputs = to_model(x, task.device, real)
            targets = task.objective.prepare(to_device(y, task.device))
            with explained(inputs, targets), autocast(task.settings.precision, task.device):
                loss = task.objective.loss(call(task.module, inputs), targets)
            (loss * factor).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in task.parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=task.ahead)
        yield rows, lambda before=before: _fill(task.parameters, before)  # type: ignore[misc]


@torch.no_grad()
def _fill(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _scaled_step(scaler: torch.amp.GradScaler, task: Task) -> None:
    """A step in fp16, whose gradients were scaled up so as not to vanish."""
    optimizer: Any = task.optimizer  # on CUDA always a torch.optim.Optimizer
    scaler.unscale_(optimizer)
    _shape_gradient(task)
    scaler.step(optimizer)
    scaler.update()


def _parts(rows: Tensor | None, size: int, task: Task) -> Iterator[tuple[Tensor | None, float]]:
    """A step's rows in pieces, each with the factor that makes their sum the batch's mean."""
    if task.settings.accumulate == 1 and task.share.world == 1:
        yield rows, 1.0
        return
    whole = torch.arange(size) if rows is None else rows
    for part in whole.chunk(task.settings.accumulate):  # first, so that all ranks step alike
        mine, factor = task.share.of(part)
        yield mine, factor * len(part) / len(whole)


def _shape_gradient(task: Task) -> None:
    """Add the correction, then limit the norm of the whole gradient."""
    settings = task.settings
    if task.correction or settings.clip_gradient or settings.momentum or settings.weight_decay:
        for parameter in task.parameters:  # sums with whole tensors, which a sparse one cannot be
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
    if task.correction is not None:
        task.correction.add_to(task.parameters)
    if task.settings.clip_gradient:
        nn.utils.clip_grad_norm_(task.parameters, task.settings.clip_gradient)


class _Losses:
    """The running mean loss, read from the device only now and then."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.pending: list[Tensor] = []
        self.counts: list[int] = []
        self.sum = 0.0
        self.count = 0

    def add(self, loss: Tensor, count: int) -> None:
        """A loss over `count` examples; count 0 marks a further part of the same batch."""
        self.pending.append(loss.detach())
        self.counts.append(count)
        if len(self.pending) >= PENDING_LOSSES:
            self.drain()

    def drain(self) -> None:
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        counted = 0
        for value, count in zip(values, self.counts, strict=True):
            counted = count or counted
            self.sum += value * counted
        self.count += sum(self.counts)
        self.counts.clear()
        if not math.isfinite(self.sum):
            raise RunError(
                f"the training loss is {self.sum}: training diverged at learning-rate="
                f"{self.learning_rate:g}; lower it, or set clip-gradient"
            )

    def mean(self) -> float:
        self.drain()
        return self.sum / self.count


class explained:  # noqa: N801 - a context manager, read as a word
    """Turns complaints about wrong examples into sentences with the cure.

    A class, because a generator's context costs as much as a small step.

    Args:
        inputs: of the batch.
        targets: of the batch.
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        self.inputs, self.targets = inputs, targets

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UmbelError):
            raise self._sentence(error) from error

    def _sentence(self, error: Exception) -> UmbelError:
        said = described(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return RunError(f"{said}; lower batch-size, or raise accumulate")
        if isinstance(error, IndexError) and "Target" in said and "out of bounds" in said:
            return ConfigError(
                f"the targets do not fit the model's outputs ({str(error).rstrip('.')}); class "
                "labels go from 0 to the number of outputs less 1"
            )
        if "more than 1 value per channel" in said:
            return ConfigError(
                "a batch has a single example, and batch norm needs at least two; give every node "
                "more examples, raise batch-size above 1, or use group norm"
            )
        return ConfigError(
            f"the model or its loss fails on a batch with inputs {first_shape(self.inputs)} and "
            f"targets {first_shape(self.targets)}: {said}"
        )


def diverged_on(examples: Any, error: RunError) -> UmbelError:
    """What to say of a training that diverged: that, or that the data are to blame."""
    found = not_a_number(examples)
    if not found:
        return error
    return ConfigError(f"{found}; fill it or leave those examples out")
