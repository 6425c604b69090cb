"""Server optimisers: what the coordinator does with the average update.

The update is a direction of improvement, so it plays the part of the negative gradient
(Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2).

    Federation(optimizer=...)    a value, a function of the options, or a name
    -c optimizer=NAME            a name; see `umbel.register`
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from umbel.core.errors import RunError

Slots = dict[str, Tensor]
"""An optimiser's state: named tensors of the model's size."""


@runtime_checkable
class ServerOptimizer(Protocol):
    """Turns the average update of a round into the next model."""

    @property
    def name(self) -> str:
        """As in reports, and in the option `optimizer` where it is registered."""
        ...

    def init(self, parameters: Tensor) -> Slots:
        """The state before the first round."""
        ...

    def step(self, parameters: Tensor, update: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        """The next model and state; the inputs are not mutated.

        Args:
            parameters: the model, flat, of shape (size,).
            update: the average update of the same shape and type.
            slots: the state, as `init` or the last step returned it.
        """
        ...


def advance(
    optimizer: ServerOptimizer, parameters: Tensor, update: Tensor, slots: Slots
) -> tuple[Tensor, Slots]:
    """One step of an optimiser, whose result is a model again.

    Raises:
        RunError: it returns something else.
    """
    after, kept = optimizer.step(parameters, update.to(parameters.dtype), slots)
    if not isinstance(after, Tensor) or after.shape != parameters.shape:
        found = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise RunError(
            f"the optimizer {optimizer.name} returned {found} in place of a model of "
            f"{tuple(parameters.shape)}; let step return the next parameters and the state"
        )
    wrong = [name for name, slot in kept.items() if not isinstance(slot, Tensor)]
    if wrong:
        raise RunError(
            f"the optimizer {optimizer.name} keeps {wrong[0]!r} as a "
            f"{type(kept[wrong[0]]).__name__}; keep tensors only, which a checkpoint can hold"
        )
    return after.to(parameters.dtype), kept


@dataclass(frozen=True)
class FedAvg:
    """parameters + learning_rate * update (McMahan et al. 2017)."""

    learning_rate: float = 1.0
    name: str = "fedavg"

    def init(self, parameters: Tensor) -> Slots:  # noqa: ARG002
        return {}

    def step(self, parameters: Tensor, update: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        return _moved(parameters, update, self.learning_rate), slots


@dataclass(frozen=True)
class FedAvgM:
    """Server momentum: m <- momentum * m + update (Hsu et al. 2019, section 4.2)."""

    learning_rate: float = 1.0
    momentum: float = 0.9
    name: str = "fedavgm"

    def init(self, parameters: Tensor) -> Slots:
        return {"momentum": torch.zeros_like(parameters)}

    def step(self, parameters: Tensor, update: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        momentum = (slots["momentum"] * self.momentum).add_(update.to(parameters.dtype))
        return _moved(parameters, momentum, self.learning_rate), {"momentum": momentum}


@dataclass(frozen=True)
class Adaptive:
    """FedAdam, FedYogi and FedAdagrad (Reddi et al. 2021, algorithm 2).

    One class, because they differ in one line: how the second moment grows. FedAdam corrects
    the bias of its moments by scaling the learning rate, counting steps from two as Flower
    does, so that the two agree; the others do not correct it.

    Args:
        learning_rate: of the server.
        beta_1: decay of the first moment; FedAdagrad uses none.
        beta_2: decay of the second moment.
        epsilon: added to the root of the second moment (tau in the paper); the smaller, the more
            adaptive.
    """

    name: Literal["fedadam", "fedyogi", "fedadagrad"]
    learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    epsilon: float = 1e-3

    def init(self, parameters: Tensor) -> Slots:
        zeros = torch.zeros_like(parameters)
        return {"first": zeros, "second": zeros.clone(), "steps": torch.zeros(1)}

    def step(self, parameters: Tensor, update: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        update = update.to(parameters.dtype)
        square, steps = update * update, slots["steps"] + 1
        beta_1 = 0.0 if self.name == "fedadagrad" else self.beta_1
        first = torch.lerp(update, slots["first"], beta_1)
        second = self._second_moment(slots["second"], square)
        rate = self.learning_rate
        if self.name == "fedadam":
            count = float(steps) + 1
            rate *= (1 - self.beta_2**count) ** 0.5 / (1 - self.beta_1**count)
        after = parameters + rate * first / (second.sqrt() + self.epsilon)
        return after, {"first": first, "second": second, "steps": steps}

    def _second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        if self.name == "fedadagrad":
            return second + square
        if self.name == "fedyogi":
            return second - (1 - self.beta_2) * square * torch.sign(second - square)
        return torch.lerp(square, second, self.beta_2)


def _moved(parameters: Tensor, direction: Tensor, rate: float) -> Tensor:
    return torch.add(parameters, direction.to(parameters.dtype), alpha=rate)
