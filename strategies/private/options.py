"""The options of a private run; what they build is in `umbel.strategies.recipe`.

This module is imported by every run, that one by private runs alone: the mathematics behind it
takes a second to import.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umbel.strategies.errors import ConfigError
from umbel.strategies.options import OptionGroup, choose

MECHANISMS = ("gaussian", "local", "tree", "banded")


@dataclass(frozen=True)
class PrivacyOptions(OptionGroup):
    """The options of a private run; the option names are these with dashes for underscores.

    Attributes:
        epsilon: the budget of the whole run, and of all runs about the population before it;
            infinity is no budget.
        delta: of the guarantee; below one over the number of nodes.
        noise_multiplier: noise over clipping norm, instead of what the budget asks for; 0 lets
            the budget decide.
        clipping_norm: the longest update, or the first norm where clipping is adaptive.
        clipping: `fixed` or `adaptive`.
        clipping_quantile: part of the updates that adaptive clipping leaves whole.
        mechanism: `gaussian`, `local`, `tree` or `banded`.
        bands: of `banded`; 0 takes as many as the separation allows, up to 16.
        separation: of `tree` and `banded`: rounds between two participations of a node.
        sampling: `poisson`, `fixed` (a fixed number without replacement) or `all`.
        release_metrics: metrics of the nodes that are released with noise, each with its limit,
            as "loss:5,accuracy:1"; others are dropped.
        population: a name for the people whose data this is; runs about one population share
            its ledger and its budget. Left out: of the state folder, or of this run alone
            where nodes are simulated.
        ledger: the population's ledger file; left out, it is kept beside the runs.
        insecure_noise_seed: for tests only: noise that can be repeated; -1 is real noise.
    """

    epsilon: float = math.inf
    delta: float = 1e-5
    noise_multiplier: float = 0.0
    clipping_norm: float = 1.0
    clipping: str = "fixed"
    clipping_quantile: float = 0.5
    mechanism: str = "gaussian"
    bands: int = 0
    separation: int = 0
    sampling: str = "poisson"
    release_metrics: str = ""
    population: str = ""
    ledger: str = ""
    insecure_noise_seed: int = -1

    def __post_init__(self) -> None:
        choose("clipping", self.clipping, ("fixed", "adaptive"))
        choose("mechanism", self.mechanism, MECHANISMS)
        choose("sampling", self.sampling, ("poisson", "fixed", "all"))
        if not self.epsilon > 0:
            raise ConfigError(
                f"epsilon is {self.epsilon:g}; a budget is above 0, such as epsilon=3 (leave it "
                "out for a run without privacy)"
            )
        if not 0 < self.delta < 1:
            raise ConfigError(
                f"delta is {self.delta:g}; it must lie between 0 and 1, far below one over the "
                "number of nodes, such as delta=1e-5"
            )
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ConfigError(
                f"noise-multiplier is {self.noise_multiplier:g}; it must be a finite number above "
                "0, or 0 to let epsilon decide"
            )
        if not (self.clipping_norm > 0 and math.isfinite(self.clipping_norm)):
            raise ConfigError(
                f"clipping-norm is {self.clipping_norm:g}; it must be a finite number above 0"
            )
        self._check_correlated()

    def _check_correlated(self) -> None:
        if self.mechanism in ("tree", "banded") and self.separation < 1:
            raise ConfigError(
                f"mechanism={self.mechanism} needs separation, the rounds between two "
                "participations of a node, such as separation=10"
            )
        if self.mechanism in ("tree", "banded") and self.clipping == "adaptive":
            raise ConfigError(
                f"mechanism={self.mechanism} shares noise between rounds and needs one norm for "
                "all of them; use clipping=fixed"
            )
        if self.mechanism == "local" and self.noise_multiplier > 0:
            raise ConfigError(
                "mechanism=local takes its noise from epsilon; leave out noise-multiplier"
            )

    @property
    def on(self) -> bool:
        """Whether these options ask for privacy."""
        return math.isfinite(self.epsilon) or self.noise_multiplier > 0

    @property
    def seed(self) -> int | None:
        """The insecure seed of the noise, where there is one."""
        return None if self.insecure_noise_seed < 0 else self.insecure_noise_seed

    @classmethod
    def check_given(cls, changes: Mapping[str, Any]) -> None:
        """Refuse a budget that somebody wrote down and that bounds nothing.

        Raises:
            ConfigError: epsilon is given and not finite.
        """
        given = changes.get("epsilon")
        if isinstance(given, int | float) and not math.isfinite(given):
            raise ConfigError(
                f"epsilon is {given}; a budget is a finite number above 0, such as epsilon=3 "
                "(leave it out for a run without privacy)"
            )


def limits_of(text: str) -> dict[str, float]:
    """`loss:5,accuracy:1` as a mapping.

    Raises:
        ConfigError: something else.
    """
    limits: dict[str, float] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        name, colon, limit = part.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            colon = ""
        if not (colon and name):
            raise ConfigError(
                f"release-metrics has {part!r}; write each metric with its largest value, such as "
                "release-metrics='loss:5,accuracy:1'"
            )
    return limits
