"""The options of a private run; what they build is in `umbel.strategies.recipe`.

This module is imported by every run, that one by private runs alone: the mathematics behind it
takes a second to import.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.limits import above, at_least, check_limits, one_of, option, up_to_one
from umbel.core.options import OptionGroup

MECHANISMS = ("gaussian", "local", "tree", "banded")


@dataclass(frozen=True)
class PrivacyOptions(OptionGroup):
    """The options of a private run; the option names are these with dashes for underscores.

    Attributes:
        epsilon: the budget of the whole run, and of all runs about a named population before it;
            infinity is no budget.
        delta: the probability that the guarantee may fail with; far below one over the number of
            nodes.
        noise_multiplier: noise over clipping norm, instead of what the budget asks for; 0 lets
            the budget decide.
        clipping_norm: the longest update, or the first norm where clipping is adaptive.
        clipping: whether the norm is `fixed`, or `adaptive` and follows the updates.
        clipping_quantile: part of the updates that adaptive clipping leaves whole.
        mechanism: who adds which noise: the server (`gaussian`, or noise that is shared between
            rounds: `tree`, `banded`), or each node (`local`).
        bands: how many rounds share noise in `banded`; 0 takes as many as the separation allows, up
            to 16.
        separation: for `tree` and `banded`, the rounds between two participations of a node.
        sampling: how a round's nodes are drawn: `poisson`, `fixed` (a fixed number without
            replacement) or `all`.
        release_metrics: metrics of the nodes that are released with noise, each with its limit,
            as "loss:5,accuracy:1"; others are dropped.
        population: a name for the people whose data this is; runs about one population share
            its ledger and its budget. Left out: the nodes of the state folder, or the app's data,
            where each run has a budget of its own and the ledger adds them up.
        ledger: the population's ledger file; left out, it is kept in the state folder, or in
            the user's data folder.
        insecure_noise_seed: for tests only: noise that can be repeated; -1 is real noise.
    """

    epsilon: float = option(
        math.inf,
        above(0, infinite=True, hint="leave it out for a run without privacy, or give epsilon=3"),
    )
    delta: float = option(
        1e-5,
        up_to_one(
            without_zero=True, hint="far below one over the number of nodes, such as delta=1e-5"
        ),
    )
    noise_multiplier: float = option(0.0, at_least(0, "0 lets epsilon decide"))
    clipping_norm: float = option(1.0, above(0))
    clipping: str = option("fixed", one_of("fixed", "adaptive"))
    clipping_quantile: float = option(0.5, up_to_one(without_zero=True))
    mechanism: str = option("gaussian", one_of(*MECHANISMS))
    bands: int = option(0, at_least(0))
    separation: int = option(0, at_least(0))
    sampling: str = option("poisson", one_of("poisson", "fixed", "all"))
    release_metrics: str = ""
    population: str = ""
    ledger: str = ""
    insecure_noise_seed: int = option(-1, at_least(-1))

    def __post_init__(self) -> None:
        check_limits(self)
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
