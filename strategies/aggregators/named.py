"""The rules that the option `aggregator` names, and the options that say what they stand.

    aggregator=median liars=0.3
    aggregator=krum bucket-size=2
    aggregator=norm-bound norm-bound=1.5

Every function here makes a rule of a run's complete options; each imports its own file only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.limits import at_least, check_limits, option, up_to_one
from umbel.core.options import OptionGroup, Options
from umbel.core.registry import provide


@dataclass(frozen=True)
class RobustOptions(OptionGroup):
    """What a robust aggregator is to stand; option names have dashes for underscores.

    Attributes:
        liars: the share of a round's nodes that may send whatever they like; each aggregator says
            which shares it stands.
        bucket_size: nodes whose mean the aggregator looks at in place of each of them; 1 is each.
            With secure=true, nodes of a secure sum: the server sees no less.
        norm_bound: of aggregator=norm-bound, the longest update; 0 is the median of the round.
        clipping_radius: of aggregator=centred-clipping, how far an update may pull; 0 is the
            median distance.
    """

    liars: float = option(0.2, up_to_one())
    bucket_size: int = option(0, at_least(0))
    norm_bound: float = option(0.0, at_least(0))
    clipping_radius: float = option(0.0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)


def _median(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.median import Median

    return Median(asked.liars)


def _trimmed_mean(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.trimmed_mean import TrimmedMean

    return TrimmedMean(asked.liars)


def _krum(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.krum import Krum

    return Krum(asked.liars)


def _multi_krum(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.krum import MultiKrum

    return MultiKrum(asked.liars)


def _bulyan(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.bulyan import Bulyan

    return Bulyan(asked.liars)


def _geometric_median(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.geometric_median import GeometricMedian

    return GeometricMedian(asked.liars)


def _centred_clipping(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.centred_clipping import CentredClipping

    return CentredClipping(asked.liars, radius=asked.clipping_radius)


def _norm_bound(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.norm_bound import NormBound

    return NormBound(asked.liars, norm=asked.norm_bound)


def _fltrust(asked: RobustOptions) -> Any:
    from umbel.strategies.aggregators.fltrust import FLTrust

    return FLTrust(asked.liars)


RULES: Mapping[str, Callable[[RobustOptions], Any]] = {
    "median": _median,
    "trimmed-mean": _trimmed_mean,
    "krum": _krum,
    "multi-krum": _multi_krum,
    "bulyan": _bulyan,
    "geometric-median": _geometric_median,
    "centred-clipping": _centred_clipping,
    "norm-bound": _norm_bound,
    "fltrust": _fltrust,
}
"""By name, in the order in which `docs/robust.md` tells of them."""


def rule_named(name: str, options: Options) -> Any:
    """The rule of this name under complete options, over buckets where they ask for those.

    Raises:
        ConfigError: no such name.
        StackError: a share of liars that the rule does not stand.
    """
    if name not in RULES:
        raise ConfigError(f"aggregator is {name!r}; it can be {', '.join(RULES)}")
    asked = RobustOptions.read(options)
    seed = int(options.get("seed", 0))
    if asked.bucket_size > 1:
        from umbel.strategies.aggregators.bucketing import Bucketing

        if name == "fltrust":
            raise ConfigError(
                "bucket-size stands before rules that compare nodes with each other, and fltrust "
                "compares them with the server's own examples; leave bucket-size out"
            )
        # The rule over buckets stands `liars` x `bucket_size`, which Bucketing looks at.
        return Bucketing(
            asked.liars, rule=RULES[name](_all(asked)), size=asked.bucket_size, seed=seed
        )
    return RULES[name](asked)


def _mean(_: Options) -> Any:
    from umbel.strategies.collect import PlainSum

    return PlainSum()


def _all(asked: RobustOptions) -> RobustOptions:
    return RobustOptions(0.0, asked.bucket_size, asked.norm_bound, asked.clipping_radius)


provide("aggregator", "mean", _mean)
for _name in RULES:
    provide("aggregator", _name, partial(rule_named, _name))
