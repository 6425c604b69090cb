"""From options to a secure stack.

secure=true                   Clip -> Weigh -> Rotate -> Quantize -> SecureSum
secure=true epsilon=3         Clip -> Rotate -> Quantize -> noise on the nodes -> SecureSum
"""

from collections.abc import Mapping
from typing import Any, cast

from umbel.strategies.collect import PlainSum
from umbel.strategies.errors import ConfigError
from umbel.strategies.layer import Layer
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.private_stack import limits_of
from umbel.strategies.secure.distributed_skellam import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
)
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.secure.weigh import Weigh
from umbel.strategies.stack import Stack


def secure_stack(stack: Stack, options: SecureOptions, privacy: PrivacyOptions) -> Stack:
    """The app's stack over a secure sum, with distributed noise where there is a budget.

    Layers of the app stay where they are. A stack whose collect is not a plain sum is the app's
    own business and is left alone.

    Raises:
        ConfigError: options that do not go together.
        StackError: layers that do not fit together.
    """
    if not isinstance(stack.collect, PlainSum):
        return stack
    layers: list[Layer[Any]] = list(stack.layers)
    clipped = any(isinstance(layer, Clip) for layer in layers)
    if privacy.on:
        _check_together(stack, privacy)
        if not clipped:
            layers.append(Clip(privacy.clipping_norm))
        limits = limits_of(privacy.release_metrics)
        if limits:
            layers.append(PrivateMetrics(limits))
        return Stack((*layers, *_private(options, privacy)), _collect(options, "fixed"))
    if not clipped:
        layers.append(Clip(options.secure_norm))
    limits = limits_of(options.secure_metrics)
    by_examples = options.secure_weighting == "examples"
    if by_examples or limits:
        layers.append(Weigh(options.secure_weight_cap if by_examples else 0.0, limits))
    layers += [Rotate(), Quantize(options.secure_levels or 1 << 20)]
    return Stack(tuple(layers), _collect(options, "equal"))


def _private(options: SecureOptions, privacy: PrivacyOptions) -> list[Layer[Any]]:
    make = DistributedSkellam
    if options.secure_noise == "discrete-gaussian":
        make = DistributedDiscreteGaussian
    noise = make(
        privacy.noise_multiplier or None,
        options.secure_min_cohort,
        options.secure_colluders,
        privacy.seed,
    )
    return [Rotate(), Quantize(options.secure_levels or 64, "stochastic"), noise]


def _collect(options: SecureOptions, weighting: str) -> SecureSum:
    return SecureSum(
        mode=cast(Any, options.secure_mode),  # its three values are checked by the options
        min_cohort=options.secure_min_cohort or 3,
        weighting=cast(Any, weighting),
    )


def _check_together(stack: Stack, privacy: PrivacyOptions) -> None:
    refused: Mapping[str, bool] = {
        f"mechanism={privacy.mechanism}": privacy.mechanism != "gaussian",
        "clipping=adaptive": privacy.clipping == "adaptive"
        or any(isinstance(layer, AdaptiveClip) for layer in stack.layers),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ConfigError(
                f"secure=true makes its noise on the nodes, which {what} does not fit; leave out "
                "one of them"
            )
    if stack.private:
        raise ConfigError(
            "the app's stack adds its own noise; leave out secure=true, or let the options make "
            "the private layers"
        )
