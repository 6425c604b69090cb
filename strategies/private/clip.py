"""Clip: no update is longer than a norm.

    server -> node   norm
    node             update, scaled down to the norm, rounded toward zero to the norm's grid
                     (or not rounded, where Quantize below makes a grid for the update's size)
    node -> server   the clipped update
    server           rejects, by name, an update that is longer or off the grid

The grid is a power of two near norm / 2**17. On it sums are exact, so a round's sum does not
depend on the order of arrival, and rounding toward zero never makes an update longer. The server
measures every update again as it arrives: the bound holds for nodes that do not clip, too.

This layer alone is a robustness measure; it claims no privacy.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.bundle import Bundle
from umbel.privacy.bounds.clipping import clip, clip_to_grid
from umbel.privacy.noise.lattice import grid_step
from umbel.privacy.validate import positive
from umbel.strategies.transform import Broadcast, Config, Facts, NodeContext, Stateless


@dataclass(frozen=True)
class Clip(Stateless):
    """Clips updates to a fixed L2 norm.

    Args:
        norm: the bound, in the update's own unit (model parameters).
        grid: whether to round to the norm's grid. Of an update much shorter than the norm and of
            many coordinates little is left on it, so above `Quantize` it is False.

    Raises:
        StackError: the norm is not a finite number above 0.

    Metrics: `norm`, an update's length before clipping; `clipped`, 1 if it was longer.
    """

    norm: float
    name: str = "clip"
    grid: bool = True
    adapts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            positive(clipping_norm=self.norm)
        except ValueError as error:
            raise StackError(str(error)) from error

    @property
    def clips_to(self) -> float:
        """The norm."""
        return self.norm

    def without_rounding(self) -> Self:
        """For a stack that quantises further down."""
        return replace(self, grid=False)

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        facts = bounded(facts, self.norm)
        return facts if self.grid else facts.replace(grid=None)

    def broadcast(self, state: None, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"norm": self.norm})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        shorten = clip_to_grid if self.grid else clip
        result = shorten(update, float(ctx.config["norm"]))
        ctx.report("norm", result.length)
        ctx.report("clipped", result.was_clipped)
        return result.update

    def encode_many(self, bundle: Bundle, config: Config) -> Bundle:
        """Several nodes' updates at once, each as in `encode`."""
        return bundle.clipped(float(config["norm"]))


def bounded(facts: Facts, norm: float) -> Facts:
    """The facts after clipping to `norm` and rounding to its grid.

    Raises:
        StackError: the updates are integers already.
    """
    if facts.modulus is not None:
        raise StackError("clipping needs real numbers; put Clip before the layer that quantises")
    return facts.replace(l2_bound=norm, grid=grid_step(norm))
