"""Learning-rate schedules: a factor for each round, from 1 at the start."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from umbel.core.errors import ConfigError

Schedule = Literal["constant", "cosine", "linear", "step", "exponential"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

OWN_GAMMA = {"step": 0.1, "exponential": 0.95}
"""What a gamma of 0 means where it is a factor: training must not stop by a default."""


def factor(
    schedule: str, number: int, rounds: int, *, gamma: float, every: int, warmup: int
) -> float:
    """What the learning rate is multiplied by in round `number`.

    Args:
        schedule: `constant`; `cosine` and `linear` fall towards `gamma`, which the
            round after the last would have;
            `step` multiplies by `gamma` each `every` rounds; `exponential` by `gamma` a round.
        number: from 1.
        rounds: planned rounds.
        gamma: see above; 0 is the schedule's own: `cosine` and `linear` fall to 0, `step`
            multiplies by 0.1 and `exponential` by 0.95.
        every: rounds between the steps of `step`.
        warmup: rounds over which the factor rises linearly to 1, before the schedule begins.

    Raises:
        ConfigError: an unknown schedule.

    >>> [round(factor("cosine", n, 3, gamma=0.0, every=1, warmup=0), 2) for n in (1, 2, 3)]
    [1.0, 0.75, 0.25]
    """
    if number <= warmup:
        return number / (warmup + 1)
    gamma = gamma or OWN_GAMMA.get(schedule, 0.0)
    done = number - warmup - 1
    last = max(1, rounds - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return gamma + (1 - gamma) * (1 + math.cos(math.pi * min(1.0, done / last))) / 2
        case "linear":
            return 1 - (1 - gamma) * min(1.0, done / last)
        case "step":
            return float(gamma ** (done // every))
        case "exponential":
            return float(gamma**done)
    raise ConfigError(f"schedule is {schedule!r}; it can be {', '.join(SCHEDULES)}")


def checked_rate(options: Mapping[str, Any]) -> float | None:
    """The nodes' learning rate before the schedule; None where there is no such option.

    Raises:
        ConfigError: it is no number of at least 0, or there is a schedule but no rate.
    """
    rate = options.get("learning-rate")
    schedule = options.get("schedule", "constant")
    if rate is None:
        if schedule != "constant" or options.get("warmup-rounds"):
            what = "warmup-rounds" if schedule == "constant" else f"schedule={schedule}"
            raise ConfigError(
                f"{what} changes the option learning-rate, which this trainer does not have; "
                "name it in Federation(options={'learning-rate': ...}), or leave the schedule out"
            )
        return None
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not number or not 0 <= rate < math.inf:
        raise ConfigError(f"learning-rate is {rate!r}; it must be a number of at least 0")
    return float(rate)
