"""The layer interface: what one file under `strategies/` may do to an update on its way.

A stack is a flat list of layers over one collect. For one round:

    server   check    list order     facts about one update, before any message is sent
    server   broadcast  list order   -> scalars and tensors that travel to every node
    node     encode   list order     update -> what is sent
    server   (the collect turns the replies into one sum)
    server   decode   reverse order  sum -> the average update
    server   claim    reverse order  on the facts at the bottom of the stack

State is passed in and out, never kept on `self`: checkpoints cover every layer for free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor

from umbel.strategies.contexts import Broadcast as Broadcast
from umbel.strategies.contexts import Config as Config
from umbel.strategies.contexts import Metrics as Metrics
from umbel.strategies.contexts import NodeContext as NodeContext
from umbel.strategies.contexts import RoundContext as RoundContext
from umbel.strategies.facts import Claim as Claim
from umbel.strategies.facts import Facts as Facts

Round = RoundContext
"""The former name of `RoundContext`."""

if TYPE_CHECKING:
    from umbel.privacy.bounds.bundle import Bundle

S = TypeVar("S")


@runtime_checkable
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

    def broadcast(self, state: S, facts: Facts) -> Broadcast:
        """Server: what every node must know this round; the stack adds `bound`, see there.

        `facts` are those of an update as it enters the layer.
        """
        ...

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        """Node, list order: a flat update of shape (size,) to what the next layer gets.

        The input is never mutated.
        """
        ...

    def decode(self, total: Tensor, state: S, ctx: RoundContext) -> tuple[Tensor, S]:
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
class Needs(Protocol):
    """A layer that says what its node half needs beyond the update.

    `metrics`: what the node measured in training, to take it into the update instead of sending
    it beside. `steps`: `ctx.steps`, so that the trainer has to say them. `start-loss`:
    `ctx.start_loss`, which costs a pass over the node's examples. `parts` and `ahead` are what its
    correction asks of the trainer (`umbel.strategies.objective`).
    """

    @property
    def needs(self) -> frozenset[str]:
        """Some of `metrics`, `steps`, `start-loss`, `parts` and `ahead`."""
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

    needs: ClassVar[frozenset[str]] = frozenset()

    def broadcast(self, state: Any, facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast()

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return update


class IdleServer:
    """For a layer whose server half does nothing."""

    def decode(self, total: Tensor, state: Any, ctx: RoundContext) -> tuple[Tensor, Any]:  # noqa: ARG002
        return total, state


class Stateless(IdleNode, IdleServer, Unclaimed):
    """Identity halves for a layer without state: it writes only what it does."""

    isometry: ClassVar[bool] = False

    def init(self, size: int) -> Any:  # noqa: ARG002
        return None

    def check(self, facts: Facts, state: Any) -> Facts:  # noqa: ARG002
        return facts


# ---- what a layer does, read off its code and not off what it says of itself


def acts_on_updates(layer: Transform[Any]) -> bool:
    """Whether its node half does anything to an update."""
    return not _inherits(layer, "encode", IdleNode)


def needs_of(layer: object) -> frozenset[str]:
    """What a layer's node half needs beyond the update; a layer that does not say needs nothing."""
    return layer.needs if isinstance(layer, Needs) else frozenset()


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
