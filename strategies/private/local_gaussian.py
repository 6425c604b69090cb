"""LocalGaussian: each node adds noise before anything leaves it.

    server -> node   bound B of clipped updates (from Clip)
    node             update, clipped to B once more, + N,  N ~ Normal(0, sigma^2) on a lattice
    node -> server   the noised update, and nothing beside it
    server           sums; it can check nothing, because noise has no bound

Protects each node against the server and everyone after it: whatever its update was, the server
cannot tell it from any other of length B. Two updates of length B lie up to 2 B apart
(replace-one), so sigma is the analytic Gaussian's for the sensitivity 2 B (Balle and Wang 2018),
times sqrt(participations): a node that takes part that often has spent epsilon at delta.

The node takes B from the server but does not trust it: it clips to the B that it draws noise
for, so a smaller or larger B changes usefulness, never the guarantee.
"""

import math
from dataclasses import dataclass, replace

from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.clipping import clip
from umbel.privacy.budget.events import REPLACE, Charge
from umbel.privacy.noise.gaussian import gaussian_noise
from umbel.privacy.validate import count
from umbel.strategies.private.gaussian import MARGIN, entropy, need_bound, noised, slack_of
from umbel.strategies.release import Promise, Release
from umbel.strategies.transform import Claim, Config, Facts, NodeContext, Stateless

_FOR_SLACK = 1e-3
"""Part of delta that is left for the lattice's own error."""


@dataclass(frozen=True)
class LocalGaussian(Stateless):
    """Noise on every node's own update.

    Args:
        epsilon: of all participations of one node together, against the server.
        delta: of the same.
        participations: how often a node takes part at most.
        insecure_seed: for tests only; the claim is then that nothing is private.

    Raises:
        StackError: epsilon is not a finite number above 0, or delta not between 0 and 1.
    """

    epsilon: float
    delta: float
    participations: int = 1
    insecure_seed: int | None = None
    name: str = "local-gaussian"

    def __post_init__(self) -> None:
        try:
            gaussian_noise(self.epsilon, self.delta)
            count(participations=self.participations)
        except ValueError as error:
            raise StackError(f"local {error}") from error

    def without_seed(self) -> "LocalGaussian":
        """This layer with real noise."""
        return replace(self, insecure_seed=None)

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of a node's noise over the bound."""
        whole = gaussian_noise(self.epsilon, self.delta * (1 - _FOR_SLACK), sensitivity=2.0)
        return whole * math.sqrt(self.participations)

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_bound(facts, self.name)
        return facts.replace(l2_bound=None, grid=None)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        bound = float(ctx.config["bound"])
        clipped = clip(update, bound).update
        deviation = self.noise_multiplier * bound * MARGIN
        return noised(clipped, deviation, entropy(self.insecure_seed, 0)).to(update.dtype)

    def released(self, config: Config, size: int, promise: Promise) -> Release:  # noqa: ARG002
        """Node: one of the participations that the noise is planned for."""
        seeded = self.insecure_seed is not None
        return Release(
            unit="node",
            mechanism=self.name,
            charge=Charge(self._event(), REPLACE, slack_of(Facts(size=size))),
            count=1,
            planned=self.participations,
            promised=math.inf if seeded else self.epsilon,
            delta=self.delta,
            noise_multiplier=self.noise_multiplier,
            norm=float(config["bound"]),
        )

    def _event(self) -> DpEvent:
        seeded = self.insecure_seed is not None
        return NonPrivateDpEvent() if seeded else GaussianDpEvent(self.noise_multiplier)

    def claim(self, facts: Facts) -> Claim | None:
        return Claim(
            self._event(),
            unit="client",
            relation=REPLACE,
            against="server",
            sampled=False,
            extra_delta=slack_of(facts),
            mechanism="local",
        )
