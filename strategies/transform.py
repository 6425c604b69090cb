"""The layer interface: what one file under `strategies/` may do to an update on its way.

A stack is a flat list of layers over one collect. For one round:

    server   check    list order     facts about one update, before any message is sent
    server   publish  list order     -> config that travels to every node
    node     encode   list order     update -> what is sent
    server   (the collect turns the replies into one sum)
    server   decode   reverse order  sum -> the average update
    server   claim    reverse order  on the facts at the bottom of the stack

State is passed in and out, never kept on `self`: checkpoints cover every layer for free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from flwr.app import RecordDict
from torch import Tensor

if TYPE_CHECKING:  # importing it takes a second, which a run without privacy need not wait
    from dp_accounting import DpEvent, NeighboringRelation

    from umbel.privacy.bounds.bundle import Bundle

Config = Mapping[str, bool | int | float | str | bytes]
"""What a layer tells the nodes: a flat record of scalars."""

Metrics = Mapping[str, float]
"""Names to numbers; a layer's own are called `"{layer}.{what}"` by the stack."""

S = TypeVar("S")


@dataclass(frozen=True)
class Facts:
    """What is known of one node's update at a point of the stack.

    Attributes:
        size: number of coordinates.
        l2_bound: no update is longer than this, in the update's own unit; None is no bound.
        weight_bound: no update is multiplied by more than this before it is summed; None is
            no bound (weights such as numbers of examples).
        modulus: coordinates are integers modulo this; None is real numbers.
        server_sees: each update, or only their sum.
        min_replies: the smallest number of updates that a sum is ever made of.
        grid: coordinates are multiples of this power of two, so that sums are exact; None is
            any real number.
        public_denominator: the sum is divided by a number that does not depend on who came.
        round: the round that the facts are about, from 1; 0 before the first.
        expected_replies: the expected number of updates in a sum; 0 is not known.
        max_replies: the largest number of updates in a sum; 0 is not known.
        spread: standard deviation of a coordinate of any one update, after a random rotation
            that spreads it evenly; None is without.
        noise: standard deviation of the noise that all nodes together add to a coordinate.
        wide: an update needs float64, because float32 does not hold every value that it can have.
        kind: what the collect makes of the updates: their `sum`, or a choice that it makes by
            looking at `each` (a median); None where it does not say. Noise that hides one
            update in the result, and secure sums, need a sum.
        averages_buffers: the collect also averages the nodes' running statistics.
    """

    size: int
    l2_bound: float | None = None
    weight_bound: float | None = None
    modulus: int | None = None
    server_sees: Literal["each", "sum"] = "each"
    min_replies: int = 1
    grid: float | None = None
    public_denominator: bool = False
    round: int = 0
    expected_replies: float = 0.0
    max_replies: int = 0
    spread: float | None = None
    noise: float = 0.0
    wide: bool = False
    kind: Literal["sum", "each"] | None = None
    averages_buffers: bool = False

    def replace(self, **changes: Any) -> Facts:
        """These facts with some replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Claim:
    """What one round costs, and to whom it is promised.

    Attributes:
        event: the mechanism of one round, without subsampling (the cohort adds that).
        unit: whose presence is hidden.
        relation: the neighbouring relation that the event's parameters refer to.
        against: who may look at the output of the mechanism.
        sampled: whether the cohort's secret sampling amplifies it.
        repeat_event: the event of a round that is run once more after a crash; None is `event`.
        extra_delta: what the round adds to delta.
        seen_in_sum_only: who it is against sees it in the round's sum only, once that is released.
        separation: a unit takes part at most once in this many consecutive rounds.
        mechanism: how the noise is made, in the words of the option `mechanism`, such as `local`;
            empty for another way.
    """

    event: DpEvent
    unit: Literal["client", "example"]
    relation: NeighboringRelation
    against: Literal["model-user", "server", "other-clients"]
    sampled: bool = True
    repeat_event: DpEvent | None = None
    extra_delta: float = 0.0
    seen_in_sum_only: bool = False
    separation: int = 1
    mechanism: str = ""


@dataclass(frozen=True)
class Round:
    """The public facts of the round that is being decoded.

    Attributes:
        number: from 1.
        cohort: the expected number of nodes, the public denominator of a private average.
        replies: how many updates the sum is made of. Under a private stack the exact number is
            nobody's to know: layers are told the expected one.
        weight: the sum of the updates' weights; under a private stack likewise.
        facts: at the bottom of the stack.
        generator: seeded by the run; for choices that need not be secret.
        entering: the facts as an update enters the layer that is being decoded.
        denominator: what the stack will divide the decoded sum by.
    """

    number: int
    cohort: float
    replies: int
    weight: float
    facts: Facts
    generator: torch.Generator
    entering: Facts | None = None
    denominator: float = 0.0


class Transform(Protocol[S]):
    """One file, both halves; methods in the order in which they happen."""

    @property
    def name(self) -> str:
        """The layer's name in metrics, configs and checkpoints."""
        ...

    def init(self, size: int) -> S:
        """Server, once: the state before the first round, for updates of `size` coordinates."""
        ...

    def check(self, facts: Facts, state: S) -> Facts:
        """Server, list order: the facts after this layer; raises StackError with the cure."""
        ...

    def publish(self, state: S) -> Config:
        """Server: what every node must know this round; the stack adds `bound`, see there."""
        ...

    def encode(self, update: Tensor, config: Config, memory: RecordDict) -> tuple[Tensor, Metrics]:
        """Node, list order: a flat update of shape (size,) to what the next layer gets.

        `memory` is the node's own and lasts over rounds. The input is never mutated.
        """
        ...

    def decode(
        self, total: Tensor, metrics: Metrics, state: S, rnd: Round
    ) -> tuple[Tensor, S, Metrics]:
        """Server, reverse order: the sum (or average) of shape (size,), and the next state."""
        ...

    def claim(self, facts: Facts) -> Claim | None:
        """Server: what a round costs, on the facts at the bottom of the stack.

        A layer that claims makes its stack private: nothing leaves a node beside the update, the
        run keeps a ledger, and what stands below the layer must not undo it
        (`umbel.strategies.order`).
        """
        ...


