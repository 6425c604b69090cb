"""The options of a secure sum; what they build is in `umbel.strategies.recipe`."""

from dataclasses import dataclass

from umbel.strategies.errors import ConfigError
from umbel.strategies.options import OptionGroup, choose, dashed


@dataclass(frozen=True)
class SecureOptions(OptionGroup):
    """The options of a secure sum; the option names are these with dashes for underscores.

    Attributes:
        secure: the server learns the sum of the updates and nothing else; with epsilon, only a
            private sum.
        secure_mode: `malicious`, `semi-honest`, or `auto`: malicious where enough nodes come.
        secure_min_cohort: no sum is made of fewer nodes; 0 is 3, or with epsilon two thirds of
            the expected cohort.
        secure_colluders: with epsilon: of the survivors, how many may add no noise.
        secure_noise: with epsilon: `skellam` or `discrete-gaussian`.
        secure_weighting: without epsilon: `equal`, or by `examples`, which travel masked.
        secure_weight_cap: the largest number of examples that counts, a node's own limit.
        secure_metrics: without epsilon: metrics of the nodes that travel masked, each with its
            limit, as "loss:5,accuracy:1"; others are dropped.
        secure_norm: without epsilon: the longest update; longer ones are scaled down to it.
        secure_levels: steps of a coordinate of typical size; 0 is 2^20, or 64 with epsilon.
    """

    secure: bool = False
    secure_mode: str = "auto"
    secure_min_cohort: int = 0
    secure_colluders: int = 0
    secure_noise: str = "skellam"
    secure_weighting: str = "examples"
    secure_weight_cap: float = 10_000.0
    secure_metrics: str = "loss:20,accuracy:1"
    secure_norm: float = 100.0
    secure_levels: int = 0

    def __post_init__(self) -> None:
        choose("secure-mode", self.secure_mode, ("auto", "malicious", "semi-honest"))
        choose("secure-noise", self.secure_noise, ("skellam", "discrete-gaussian"))
        choose("secure-weighting", self.secure_weighting, ("equal", "examples"))
        for name in ("secure_norm", "secure_weight_cap"):
            if not 0 < getattr(self, name) < 1e30:
                raise ConfigError(
                    f"{dashed(name)} is {getattr(self, name):g}; it must be a finite number above 0"
                )
        for name in ("secure_min_cohort", "secure_colluders", "secure_levels"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{dashed(name)} is {getattr(self, name)}; it cannot be below 0")
