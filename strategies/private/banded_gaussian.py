"""BandedGaussian: BandMF, noise whose later rounds take back part of the earlier ones'.

    node -> server   bounded updates; a node comes at most once in `separation` rounds
    server           v(t) = c0 x(t) + c1 x(t-1) + ... + Gaussian noise on the lattice: released
                     update u(t) = (v(t) - c1 u(t-1) - ...) / c0, made of released values only
    server -> all    models

x(t) are the rounds' sums and c0, c1, ... the `bands` diagonals of the factor, which has the least
noise in the models over the planned rounds (`umbel.privacy.budget.banded`; Choquette-Choo et al.
2023). Needs no secret sampling: the server
leaves out nodes that came less than `separation` rounds ago, separation is at least the number of
bands, and each participation is one Gaussian release.

The state holds sums without noise, as the coordinator of a central mechanism does: guard its
checkpoints like the data.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.budget.banded import BandedSchedule
from umbel.strategies.private.gaussian import (
    check_multiplier,
    deviation_of,
    entropy,
    noised,
)
from umbel.strategies.private.tree_gaussian import SteppedNoise, bound_of, correlated_claim
from umbel.strategies.transform import Claim, Facts, RoundContext

State = dict[str, Any]
"""`step`, the fixed `bound`, the `diagonals` that the run began with, and for each of the last
rounds the tensors `sum.t` and `out.t`."""
DIAGONALS = "diagonals"


@dataclass(frozen=True)
class BandedGaussian(SteppedNoise):
    """Gaussian noise correlated over rounds by a banded factor.

    Args:
        bands: diagonals of the factor; 1 is independent noise.
        separation: rounds between two participations of a node, the server sees to it; at
            least `bands`.
        noise_multiplier: standard deviation of the fresh noise over the bound; None until a
            budget has been turned into noise.
        insecure_seed: for tests only; the claim is then that nothing is private.
        rounds: planned, for which the factor is optimised; 0 takes one that suits any number.
        momentum: of the server's optimiser, which the factor takes into account.

    Raises:
        StackError: an argument is out of range.
    """

    bands: int
    separation: int
    noise_multiplier: float | None = None
    insecure_seed: int | None = None
    rounds: int = 0
    momentum: float = 0.0
    name: str = "banded-gaussian"

    def __post_init__(self) -> None:
        check_multiplier(self.noise_multiplier)
        try:
            BandedSchedule(self.bands, self.separation, self.rounds, self.momentum)
        except ValueError as error:
            raise StackError(str(error)) from error

    @cached_property
    def schedule(self) -> BandedSchedule:
        """The factor."""
        return BandedSchedule(self.bands, self.separation, self.rounds, self.momentum)

    def with_noise(self, noise_multiplier: float) -> "BandedGaussian":
        """This layer with its noise decided."""
        return replace(self, noise_multiplier=noise_multiplier)

    def without_seed(self) -> "BandedGaussian":
        """This layer with real noise."""
        return replace(self, insecure_seed=None)

    def init(self, size: int) -> State:
        # A resumed run may plan other rounds, but columns of two factors do not fit together.
        diagonals = torch.tensor(self.schedule.diagonals, dtype=torch.float64)
        return {**super().init(size), DIAGONALS: diagonals}

    def decode(self, total: Tensor, state: State, ctx: RoundContext) -> tuple[Tensor, State]:
        diagonals = state[DIAGONALS].tolist()
        step = state["step"] + 1
        total = total.to(torch.float64)
        past = range(1, min(self.bands, step))
        row = diagonals[0] * total
        for lag in past:
            row = row + diagonals[lag] * state[f"sum.{step - lag}"]
        deviation = deviation_of(self.noise_multiplier, ctx.facts, self.name)
        update = noised(row, deviation, entropy(self.insecure_seed, ctx.number))
        for lag in past:
            update = update - diagonals[lag] * state[f"out.{step - lag}"]
        update = update / diagonals[0]
        oldest = step - self.bands + 2
        kept = {
            key: value
            for key, value in state.items()
            if "." in key and int(key.partition(".")[2]) >= oldest
        }
        after = {**kept, DIAGONALS: state[DIAGONALS], "step": step, "bound": bound_of(ctx)}
        if self.bands > 1:
            after |= {f"sum.{step}": total, f"out.{step}": update}
        ctx.report("noise", deviation)
        return update, after

    def claim(self, facts: Facts) -> Claim | None:
        deviation_of(self.noise_multiplier, facts, self.name)
        growth = self.schedule.growth(facts.round)
        return correlated_claim(self, growth, 1.0, facts, "banded")
