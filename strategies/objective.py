"""Local objectives: what a method adds to the loss that a node trains on.

    node   gradient <- gradient + offset + strength x (w - anchor)

That is the gradient of loss + <offset, w> + strength / 2 x |w - anchor|^2. Vectors are flat, in
the order of the model's manifest. Trainers apply the correction to every step's gradient, before
they limit its norm, and say `honours = frozenset({"correction"})`; a trainer that does not is
refused before the first message.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from umbel.strategies.contexts import NodeContext
from umbel.strategies.transform import Stateless, Transform

S = TypeVar("S")

CORRECTION = "correction"
"""What a trainer says that it honours where it applies corrections."""


@dataclass(frozen=True)
class Correction:
    """What is added to every gradient: offset + strength x (w - anchor).

    Attributes:
        offset: of shape (size,), constant over the steps; None is zero.
        anchor: of shape (size,); None with a strength is where training starts.
        strength: of the pull towards the anchor, in 1 / learning rate.
    """

    offset: Tensor | None = None
    anchor: Tensor | None = None
    strength: float = 0.0

    def __bool__(self) -> bool:
        return self.offset is not None or self.strength != 0.0


@runtime_checkable
class LocalObjective(Transform[S], Protocol[S]):
    """A layer that also shapes what a node trains on."""

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:
        """Node, before training: what is added to its gradients.

        Args:
            start: the model as it was sent, of shape (size,); not to be written to.
            ctx: this layer's own; its memory is that of the rounds before.
        """
        ...


class Objective(Stateless):
    """For a local objective without state on the server: it writes only what it does."""

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:  # noqa: ARG002
        return Correction()


def combined(corrections: Iterable[Correction], start: Tensor) -> Correction | None:
    """The one correction that does what several do; None where none does anything.

    Args:
        corrections: of the objectives of a stack.
        start: where training starts, of shape (size,).
    """
    found = [one for one in corrections if one]
    if len(found) <= 1:
        return found[0] if found else None
    offset: Tensor | None = None
    for one in found:
        if one.offset is not None:
            offset = one.offset if offset is None else offset + one.offset
    pulling = [one for one in found if one.strength]
    strength = sum(one.strength for one in pulling)
    if len(pulling) <= 1 or all(one.anchor is None for one in pulling):
        return Correction(offset, pulling[0].anchor if pulling else None, strength)
    # The sum of two pulls: their strengths add up, and what is over is an offset.
    rest = sum(
        ((start if one.anchor is None else one.anchor) * -one.strength for one in pulling),
        start * strength,
    )
    return Correction(rest if offset is None else offset + rest, None, strength)


@runtime_checkable
class Personal(Protocol):
    """A layer under which every node has a model of its own, which never leaves it."""

    def starts(self, model: Tensor, ctx: NodeContext) -> Tensor:
        """Node, before training: where it begins, from the model that was sent, (size,)."""
        ...

    def own(self, model: Tensor, ctx: NodeContext) -> Tensor:
        """Node: the model that it uses, and that is judged on its own test examples, (size,)."""
        ...


@runtime_checkable
class TrainsTwice(Protocol):
    """A layer for which a node trains a second model in every round, which stays on it."""

    def second(self, model: Tensor, ctx: NodeContext) -> tuple[Tensor, Correction]:
        """Node: where the second training begins, (size,), and what corrects its gradients."""
        ...

    def keep(self, trained: Tensor, ctx: NodeContext) -> None:
        """Node: what the second training made, (size,), to remember it."""
        ...


@runtime_checkable
class Sized(Protocol):
    """A layer that is made for one model."""

    @property
    def model_size(self) -> int:
        """Coordinates of its update."""
        ...

    @property
    def keeps_parts(self) -> bool:
        """Whether parts of the model stay on the nodes, so that the server has no whole one."""
        ...
