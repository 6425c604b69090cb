"""Who takes part in a round.

A sampler is a value: it chooses nodes, round by round. It may look at who they are and at what
they did before; what the privacy accounting may assume of the choice, it says in `sampling`, and
one that says nothing gets no amplification.

    from umbel import Sampler    the protocol; `Everyone`, `FixedSize`, `Poisson` are Umbel's own
    Federation(sampler=...)      a value, a function of the options, or a name
    -c cohort=NAME               a name; see `umbel.register`
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from umbel.core.errors import ConfigError, RunError
from umbel.core.registry import make
from umbel.strategies import sampler_names as sampler_names


class SampledNode(Protocol):
    """A node, as a sampler sees it."""

    @property
    def name(self) -> str:
        """The name that people know it by."""
        ...

    @property
    def partition(self) -> int:
        """Its part of the data; nodes are given in this order."""
        ...


N = TypeVar("N", bound=SampledNode)


@dataclass(frozen=True)
class Sampling:
    """What an accountant may assume of a sampler's choice.

    Attributes:
        kind: `poisson`: each node with the same probability, independently of all others;
            `fixed`: so many of them, each set of that size equally likely.
        size: the expected number of nodes (of `poisson`), or the number (of `fixed`).
        cap: the most nodes of a Poisson round, of which a uniformly random part is kept; None is
            no cap.
    """

    kind: Literal["poisson", "fixed"]
    size: float
    cap: int | None = None


@dataclass(frozen=True)
class NodeHistory:
    """What one node did in earlier rounds.

    Attributes:
        asked: in how many rounds it was chosen.
        last: the latest of them; 0 is none.
        metrics: what it measured when it trained last, `num-examples` among them; nothing where
            the run is private or its updates are hidden.
    """

    asked: int = 0
    last: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingContext:
    """What a sampler knows of the round for which it chooses.

    Attributes:
        number: the round, from 1.
        entropy: seeds the choice; None draws from the operating system, as the accounting of a
            private run assumes.
        history: what nodes did before, by name; a node that is not in it did nothing.
    """

    number: int
    entropy: Sequence[int] | None = None
    history: Mapping[str, NodeHistory] = field(default_factory=dict)

    def generator(self) -> np.random.Generator:
        """A generator of random numbers for this round; the same one each time where it is seeded.

        In a private run it is seeded by the operating system, and differs from call to call.
        """
        return _generator(self.entropy)

    def of(self, node: SampledNode) -> NodeHistory:
        """What a node did before."""
        return self.history.get(node.name, _NOTHING)


_NOTHING = NodeHistory()


@runtime_checkable
class Sampler(Protocol):
    """Chooses the nodes of a round."""

    @property
    def name(self) -> str:
        """As in reports, and in the option `cohort` where it is registered."""
        ...

    @property
    def sampling(self) -> Sampling | None:
        """What an accountant may assume of the choice; None is nothing, so no amplification."""
        ...

    def bounds(self, population: int) -> tuple[float, int]:
        """The expected number of nodes and the largest, of so many.

        Both are public: a private average is divided by the first, whoever came.
        """
        ...

    def select(self, nodes: Sequence[N], ctx: SamplingContext) -> Sequence[N]:
        """The nodes of a round: some of `nodes`, none twice."""
        ...


@runtime_checkable
class ByLosses(Protocol):
    """A sampler that says whether its choice follows what nodes measured on their examples.

    Where a run hides that, such a choice would show it, so it is refused.
    """

    @property
    def name(self) -> str:
        """As in `Sampler`."""
        ...

    @property
    def by_losses(self) -> bool:
        """Whether it does."""
        ...


def loss_of(node: SampledNode, ctx: SamplingContext, name: str) -> float:
    """The loss that a node measured when it trained last; infinite where it never did.

    Raises:
        RunError: it measured none, or none that is a number.
    """
    history = ctx.of(node)
    if not history.metrics:
        return math.inf
    loss = history.metrics.get("loss", math.nan)
    if not math.isfinite(loss):
        raise RunError(
            f"cohort={name} chooses nodes by the loss that they measure in training, and node "
            f"{node.name} said {'none' if 'loss' not in history.metrics else loss}; return a "
            "finite loss among the metrics of training, or take cohort=fixed"
        )
    return float(loss)


def examples_of(
    nodes: Sequence[SampledNode], ctx: SamplingContext
) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Numbers of examples, shape (nodes,); the mean of the known ones where one is not known."""
    said = [float(ctx.of(node).metrics.get("num-examples", 0)) for node in nodes]
    known = [count for count in said if count > 0]
    usual = sum(known) / len(known) if known else 1.0
    return np.array([count if count > 0 else usual for count in said])


class Drawn:
    """For a sampler that draws positions, whoever the nodes are and whatever they did."""

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        """The round's positions 0..population-1, ascending."""
        raise NotImplementedError

    def select(self, nodes: Sequence[N], ctx: SamplingContext) -> list[N]:
        """The nodes at the positions drawn."""
        return [nodes[i] for i in self.draw(len(nodes), ctx.entropy)] if nodes else []


