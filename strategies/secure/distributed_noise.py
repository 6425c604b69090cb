"""Noise of which every node adds a share, so that the sum is private before anybody sees it.

    server -> node   noise multiplier z, how many shares count, the grid's step
    node             update (whole numbers of steps) + its share of the noise, whole numbers
    node -> server   masked by SecureSum
    server           the sum with all shares in it; nothing is added here

Shares are sized for the smallest cohort that may survive, less the nodes that are tolerated as
colluders, who may leave theirs out or subtract them: that many shares make noise of standard
deviation z B, where B is the bound after rounding. More survivors add more noise; fewer, and
SecureSum gives the round up. Protects every node against the server and whoever sees the
models. Neighbours are data sets of which one node's is replaced by nothing, that node's share of
the noise included on both sides. Sampling amplifies nothing here: the server knows the cohort,
and the cohort's size shows in the noise.

    DistributedSkellam            exact under sums; any whole orders of Renyi DP (default)
    DistributedDiscreteGaussian   nearly closed under sums; concentrated DP
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from dp_accounting import DpEvent, NonPrivateDpEvent, ZCDpEvent
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.privacy.bounds.clipping import is_within
from umbel.privacy.budget.events import ZERO_OUT, Charge
from umbel.privacy.noise.discrete_gaussian import (
    concentrated_rho,
    discrete_gaussian_slack,
    sample_discrete_gaussian,
)
from umbel.privacy.noise.entropy import Entropy
from umbel.privacy.noise.lattice import on_grid
from umbel.privacy.noise.skellam import sample_skellam, skellam_event, skellam_slack
from umbel.strategies.collect import LENIENCE
from umbel.strategies.private.gaussian import MARGIN, check_multiplier
from umbel.strategies.release import Promise, Release
from umbel.strategies.transform import Broadcast, Claim, Config, Facts, NodeContext, Stateless

Law = Literal["skellam", "discrete-gaussian"]

LARGEST_SUM = 1 << 20
"""So many updates a node supposes in a sum, whose number it is not told; it costs delta 1e-20."""


@dataclass(frozen=True)
class DistributedNoise(Stateless):
    """Every node adds a share of the noise; needs SecureSum below and Quantize above.

    Args:
        law: of the shares.
        noise_multiplier: standard deviation of the whole noise over the bound of one update;
            None until a budget has been turned into noise.
        min_cohort: the smallest cohort that may survive; 0 is two thirds of the expected one.
        colluders: of the survivors, how many may add nothing.
        insecure_seed: for tests only: noise that can be repeated; nothing is private then.

    Raises:
        StackError: a value out of range, or layers that do not fit.
    """

    law: Law = "skellam"
    noise_multiplier: float | None = None
    min_cohort: int = 0
    colluders: int = 0
    insecure_seed: int | None = None
    name: str = "distributed-noise"

    def __post_init__(self) -> None:
        check_multiplier(self.noise_multiplier)
        if self.min_cohort < 0 or self.colluders < 0:
            raise StackError(
                f"min-cohort is {self.min_cohort} and colluders {self.colluders}; neither can be "
                "below 0"
            )

    def with_noise(self, noise_multiplier: float) -> "DistributedNoise":
        """This layer with its noise decided."""
        return replace(self, noise_multiplier=noise_multiplier)

    def without_seed(self) -> "DistributedNoise":
        """This layer with real noise."""
        return replace(self, insecure_seed=None)

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        if facts.l2_bound is None:
            raise StackError(f"{self.name} needs bounded updates; put Clip before it")
        if facts.grid is None:
            raise StackError(f"{self.name} adds whole numbers; put Quantize before it")
        survivors = self.survivors(facts)
        most = max(facts.max_replies, survivors)
        deviation = (self.noise_multiplier or 0.0) * MARGIN * facts.l2_bound
        return facts.replace(
            min_replies=max(facts.min_replies, survivors),
            noise=deviation * math.sqrt(most / self.shares(facts)),
        )

    def broadcast(self, state: None, facts: Facts) -> Broadcast:  # noqa: ARG002
        """What nodes need to make their shares."""
        if self.noise_multiplier is None:
            raise StackError(f"{self.name} has no noise yet; give noise-multiplier or epsilon")
        assert facts.grid is not None
        return Broadcast(
            {
                "noise-multiplier": self.noise_multiplier,
                "shares": self.shares(facts),
                "step": facts.grid,
                "round": facts.round,
            }
        )

    def survivors(self, facts: Facts) -> int:
        """The smallest cohort that may survive."""
        return self.min_cohort or max(3, math.ceil(2 * facts.expected_replies / 3))

    def shares(self, facts: Facts) -> int:
        """How many shares of noise are surely in every sum."""
        shares = self.survivors(facts) - self.colluders
        if shares < 1:
            raise StackError(
                f"with {self.colluders} colluders among {self.survivors(facts)} survivors nobody "
                "is left who adds noise; lower colluders or raise min-cohort"
            )
        return shares

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        config = ctx.config
        step, bound = float(config["step"]), float(config["bound"])
        # The server tells both; a smaller bound or a coarser step would mean too little noise.
        if not is_within(update, bound * (1 + LENIENCE)) or not on_grid(update, step):
            raise RunError(
                f"the server told this node to make noise for updates of norm {bound:g} on a grid "
                f"of {step:g}, which its own update is not; no update is sent"
            )
        share = share_variance(
            float(config["noise-multiplier"]), bound, step, int(config["shares"])
        )
        entropy = Entropy()
        if self.insecure_seed is not None:
            entropy = Entropy(self.insecure_seed * 1_000_003 + int(config["round"]))
        draw: Any = sample_skellam(share, len(update), entropy) if self.law == "skellam" else None
        if draw is None:
            draw = sample_discrete_gaussian(math.sqrt(share), len(update), entropy)
        noise = torch.from_numpy(draw).to(torch.float64) * step
        return update.to(torch.float64) + noise

    def released(self, config: Config, size: int, promise: Promise) -> Release:
        """Node: the sum that its update will be part of, with the shares that it was told of.

        That the others add theirs, a node takes on trust, as the claim does: down to the
        smallest cohort that it lets pass, less the colluders.
        """
        multiplier, bound = float(config["noise-multiplier"]), float(config["bound"])
        seeded = self.insecure_seed is not None
        event, slack = self._cost(
            multiplier, bound, float(config["step"]), int(config["shares"]), size, LARGEST_SUM
        )
        return Release(
            unit="node",
            mechanism=self.name,
            charge=Charge(NonPrivateDpEvent() if seeded else event, ZERO_OUT, slack),
            count=1,
            planned=promise.rounds,
            promised=math.inf if seeded else promise.epsilon,
            delta=promise.delta,
            noise_multiplier=multiplier,
            norm=bound,
        )

    def claim(self, facts: Facts) -> Claim | None:
        if facts.server_sees != "sum":
            raise StackError(
                f"a share of the noise protects nobody whose update is seen alone; put {self.name} "
                "over SecureSum, or take LocalGaussian"
            )
        if self.noise_multiplier is None or facts.l2_bound is None or facts.grid is None:
            raise StackError(f"{self.name} has no noise yet; give noise-multiplier or epsilon")
        event, slack = self._event(facts)
        return Claim(
            NonPrivateDpEvent() if self.insecure_seed is not None else event,
            unit="client",
            relation=ZERO_OUT,
            against="server",
            sampled=False,
            extra_delta=slack,
            seen_in_sum_only=True,
            mechanism="gaussian",
        )

    def _event(self, facts: Facts) -> tuple[DpEvent, float]:
        assert facts.l2_bound is not None and facts.grid is not None
        shares = self.shares(facts)
        most = max(facts.max_replies, shares)
        multiplier = self.noise_multiplier or 0.0
        return self._cost(multiplier, facts.l2_bound, facts.grid, shares, facts.size, most)

    def _cost(
        self, multiplier: float, bound: float, step: float, shares: int, size: int, most: int
    ) -> tuple[DpEvent, float]:
        """The event and the slack of a sum of at most `most` vectors of `size` coordinates."""
        variance, l2 = share_variance(multiplier, bound, step, shares), bound / step
        draws = size * most
        if self.law == "skellam":
            event: DpEvent = skellam_event(variance * shares, l2, size)
            return event, draws * skellam_slack(variance)
        deviation = math.sqrt(variance)
        rho = concentrated_rho(deviation, shares, l2, size)
        return ZCDpEvent(rho), draws * discrete_gaussian_slack(deviation)


def share_variance(noise_multiplier: float, bound: float, step: float, shares: int) -> float:
    """Variance of one node's share in steps^2."""
    return (noise_multiplier * MARGIN * bound / step) ** 2 / shares
