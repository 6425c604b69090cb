"""Learning-rate schedules: a factor for each round, from 1 at the start."""

import math
from typing import Literal, get_args

from umbel.strategies.errors import ConfigError

Schedule = Literal["constant", "cosine", "linear", "step", "exponential"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


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
        gamma: see above.
        every: rounds between the steps of `step`.
        warmup: rounds over which the factor rises linearly to 1, before the schedule begins.

    Raises:
        ConfigError: an unknown schedule.

    >>> [round(factor("cosine", n, 3, gamma=0.0, every=1, warmup=0), 2) for n in (1, 2, 3)]
    [1.0, 0.75, 0.25]
    """
    if number <= warmup:
        return number / (warmup + 1)
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
