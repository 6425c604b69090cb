"""Samplers by the names that the option `cohort` has, from `cohort-size` and `cohort-cap`."""

import math
from collections.abc import Mapping
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.registry import provide


def fixed_size(name: str, options: Mapping[str, Any]) -> int:
    """How many nodes the options want in a cohort of this name.

    Raises:
        ConfigError: none, or no number of nodes.
    """
    return math.ceil(_size(name, options))


def _size(name: str, options: Mapping[str, Any]) -> float:
    size = float(options["cohort-size"])
    if not (size > 0 and math.isfinite(size)):
        raise ConfigError(
            f"cohort={name} needs cohort-size, the number of nodes in a round, but it is {size:g}"
        )
    return size


def _all(_: Mapping[str, Any]) -> Any:
    from umbel.strategies.samplers import Everyone

    return Everyone()


def _fixed(options: Mapping[str, Any]) -> Any:
    size = fixed_size("fixed", options)

    from umbel.strategies.samplers import FixedSize

    return FixedSize(size)


def _poisson(options: Mapping[str, Any]) -> Any:
    size, cap = _size("poisson", options), int(options["cohort-cap"])
    if cap and cap < size:
        raise ConfigError(
            f"cohort-cap is {cap}, below cohort-size {size:g}; set it to at least "
            f"{math.ceil(size + 3 * math.sqrt(size))}, or leave it out"
        )

    from umbel.strategies.samplers import Poisson

    return Poisson(size, cap or None)


def _power_of_choice(options: Mapping[str, Any]) -> Any:
    size = fixed_size("power-of-choice", options)
    candidates = int(options.get("cohort-candidates", 0))

    from umbel.strategies.power_of_choice import PowerOfChoice

    return PowerOfChoice(size, candidates)


def _oort(options: Mapping[str, Any]) -> Any:
    size = fixed_size("oort", options)

    from umbel.strategies.oort import Oort

    return Oort(size)


provide("sampler", "all", _all)
provide("sampler", "fixed", _fixed)
provide("sampler", "poisson", _poisson)
provide("sampler", "power-of-choice", _power_of_choice)
provide("sampler", "oort", _oort)
