"""Who takes part in a round."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from umbel.core.errors import ConfigError


class Sampler(Protocol):
    """Chooses positions 0..population-1 for a round."""

    @property
    def name(self) -> str:
        """As in the option `cohort`."""
        ...

    def expected(self, population: int) -> float:
        """The expected number of nodes: a public number, unlike the number drawn."""
        ...

    def most(self, population: int) -> int:
        """The largest number of nodes a round can have."""
        ...

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        """The round's positions, ascending.

        Args:
            population: how many nodes there are.
            entropy: seeds the choice; None draws from the operating system, as the accounting
                of a private run assumes.
        """
        ...


@dataclass(frozen=True)
class Everyone:
    """All nodes, every round."""

    name: Literal["all"] = "all"

    def expected(self, population: int) -> float:
        return float(population)

    def most(self, population: int) -> int:
        return population

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:  # noqa: ARG002
        return list(range(population))


@dataclass(frozen=True)
class FixedSize:
    """`size` nodes, without replacement."""

    size: int
    name: Literal["fixed"] = "fixed"

    def expected(self, population: int) -> float:
        return float(min(self.size, population))

    def most(self, population: int) -> int:
        return min(self.size, population)

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        size = min(self.size, population)
        return sorted(_generator(entropy).choice(population, size, replace=False).tolist())


@dataclass(frozen=True)
class Poisson:
    """Each node with the same probability, independently of all others.

    Args:
        size: the expected number of nodes; the probability is size / population.
        cap: the most nodes a round may have, accounted as truncated Poisson; None is no cap.
            A round that draws more keeps a uniformly random part of them.
    """

    size: float
    cap: int | None = None
    name: Literal["poisson"] = "poisson"

    def expected(self, population: int) -> float:
        return min(float(self.size), float(population))

    def most(self, population: int) -> int:
        return population if self.cap is None else min(self.cap, population)

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        generator = _generator(entropy)
        rate = self.expected(population) / population
        drawn = np.flatnonzero(_uniform(generator, population, entropy) < rate)
        if self.cap is not None and len(drawn) > self.cap:
            drawn = np.sort(generator.choice(drawn, self.cap, replace=False))
        return [int(position) for position in drawn]


def _uniform(
    generator: np.random.Generator, count: int, entropy: Sequence[int] | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform numbers in [0, 1): straight from the operating system where nothing is seeded."""
    if entropy is not None:
        return generator.random(count)
    words = np.frombuffer(secrets.token_bytes(8 * count), "<u8")
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _generator(entropy: Sequence[int] | None) -> np.random.Generator:
    if entropy is None:
        entropy = [secrets.randbits(128)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy))))


def make_sampler(name: str, size: float, cap: int = 0) -> Sampler:
    """The cohort that the options `cohort`, `cohort-size` and `cohort-cap` name.

    Raises:
        ConfigError: no such cohort, or a size that it cannot have.
    """
    if name == "all":
        return Everyone()
    if name not in ("fixed", "poisson"):
        raise ConfigError(f"cohort is {name!r}; it can be all, fixed or poisson")
    if not (size > 0 and math.isfinite(size)):
        raise ConfigError(
            f"cohort={name} needs cohort-size, the number of nodes in a round, but it is {size:g}"
        )
    if name == "fixed":
        return FixedSize(math.ceil(size))
    if cap and cap < size:
        raise ConfigError(
            f"cohort-cap is {cap}, below cohort-size {size:g}; set it to at least "
            f"{math.ceil(size + 3 * math.sqrt(size))}, or leave it out"
        )
    return Poisson(float(size), cap or None)
