"""TreeGaussian: DP-FTRL by tree aggregation, for fleets that cannot be sampled.

    node -> server   bounded updates; a node comes at most once in `separation` rounds
    server           round t: the sum of the last 2^l rounds, 2^l the largest power of two that
                     divides t, plus Gaussian noise on the lattice: this is released
    server -> all    models, made of released sums only

Needs no secret sampling: the server leaves out nodes that came less than `separation` rounds
ago, and each round is charged what it adds to the whole tree's sensitivity
(`umbel.privacy.budget.trees`; Kairouz et al. 2021). The noise of the model after t rounds is that
of at most log2(t) + 1 sums, not of t.

The state holds sums without noise, as the coordinator of a central mechanism does: guard its
checkpoints like the data.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, NoOpDpEvent
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.budget.events import ZERO_OUT
from umbel.privacy.budget.trees import TreeSchedule, level
from umbel.strategies.private.gaussian import (
    check_multiplier,
    deviation_of,
    entropy,
    need_bound,
    noised,
    slack_of,
)
from umbel.strategies.transform import Claim, Facts, IdleNode, RoundContext

State = dict[str, Any]
"""`step`, the fixed `bound`, and for each open level l the tensors `sum.l` and `out.l`."""


class SteppedNoise(IdleNode):
    """What layers of correlated noise share: they count their own steps, and nodes do nothing."""

    name: str

    def init(self, size: int) -> State:  # noqa: ARG002
        return {"step": 0, "bound": 0.0}

    def check(self, facts: Facts, state: State) -> Facts:
        need_fixed_bound(facts, state, self.name)
        # A round that was aborted released nothing: what counts is this layer's own step.
        return facts.replace(round=state["step"] + 1)


@dataclass(frozen=True)
class TreeGaussian(SteppedNoise):
    """Tree-aggregated Gaussian noise.

    Args:
        separation: rounds between two participations of a node, the server sees to it.
        noise_multiplier: standard deviation of each tree node's noise over the bound; None until
            a budget has been turned into noise.
        insecure_seed: for tests only; the claim is then that nothing is private.

    Raises:
        StackError: an argument is out of range.
    """

    separation: int
    noise_multiplier: float | None = None
    insecure_seed: int | None = None
    name: str = "tree-gaussian"

    def __post_init__(self) -> None:
        check_multiplier(self.noise_multiplier)
        try:
            TreeSchedule(self.separation)
        except ValueError as error:
            raise StackError(str(error)) from error

    def with_noise(self, noise_multiplier: float) -> "TreeGaussian":
        """This layer with its noise decided."""
        return replace(self, noise_multiplier=noise_multiplier)

    def without_seed(self) -> "TreeGaussian":
        """This layer with real noise."""
        return replace(self, insecure_seed=None)

    def decode(self, total: Tensor, state: State, ctx: RoundContext) -> tuple[Tensor, State]:
        step = state["step"] + 1
        here = level(step)
        node = total.to(torch.float64)
        for below in range(here):
            node = node + state[f"sum.{below}"]
        deviation = deviation_of(self.noise_multiplier, ctx.facts, self.name)
        released = noised(node, deviation, entropy(self.insecure_seed, ctx.number))
        change = released
        for below in range(here):
            change = change - state[f"out.{below}"]
        kept = {
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and int(key.partition(".")[2]) > here
        }
        after = {
            **kept,
            f"sum.{here}": node,
            f"out.{here}": released,
            "step": step,
            "bound": bound_of(ctx),
        }
        ctx.report("noise", deviation)
        return change, after

    def claim(self, facts: Facts) -> Claim | None:
        deviation_of(self.noise_multiplier, facts, self.name)
        assert self.noise_multiplier is not None
        step = facts.round
        inside = -(-(2 ** level(step)) // self.separation)
        growth = TreeSchedule(self.separation).growth(step)
        return correlated_claim(self, growth, inside, facts, "tree")


def correlated_claim(
    layer: Any, growth: float, inside: float, facts: Facts, mechanism: str
) -> Claim:
    """What one round of a mechanism over rounds costs: its growth; alone, when it is repeated.

    Args:
        layer: has noise_multiplier, separation, insecure_seed.
        growth: of the squared sensitivity in this round.
        inside: how often a unit can be in what this round releases.
        facts: at the bottom of the stack.
        mechanism: its name.
    """
    z = layer.noise_multiplier
    event: DpEvent = GaussianDpEvent(z / math.sqrt(growth)) if growth > 0 else NoOpDpEvent()
    again: DpEvent = GaussianDpEvent(z / inside)
    if layer.insecure_seed is not None:
        event = again = NonPrivateDpEvent()
    return Claim(
        event,
        unit="client",
        relation=ZERO_OUT,
        against="model-user",
        sampled=False,
        repeat_event=again,
        extra_delta=slack_of(facts),
        separation=layer.separation,
        mechanism=mechanism,
    )


def bound_of(ctx: RoundContext) -> float | None:
    """The bound of the updates that enter the layer, which `check` compares in the next round.

    The noise is for the bound at the bottom, which a layer that quantises may have widened.
    """
    return (ctx.entering or ctx.facts).l2_bound


def need_fixed_bound(facts: Facts, state: State, name: str) -> None:
    """Raises StackError where the bound is missing, or moves while rounds share their noise."""
    bound = need_bound(facts, name)
    if state["bound"] not in (0.0, bound):
        raise StackError(
            f"{name} needs one bound for all rounds, but it went from {state['bound']:g} to "
            f"{bound:g}; put Clip before it in place of AdaptiveClip"
        )
