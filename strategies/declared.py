"""What layers declare of themselves, for whoever puts a stack together.

A recipe asks a layer for one of these, and not of which class it is: so an app's own layer that
declares the same is treated the same. What a layer really does is checked on the finished stack
(`umbel.strategies.composition`).
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from umbel.strategies.transform import Transform


@runtime_checkable
class ClipsUpdates(Protocol):
    """A layer that shortens updates to a norm."""

    @property
    def clips_to(self) -> float:
        """The norm of the first round, in the update's own unit."""
        ...

    @property
    def adapts(self) -> bool:
        """Whether later norms follow the updates."""
        ...


@runtime_checkable
class RoundsToo(Protocol):
    """A layer that rounds beside what else it does, and can leave it to a layer below."""

    def without_rounding(self) -> Transform[Any]:
        """This layer, which then does not round."""
        ...


@runtime_checkable
class ShapesForSums(Protocol):
    """A layer that makes of updates what exact and secret sums need."""

    @property
    def for_sums(self) -> Literal["rotates", "quantises"]:
        """`quantises` is what such a sum cannot do without."""
        ...


@runtime_checkable
class ReleasesMetrics(Protocol):
    """A layer that takes metrics into the update, under the noise that is on it."""

    @property
    def releases(self) -> Mapping[str, float]:
        """From a metric's name to the largest absolute value that counts."""
        ...


@runtime_checkable
class WeighsInside(Protocol):
    """A layer that puts a node's weight into the update."""

    @property
    def weighs_inside(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class Proximal(Protocol):
    """A local objective that is FedProx's proximal term."""

    @property
    def proximal(self) -> float:
        """Its strength mu."""
        ...


@runtime_checkable
class OfOneRound(Protocol):
    """A layer whose vectors can be added up within one round only."""

    @property
    def of_one_round(self) -> bool:
        """Whether vectors of two rounds mean different things."""
        ...


def shapes(layer: object, how: Literal["rotates", "quantises"] | None = None) -> bool:
    """Whether a layer shapes updates for sums, in the way `how` where one is named."""
    return isinstance(layer, ShapesForSums) and how in (None, layer.for_sums)


def adapts(layer: object) -> bool:
    """Whether a layer clips to a norm that follows the updates."""
    return isinstance(layer, ClipsUpdates) and layer.adapts


def weighs(layer: object) -> bool:
    """Whether a layer puts a node's weight into the update."""
    return isinstance(layer, WeighsInside) and layer.weighs_inside
