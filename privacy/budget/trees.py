"""Tree aggregation: prefix sums of rounds with noise that grows with log(rounds), not rounds.

Round t releases one node of a binary tree over the rounds: the sum of the last 2^l rounds, where
2^l is the largest power of two that divides t (the binary counter of Chan, Shi and Song 2011;
DP-FTRL of Kairouz et al. 2021). No sampling is assumed, only that a unit takes part at most once
in any `separation` consecutive rounds.

All releases together are one Gaussian mechanism whose sensitivity counts, for the worst pattern
of participation, how often a unit is in each released node. The sensitivity of the releases so
far never falls, so each round is charged its growth: z / sqrt(s2(t) - s2(t-1)), and Gaussians
add up to exactly the mechanism's z / sqrt(s2(t)). That holds for rounds that depend on earlier
releases as well (Denisov et al. 2022, theorem 2.1).
"""

from dataclasses import dataclass

from umbel.privacy.validate import count


def level(step: int) -> int:
    """The level of the node that step `step` (from 1) releases: it spans 2**level steps."""
    return (step & -step).bit_length() - 1


def squared_sensitivity(steps: int, separation: int) -> int:
    """A bound on the squared sensitivity of the tree's first `steps` releases to one unit.

    In the unit of one contribution's norm. With one participation it is exact:
    floor(log2(steps)) + 1.

    Args:
        steps: releases so far, 0 or more.
        separation: a unit takes part at most once in this many consecutive steps.

    Raises:
        ValueError: separation is below 1.
    """
    count(separation=separation)
    times = -(-steps // separation)
    total = 0
    span = 1
    while span <= steps:
        inside = -(-span // separation)  # most participations in one node of this level
        total += inside * min(times, steps // span * inside)
        span *= 2
    return total


@dataclass(frozen=True)
class TreeSchedule:
    """A tree over rounds.

    Attributes:
        separation: a unit takes part at most once in this many consecutive rounds.
    """

    separation: int

    def __post_init__(self) -> None:
        count(separation=self.separation)

    def growth(self, step: int) -> float:
        """What step `step` (from 1) adds to the squared sensitivity."""
        now = squared_sensitivity(step, self.separation)
        return float(now - squared_sensitivity(step - 1, self.separation))
