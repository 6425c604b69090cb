"""Quantize: updates become multiples of a power of two, which whole numbers stand for.

    server -> node   bound
    node             update, rounded to multiples of the step
    node -> server   (what the next layer makes of it)

The step is near bound / (sqrt(size) x levels): a coordinate of typical size has `levels` steps.
Rounding lengthens an update a little, and the longer bound is the fact that noise is planned on:

    nearest      every coordinate to the closest multiple: at most bound + step sqrt(size) / 2;
                 the same update gives the same result
    stochastic   up or down at random, so that the mean is exact, and again until the result is
                 within the bound of Kairouz, Liu and Steinke 2021 (section 4.1, beta = e^-1/2):
                 unbiased but for the condition, and a bound that is hardly longer

Random bits are AES in counter mode keyed by the operating system.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import l2_norm
from umbel.privacy.noise.entropy import Entropy
from umbel.strategies.transform import Facts, NodeContext, Stateless

BETA = math.exp(-0.5)
_SINGLE = 2.0**24
"""Up to here float32 holds every whole number."""
_ATTEMPTS = 100
"""One attempt succeeds with probability above 1 - BETA = 0.39: 100 fail with below 1e-21."""


@dataclass(frozen=True)
class Quantize(Stateless):
    """Rounds bounded updates to a grid.

    Args:
        levels: steps of a coordinate of typical size; more is finer and costs bits on the wire.
        rounding: `nearest` or `stochastic`.

    Raises:
        StackError: levels out of range, or updates without a bound or already whole numbers.
    """

    levels: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"
    name: str = "quantize"
    for_sums: ClassVar[Literal["quantises"]] = "quantises"
    entropy: Entropy = field(default_factory=Entropy, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 1 << 40:
            raise StackError(f"levels is {self.levels}; it must be between 1 and 2^40")
        if self.rounding not in ("nearest", "stochastic"):
            raise StackError(f"rounding is {self.rounding!r}; it can be nearest or stochastic")

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        if facts.l2_bound is None:
            raise StackError("quantize needs bounded updates; put Clip before it")
        if facts.noise:
            raise StackError("quantize would round noise away; put it before the layer of noise")
        step = step_for(facts.l2_bound, facts.size, self.levels)
        bound = widened(facts.l2_bound, facts.size, step, self.rounding)
        return facts.replace(grid=step, l2_bound=bound, wide=facts.wide or bound / step > _SINGLE)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        bound = float(ctx.config["bound"])
        step = step_for(bound, len(update), self.levels)
        scaled = update.to(torch.float64) / step
        if self.rounding == "nearest":
            whole = scaled.round()
        else:
            limit = widened(bound, len(update), step, self.rounding) / step
            whole = self._stochastic(scaled, limit)
        return _narrow(whole * step, update.dtype)

    def _stochastic(self, scaled: Tensor, limit: float) -> Tensor:
        below = scaled.floor()
        chance = scaled - below
        for _ in range(_ATTEMPTS):
            words = self.entropy.words64(len(scaled)) >> 11
            up = torch.from_numpy(words.astype("float64")) * 2.0**-53 < chance
            whole = below + up
            if l2_norm(whole) <= limit:
                return whole
        # Every coordinate toward zero is never longer; unreachable for an update in its bound.
        return scaled.trunc()


def step_for(bound: float, size: int, levels: int) -> float:
    """The largest power of two that is at most bound / (sqrt(size) x levels)."""
    return 2.0 ** math.floor(math.log2(bound / (math.sqrt(max(size, 1)) * levels)))


def widened(bound: float, size: int, step: float, rounding: str) -> float:
    """The bound after rounding, from that before."""
    if rounding == "nearest":
        return bound + step * math.sqrt(size) / 2
    square = (
        bound**2
        + step**2 * size / 4
        + math.sqrt(2 * math.log(1 / BETA)) * step * (bound + step * math.sqrt(size) / 2)
    )
    return min(math.sqrt(square), bound + step * math.sqrt(size))


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In the update's own type where it holds every value exactly, else in float64."""
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.to(torch.float64), values) else values
