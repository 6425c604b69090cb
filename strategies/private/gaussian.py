"""Gaussian: the server adds noise to the sum before anything is made of it.

    node -> server   bounded updates (Clip), each seen by the server
    server           round(sum / step + N) x step,  N ~ Normal(0, (z B / step)^2)
    server -> all    models, which are post-processing of that

Protects every node against whoever sees the models, not against the server, which sees the
updates. B is the bound at the bottom of the stack and z the noise multiplier. The noise is a
table-sampled Gaussian on a lattice with randomness of the operating system
(`umbel.privacy.noise.lattice`); a round in which nobody came releases noise as well.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.budget.events import ADD_OR_REMOVE
from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.lattice import STEPS, LatticeGaussian
from umbel.privacy.validate import positive
from umbel.strategies.transform import Claim, Facts, RoundContext, Stateless

MARGIN = 1 + 2.0**-20
"""Noise beyond z B: covers the last bits of measured lengths and of the scaling to the lattice."""


@dataclass(frozen=True)
class Gaussian(Stateless):
    """Central Gaussian noise on the sum.

    Args:
        noise_multiplier: standard deviation of the noise over the bound of one update; None
            until a budget has been turned into noise.
        insecure_seed: for tests only: noise that anyone can repeat and subtract. The claim is
            then that nothing is private.

    Raises:
        StackError: the multiplier is not a finite number above 0.
    """

    noise_multiplier: float | None = None
    insecure_seed: int | None = None
    name: str = "gaussian"

    def __post_init__(self) -> None:
        check_multiplier(self.noise_multiplier)

    def with_noise(self, noise_multiplier: float) -> "Gaussian":
        """This layer with its noise decided."""
        return replace(self, noise_multiplier=noise_multiplier)

    def without_seed(self) -> "Gaussian":
        """This layer with real noise."""
        return replace(self, insecure_seed=None)

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_bound(facts, self.name)
        return facts

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        deviation = deviation_of(self.noise_multiplier, ctx.facts, self.name)
        source = entropy(self.insecure_seed, ctx.number)
        ctx.report("noise", deviation)
        return noised(total, deviation, source), state

    def claim(self, facts: Facts) -> Claim | None:
        deviation_of(self.noise_multiplier, facts, self.name)
        event = GaussianDpEvent(self.noise_multiplier)
        return Claim(
            NonPrivateDpEvent() if self.insecure_seed is not None else event,
            unit="client",
            relation=ADD_OR_REMOVE,
            against="model-user",
            extra_delta=slack_of(facts),
            mechanism="gaussian",
        )


def check_multiplier(noise_multiplier: float | None) -> None:
    """Raises StackError where a noise multiplier is given and cannot be used."""
    if noise_multiplier is not None:
        try:
            positive(noise_multiplier=noise_multiplier)
        except ValueError as error:
            raise StackError(str(error)) from error


def need_bound(facts: Facts, name: str) -> float:
    """The bound of what enters a noise layer; raises StackError where there is none."""
    if facts.modulus is not None:
        raise StackError(f"{name} needs real numbers; put it before the layer that quantises")
    if facts.l2_bound is None:
        raise StackError(
            f"{name} needs a bounded update; put Clip before it, and after every layer that "
            "lengthens the update without saying its new bound"
        )
    return facts.l2_bound


def deviation_of(noise_multiplier: float | None, facts: Facts, name: str) -> float:
    """Standard deviation of the noise in the update's unit, on the facts at the bottom."""
    if noise_multiplier is None:
        raise StackError(f"{name} has no noise yet; give noise-multiplier, or an epsilon to meet")
    if facts.l2_bound is None:
        raise StackError(f"{name} needs a bounded update; put Clip before it")
    return noise_multiplier * facts.l2_bound * MARGIN


def entropy(insecure_seed: int | None, number: int) -> Entropy:
    """The operating system's randomness; or, insecurely, that of a seed and a round."""
    return Entropy() if insecure_seed is None else Entropy(insecure_seed * 1_000_003 + number)


def noised(value: Tensor, deviation: float, source: Entropy) -> Tensor:
    """`value` plus Gaussian noise, on the lattice of step deviation / STEPS; float64."""
    step = deviation / STEPS
    scaled = np.divide(value.numpy(), step, dtype=np.float64)
    noisy = LatticeGaussian(STEPS, source).add(scaled)
    return torch.from_numpy(np.multiply(noisy, step, out=noisy))


def slack_of(facts: Facts) -> float:
    """What one noised vector adds to delta: its draws' distance to the exact law."""
    return facts.size * LatticeGaussian(STEPS).tv_per_sample
