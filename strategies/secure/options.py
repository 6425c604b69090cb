"""The options of a secure sum; what they build is in `umbel.strategies.recipe`."""

from dataclasses import dataclass

from umbel.core.limits import Limit, at_least, check_limits, one_of, option
from umbel.core.options import OptionGroup


@dataclass(frozen=True)
class SecureOptions(OptionGroup):
    """The options of a secure sum; the option names are these with dashes for underscores.

    Attributes:
        secure: whether the server learns the sum of the updates and nothing else; with epsilon,
            only a private sum.
        secure_mode: what the sum withstands: `malicious`, `semi-honest`, or `auto`: malicious where
            enough nodes come.
        secure_min_cohort: no sum is made of fewer nodes; 0 is 3, or with epsilon two thirds of
            the expected cohort.
        secure_colluders: with epsilon, how many of the nodes that stay may add no noise.
        secure_noise: with epsilon, the noise of the nodes: `skellam` or `discrete-gaussian`.
        secure_weighting: without epsilon, how updates weigh: `equal`, or by `examples`, which
            travel masked.
        secure_weight_cap: the largest number of examples that counts, a node's own limit.
        secure_metrics: without epsilon, the metrics of the nodes that travel masked, each with its
            limit, as "loss:5,accuracy:1"; others are dropped.
        secure_norm: without epsilon, the longest update; longer ones are scaled down to it.
        secure_levels: quantisation steps of a coordinate of typical size; 0 is 2^20, or 64 with
            epsilon.
    """

    secure: bool = False
    secure_mode: str = option("auto", one_of("auto", "malicious", "semi-honest"))
    secure_min_cohort: int = option(0, at_least(0))
    secure_colluders: int = option(0, at_least(0))
    secure_noise: str = option("skellam", one_of("skellam", "discrete-gaussian"))
    secure_weighting: str = option("examples", one_of("equal", "examples"))
    secure_weight_cap: float = option(10_000.0, Limit(0, 1e30, without_least=True))
    secure_metrics: str = "loss:20,accuracy:1"
    secure_norm: float = option(100.0, Limit(0, 1e30, without_least=True))
    secure_levels: int = option(0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)