@runtime_checkable
class SeesMetrics(Protocol):
    """A layer that takes what a node measured into the update, instead of sending it beside."""

    def attach(self, update: Tensor, metrics: Metrics, config: Config) -> Tensor:
        """Node, before `encode`: the update with coordinates for `metrics` at its end."""
        ...


@runtime_checkable
class TellsFacts(Protocol):
    """A layer whose nodes must know what follows from the facts at its place of the stack."""

    def tell(self, facts: Facts, state: Any) -> Config:
        """Server: what every node must know this round, beside what `publish` says."""
        ...


@runtime_checkable
class EncodesMany(Protocol):
    """A layer whose node half can take the updates of several virtual nodes at once."""

    def encode_many(self, bundle: Bundle, config: Config) -> Bundle:
        """Node: what `encode` gives for each update of the bundle."""
        ...


@runtime_checkable
class Isometry(Protocol):
    """A layer that says whether its server half may stand below noise.

    It may where it is a fixed linear map that makes no sum longer, releases nothing and keeps
    nothing. A layer without this attribute does not say so, and `Stack` tries those that do.
    """

    @property
    def isometry(self) -> bool:
        """Whether `decode` is such a map."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A layer whose noise follows from a budget, once cohorts and rounds are known."""

    @property
    def noise_multiplier(self) -> float | None:
        """Standard deviation of the noise over the bound of one update; None if undecided."""
        ...

    def with_noise(self, noise_multiplier: float) -> Transform[Any]:
        """This layer with its noise decided."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """A layer whose noise can be repeated for tests, which then hides nothing."""

    @property
    def insecure_seed(self) -> int | None:
        """The seed; None is the operating system's entropy."""
        ...

    def without_seed(self) -> Self:
        """This layer with real noise."""
        ...


@runtime_checkable
class Separated(Protocol):
    """A layer whose promise needs nodes to rest."""

    @property
    def separation(self) -> int:
        """A node takes part at most once in this many consecutive rounds."""
        ...


class Unclaimed:
    """For a layer that promises no privacy."""

    def claim(self, facts: Facts) -> Claim | None:  # noqa: ARG002
        return None


class IdleNode:
    """For a layer whose node half does nothing."""

    def encode(
        self,
        update: Tensor,
        config: Config,  # noqa: ARG002
        memory: RecordDict,  # noqa: ARG002
    ) -> tuple[Tensor, Metrics]:
        return update, {}


class IdleServer:
    """For a layer whose server half does nothing."""

    def decode(
        self,
        total: Tensor,
        metrics: Metrics,  # noqa: ARG002
        state: Any,
        rnd: Round,  # noqa: ARG002
    ) -> tuple[Tensor, Any, Metrics]:
        return total, state, {}


class Stateless(IdleNode, IdleServer, Unclaimed):
    """Identity halves for a layer without state: it writes only what it does."""

    isometry: ClassVar[bool] = False

    def init(self, size: int) -> None:  # noqa: ARG002
        return None

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        return facts

    def publish(self, state: None) -> Config:  # noqa: ARG002
        return {}


# ---- what a layer does, read off its code and not off what it says of itself


def acts_on_updates(layer: Transform[Any]) -> bool:
    """Whether its node half does anything to an update."""
    return not _inherits(layer, "encode", IdleNode) or isinstance(layer, SeesMetrics)


def acts_on_sums(layer: Transform[Any]) -> bool:
    """Whether its server half does anything to a sum."""
    return not _inherits(layer, "decode", IdleServer)


def _inherits(layer: object, method: str, base: type[Any]) -> bool:
    """Whether a layer's method is the one of `base`, which does nothing."""
    return isinstance(layer, base) and getattr(type(layer), method) is getattr(base, method)


_PROBES = (
    Facts(size=1, kind="sum"),
    Facts(
        size=1,
        l2_bound=1.0,
        weight_bound=1.0,
        server_sees="sum",
        grid=2.0**-17,
        public_denominator=True,
        round=1,
        expected_replies=1024.0,
        max_replies=1024,
        kind="sum",
    ),
)


def claims_privacy(layer: Transform[Any]) -> bool:
    """Whether a layer has anything to claim: then its stack is private.

    A claim that fails on the facts it is asked about would be one on others.
    """
    if _inherits(layer, "claim", Unclaimed):
        return False
    try:
        return any(layer.claim(facts) is not None for facts in _PROBES)
    except Exception:
        return True
