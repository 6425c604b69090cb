"""Local objectives: what a method adds to the loss that a node trains on.

    node   gradient <- gradient + offset + strength x (w - anchor)

That is the gradient of loss + <offset, w> + strength / 2 x |w - anchor|^2. Vectors are flat, in
the order of the model's manifest. Trainers apply the correction to every step's gradient, before
they limit its norm, and say `honours = frozenset({"correction"})`; a trainer that does not is
refused before the first message. Two more things that a correction can ask for have names of their
own, which a layer `needs` and a trainer `honours`: `parts`, that only some coordinates are trained,
and `ahead`, that the gradient is that of the loss a step ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.contexts import NodeContext
from umbel.strategies.transform import Stateless, Transform

S = TypeVar("S")

CORRECTION = "correction"
"""What a trainer says that it honours where it applies corrections."""

PARTS = "parts"
"""What it says where it can train some parameters and leave the others as they are."""

AHEAD = "ahead"
"""What it says where it can take the gradient a step ahead."""

Places = tuple[tuple[int, int], ...]
"""Beginnings and ends of coordinates of the model, in order."""


@dataclass(frozen=True)
class Correction:
    """What is added to every gradient: offset + strength x (w - anchor).

    Attributes:
        offset: of shape (size,), constant over the steps; None is zero.
        anchor: of shape (size,); None with a strength is where training starts.
        strength: of the pull towards the anchor, in 1 / learning rate.
        trains: whole parameters of the model, the only ones that steps change; None is all.
        ahead: the gradient is the one at w - ahead x gradient(w) on another batch, before anything
            is added to it; 0 is at w.
    """

    offset: Tensor | None = None
    anchor: Tensor | None = None
    strength: float = 0.0
    trains: Places | None = None
    ahead: float = 0.0

    def __bool__(self) -> bool:
        return self.adds or self.trains is not None or self.ahead != 0.0

    @property
    def adds(self) -> bool:
        """Whether anything is added to gradients."""
        return self.offset is not None or self.strength != 0.0

    @property
    def only_adds(self) -> bool:
        """Whether it is nothing but what is added to gradients."""
        return self.trains is None and self.ahead == 0.0


@dataclass(frozen=True)
class Phase:
    """One of the trainings that follow each other in a node's round.

    Attributes:
        trains: see `Correction`.
        options: what they change of the run's options, such as `local-epochs`.
    """

    trains: Places | None = None
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@runtime_checkable
class TrainsInPhases(Protocol):
    """A layer for which a node's round is several trainings, each from where the last ended."""

    def phases(self) -> Sequence[Phase]:
        """Node: what is trained in turn."""
        ...


@runtime_checkable
class TunesOwn(Protocol):
    """A layer under which a node's own model is the common one, trained a little more by it."""

    def tuning(self) -> Phase:
        """Node: the training that makes its own model, before that is judged on its examples.

        A `learning-rate` among its options goes before that of the round.
        """
        ...

    def keep(self, tuned: Tensor, ctx: NodeContext) -> None:
        """Node: what it made, (size,), to remember it."""
        ...


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

    Raises:
        StackError: two train different parts of the model.
    """
    found = [one for one in corrections if one]
    if len(found) <= 1:
        return found[0] if found else None
    added = _added(found, start)
    trains = [one.trains for one in found if one.trains is not None]
    for places in trains[1:]:
        if places != trains[0]:
            raise StackError(
                "two layers of one stack train different parts of the model at the same time; "
                "take one of them"
            )
    ahead = sum(one.ahead for one in found)
    return replace(added, trains=trains[0] if trains else None, ahead=ahead)


def _added(found: Sequence[Correction], start: Tensor) -> Correction:
    """What several corrections add to gradients, as one."""
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
