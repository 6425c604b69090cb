"""From options to a private stack: `-c "epsilon=3"` is all that it takes.

    epsilon=3                                   Clip -> Gaussian,        Poisson cohorts
    epsilon=3 clipping=adaptive                 AdaptiveClip -> Gaussian
    epsilon=3 mechanism=local                   Clip -> LocalGaussian    noise on every node
    epsilon=3 mechanism=tree separation=20      Clip -> TreeGaussian     no sampling needed
    epsilon=3 mechanism=banded separation=20    Clip -> BandedGaussian   no sampling needed

Both sides build the stack from the same options; how much central noise meets the budget is
decided by the coordinator alone, which knows the population (`umbel.server.private.plan`).
"""

import re
from dataclasses import replace
from typing import Any

from umbel.strategies.collect import PlainSum
from umbel.strategies.errors import ConfigError
from umbel.strategies.layer import Layer
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.banded_gaussian import BandedGaussian
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.tree_gaussian import TreeGaussian
from umbel.strategies.stack import Stack


def private_stack(
    stack: Stack, options: PrivacyOptions, rounds: int, momentum: float = 0.0
) -> Stack:
    """The app's stack with the layers that the privacy options ask for.

    Layers of the app stay where they are. A stack that is private already is left alone, and so
    is one for which nothing is asked.

    Args:
        stack: the app's own.
        options: the run's.
        rounds: planned; local noise is divided among them, banded noise is best for them.
        momentum: of the server's optimiser; banded noise allows for it.

    Raises:
        ConfigError: a value that cannot be used.
        StackError: layers that do not fit together.
    """
    if stack.private or not options.on:
        return stack
    layers: list[Layer[Any]] = list(stack.layers)
    place = next((i for i, layer in enumerate(layers) if _clips(layer)), None)
    if place is None:
        layers.insert(0, _clip(options))
        place = 0
    added: list[Layer[Any]] = []
    limits = limits_of(options.release_metrics)
    if limits:
        added.append(PrivateMetrics(limits))
    added.append(_noise(options, rounds, momentum))
    layers[place + 1 : place + 1] = added
    collect = stack.collect
    if isinstance(collect, PlainSum):
        collect = replace(collect, weighting="fixed")
    return Stack(tuple(layers), collect)


def _clips(layer: Layer[Any]) -> bool:
    return isinstance(layer, Clip | AdaptiveClip)


def _clip(options: PrivacyOptions) -> Layer[Any]:
    if options.clipping == "adaptive":
        return AdaptiveClip(options.clipping_norm, options.clipping_quantile)
    return Clip(options.clipping_norm)


def _noise(options: PrivacyOptions, rounds: int, momentum: float) -> Layer[Any]:
    given = options.noise_multiplier or None
    match options.mechanism:
        case "local":
            return LocalGaussian(options.epsilon, options.delta, rounds, options.seed)
        case "tree":
            return TreeGaussian(options.separation, given, options.seed)
        case "banded":
            bands = options.bands or min(16, options.separation)
            return BandedGaussian(
                bands, options.separation, given, options.seed, rounds=rounds, momentum=momentum
            )
    return Gaussian(given, options.seed)


def limits_of(text: str) -> dict[str, float]:
    """`loss:5,accuracy:1` as a mapping."""
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
