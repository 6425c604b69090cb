"""The parts of a secure stack: whole numbers of updates, shares of noise, and the sum itself.

In which order they stand, and what else there is, is in `umbel.strategies.recipe`.
"""

from collections.abc import Sequence
from typing import Any, cast

from umbel.core.errors import ConfigError
from umbel.strategies.declared import shapes
from umbel.strategies.exchange import (
    Exchange,
    Feeds,
    LooksAtSums,
    Masks,
    Weighs,
    is_own,
    takes_sums,
)
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.secure.distributed_noise import DistributedNoise
from umbel.strategies.secure.distributed_skellam import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
)
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.transform import Transform


def share_layer(privacy: PrivacyOptions, secure: SecureOptions) -> DistributedNoise:
    """The layer by which every node adds its share of the noise."""
    make = DistributedSkellam
    if secure.secure_noise == "discrete-gaussian":
        make = DistributedDiscreteGaussian
    return make(
        privacy.noise_multiplier or None,
        secure.secure_min_cohort,
        secure.secure_colluders,
        privacy.seed,
    )


def whole_steps(
    below: Sequence[Transform[Any]], levels: int, rounding: str
) -> list[Transform[Any]]:
    """The layers at the bottom of a stack, with those that make whole numbers of updates."""
    if any(shapes(layer, "quantises") for layer in below):
        return list(below)
    return [*(below or [Rotate()]), Quantize(levels, cast(Any, rounding))]


def secret_sum(collect: Exchange, secure: SecureOptions, weighting: str) -> Exchange:
    """The secure sum in place of a plain one; the app's own where it has one.

    Raises:
        ConfigError: the app collects otherwise.
    """
    if isinstance(collect, Masks) and isinstance(collect, Weighs):
        return collect.weighted(weighting)
    rule = collect.aggregator if isinstance(collect, Feeds) and is_own(collect) else None
    if isinstance(rule, LooksAtSums):
        return rule.over_sums(secure.secure_mode, secure.secure_min_cohort or 3)
    if rule is not None and rule.kind == "each":
        raise ConfigError(
            f"secure=true lets the server see sums only, and {collect.name} looks at each update; "
            "give bucket-size=N, so that it looks at sums of N nodes, or leave out secure=true"
        )
    if not takes_sums(collect):
        raise ConfigError(
            f"secure=true lets the server see a sum only, but the app collects with "
            f"{collect.name}, which is none; leave out secure=true, or collect with PlainSum"
        )
    return SecureSum(
        mode=cast(Any, secure.secure_mode),  # its three values are checked by the options
        min_cohort=secure.secure_min_cohort or 3,
        weighting=cast(Any, weighting),
    )