@dataclass(frozen=True)
class Everyone(Drawn):
    """All nodes, every round."""

    name: Literal["all"] = "all"
    sampling: None = None

    def bounds(self, population: int) -> tuple[float, int]:
        return float(population), population

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:  # noqa: ARG002
        return list(range(population))


@dataclass(frozen=True)
class FixedSize(Drawn):
    """`size` nodes, without replacement."""

    size: int
    name: Literal["fixed"] = "fixed"

    @property
    def sampling(self) -> Sampling:
        return Sampling("fixed", self.size)

    def bounds(self, population: int) -> tuple[float, int]:
        size = min(self.size, population)
        return float(size), size

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        size = min(self.size, population)
        return sorted(_generator(entropy).choice(population, size, replace=False).tolist())


@dataclass(frozen=True)
class Poisson(Drawn):
    """Each node with the same probability, independently of all others.

    Args:
        size: the expected number of nodes; the probability is size / population.
        cap: the most nodes a round may have, accounted as truncated Poisson; None is no cap.
            A round that draws more keeps a uniformly random part of them.
    """

    size: float
    cap: int | None = None
    name: Literal["poisson"] = "poisson"

    @property
    def sampling(self) -> Sampling:
        return Sampling("poisson", self.size, self.cap)

    def bounds(self, population: int) -> tuple[float, int]:
        most = population if self.cap is None else min(self.cap, population)
        return min(float(self.size), float(population)), most

    def draw(self, population: int, entropy: Sequence[int] | None) -> list[int]:
        generator = _generator(entropy)
        rate = self.bounds(population)[0] / population
        drawn = np.flatnonzero(_uniform(generator, population, entropy) < rate)
        if self.cap is not None and len(drawn) > self.cap:
            drawn = np.sort(generator.choice(drawn, self.cap, replace=False))
        return [int(position) for position in drawn]


def choose(sampler: Sampler, nodes: Sequence[N], ctx: SamplingContext) -> list[N]:
    """The nodes that a sampler selects, in their own order.

    Raises:
        RunError: some are not among `nodes`, one is there twice, or they are more than the sampler
            says a round can have.
    """
    chosen = list(sampler.select(nodes, ctx))
    if is_own(sampler):
        return chosen
    places = {node: place for place, node in enumerate(nodes)}
    strange = [node for node in chosen if node not in places]
    if strange:
        raise RunError(
            f"the sampler {sampler.name} chose {strange[0]!r} for round {ctx.number}, which is not "
            "one of the nodes that it was given; let select return some of them"
        )
    if len(set(chosen)) < len(chosen):
        raise RunError(
            f"the sampler {sampler.name} chose a node twice for round {ctx.number}; let select "
            "return each node once"
        )
    most = sampler.bounds(len(nodes))[1]
    if len(chosen) > most:
        raise RunError(
            f"the sampler {sampler.name} chose {len(chosen)} nodes for round {ctx.number}, and "
            f"says in bounds that there are {most} at most; let the two agree"
        )
    return sorted(chosen, key=places.__getitem__)


def check_bounds(sampler: Sampler, population: int) -> tuple[float, int]:
    """A sampler's bounds for a population.

    Raises:
        ConfigError: they cannot be those of a round.
    """
    expected, most = sampler.bounds(population)
    if not (0 < expected <= most <= population):
        raise ConfigError(
            f"the sampler {sampler.name} says that a round of {population} nodes has {expected:g} "
            f"nodes, at most {most}; let bounds return numbers above 0 and up to {population}, the "
            "expected one first"
        )
    return expected, most


def looks_back(sampler: Sampler) -> bool:
    """Whether a sampler may look at the nodes' history; those that draw positions do not."""
    return not isinstance(sampler, Drawn)


def remember(
    history: Mapping[str, NodeHistory],
    number: int,
    chosen: Sequence[SampledNode],
    measured: Mapping[str, Mapping[str, float]],
) -> dict[str, NodeHistory]:
    """The history after round `number`.

    Args:
        history: before it.
        number: the round.
        chosen: who was asked.
        measured: what nodes said that they measured, by name.
    """
    after = dict(history)
    for node in chosen:
        before = after.get(node.name, _NOTHING)
        metrics = dict(measured.get(node.name, before.metrics))
        after[node.name] = NodeHistory(before.asked + 1, number, metrics)
    return after


def is_own(sampler: Sampler) -> bool:
    """Whether what a sampler says of itself follows from Umbel's own code."""
    return type(sampler).__module__.startswith("umbel.strategies.")


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
    """The sampler that the options `cohort`, `cohort-size` and `cohort-cap` name.

    Raises:
        ConfigError: there is none of that name, or a size that it cannot have.
    """
    found: Sampler = make("sampler", name, {"cohort-size": size, "cohort-cap": cap})
    return found
