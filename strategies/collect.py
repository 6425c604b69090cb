"""How the replies of a round become one sum: the bottom of every stack.

A collect is a generator. It yields lists of requests; for each it is sent an iterator of the
replies in order of arrival; it returns the sum. So a protocol of several trips reads from top
to bottom and knows nothing of networks. `umbel.server.rounds.drive` runs it over a Flower grid.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.core.records import from_array
from umbel.privacy.bounds.clipping import is_within, l2_norm
from umbel.privacy.noise.lattice import on_grid
from umbel.strategies.example_weights import TIMES, Counted, LimitedFold, Patience
from umbel.strategies.ordered_sum import OrderedSum, exact_block
from umbel.strategies.transform import Facts, Metrics

if TYPE_CHECKING:  # it is about stacks, which have a collect
    from umbel.strategies.contract import Contract

UPDATE = "update"
"""Name of the reply's ArrayRecord, and in it of the flat update."""
BUFFERS = "buffers"
"""In the same record: the node's floating-point buffers as one flat vector, where they travel."""
METRICS = "metrics"
"""Name of the reply's MetricRecord."""
COUNTED = "counted"
"""Beside it, where some metrics are of fewer examples than others: of how many each is."""
NO_REPLY = "no reply in time"
"""Why a node that said nothing is not in the sum."""
EXAMPLES = "num-examples"
"""In that record: how many examples the update was made from (Flower's own key)."""

LARGEST_METRIC = 1e100
"""Whatever a node reports beyond this is no measurement; sums of smaller ones stay finite."""

LENIENCE = 1e-9
"""Two machines may add up the squares of one update in different orders."""

FEW = 8
"""Where float32 adds up fewer updates exactly, adding in float64 at once is no more work."""

PARALLEL = 1 << 18
"""Coordinates from which the threads of a dot product are worth waking."""

ClientFn = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class Rejected:
    """A reply that was not used."""

    node_id: int
    reason: str


@dataclass(frozen=True)
class Limited:
    """A reply that counts for less than its sender said.

    Attributes:
        node_id: the sender.
        said: its number of examples, as it said it.
        counted: the weight that it got.
        why: the limit, in words.
    """

    node_id: int
    said: float
    counted: float
    why: str


@dataclass(frozen=True)
class Sum:
    """What a collect returns.

    Attributes:
        total: weighted sum of the updates, shape (size,); zeros when nothing arrived.
        weight: sum of the weights.
        replies: how many updates are in the sum.
        denominator: what turns the sum into an average; 0 where there is none.
        metrics: weighted means of the nodes' metrics, over the nodes that sent each.
        buffers: weighted mean of the nodes' buffers, where they travel.
        rejected: replies that were not used, and why.
        bytes_up: size of all replies.
        aborted: why there is no sum at all, or empty. The model then stays as it was.
        revealed: somebody could know the sum; it is False only where that is impossible.
        about: what the run should write down of how the sum came about.
        limited: replies that count for less than their senders said.
    """

    total: Tensor
    weight: float
    replies: int
    denominator: float
    metrics: Metrics = field(default_factory=dict)
    buffers: Tensor | None = None
    rejected: tuple[Rejected, ...] = ()
    bytes_up: int = 0
    aborted: str = ""
    revealed: bool = True
    about: Mapping[str, str | int] = field(default_factory=dict)
    limited: tuple[Limited, ...] = ()


@dataclass(frozen=True)
class Gathering:
    """What a collect knows of the round that it gathers.

    Attributes:
        number: the round, from 1.
        size: coordinates of an update.
        dtype: of an update before any layer.
        cohort: the expected number of nodes; the denominator of a fixed average.
        facts: at the bottom of the stack.
        buffers: coordinates of the nodes' buffers; 0 where they stay local.
        run_id: of Flower's run.
        contract: what nodes act on, as the server reckons it; None takes their word.
    """

    number: int
    size: int
    dtype: torch.dtype
    cohort: float
    facts: Facts
    buffers: int = 0
    run_id: int = 0
    contract: "Contract | None" = None


Gather = Generator[Sequence[Message], Iterator[Message], Sum]


class Collect(Protocol):
    """The bottom of a stack; exactly one."""

    @property
    def name(self) -> str:
        """The collect's name in configs and reports."""
        ...

    def check(self, facts: Facts) -> Facts:
        """The facts about one update as it enters the sum; raises StackError with the cure.

        Says `kind`, what the collect makes of the updates: without it, nothing that promises
        privacy stands on this collect. Whoever writes a collect of their own can say what they
        like, so noise stands on Umbel's own alone (`is_own`).
        """
        ...

    def gather(self, requests: Sequence[Message], round_: Gathering) -> Gather:
        """Yield requests, receive iterators of replies, return the sum."""
        ...

    def answers(self) -> Mapping[str, ClientFn]:
        """The node's half of extra trips: query actions by name."""
        ...


def is_own(collect: Collect) -> bool:
    """Whether the facts that a collect says follow from Umbel's own code.

    Of a class that an app wrote, one derived from `PlainSum` included, they are its author's word.
    """
    return type(collect).__module__.startswith("umbel.strategies.")


@dataclass(frozen=True)
class Sealing:
    """What a node knows of its own part when it seals an update.

    Attributes:
        contract: digests of what it acts on; see `umbel.strategies.contract`.
        shares: into how many shares the noise in its update is cut; 0 is no such noise.
    """

    contract: bytes = b""
    shares: int = 0


@runtime_checkable
class Seals(Protocol):
    """A collect whose nodes do not send the update itself when they have trained."""

    def seal(
        self, content: RecordDict, request: Message, context: Context, own: Sealing
    ) -> RecordDict:
        """Node: what is sent in place of `content`."""
        ...


@runtime_checkable
class Considers(Protocol):
    """A collect that seals, and can tell before training that it would not."""

    def consider(self, request: Message, context: Context, own: Sealing) -> RecordDict | None:
        """Node: the refusal that is sent in place of an update; None where there is none."""
        ...


@dataclass(frozen=True)
class PlainSum:
    """The server adds up the updates in the clear, one after the other as they arrive.

        server -> node  the request            (every node of the cohort)
        node -> server  update, weight         the server sees each

    Args:
        weighting: by `examples` (McMahan et al. 2017, section 2); `equal` over the replies; or
            `fixed`: equal weights and the expected cohort as denominator, which a bounded
            sensitivity needs.
        longest: an update with a larger Euclidean norm is rejected; a divergent node must not
            ruin the round.
        hold_bytes: memory for replies that arrive before their turn.
        max_examples: by `examples`, the largest number that a node counts for; 0 is ten times
            the median of the round, see `umbel.strategies.example_weights`.
    """

    weighting: Literal["examples", "equal", "fixed"] = "examples"
    longest: float = 1e8
    hold_bytes: int = 64 << 20
    max_examples: int = 0
    name: str = "plain-sum"

    def check(self, facts: Facts) -> Facts:
        return facts.replace(
            kind="sum",
            averages_buffers=True,
            server_sees="each",
            weight_bound=None if self.weighting == "examples" else 1.0,
            public_denominator=self.weighting == "fixed",
        )

    def answers(self) -> Mapping[str, ClientFn]:
        return {}

    def gather(self, requests: Sequence[Message], round_: Gathering) -> Gather:
        nodes = [message.metadata.dst_node_id for message in requests]
        position = {node: i for i, node in enumerate(nodes)}
        fold = self._fold(round_)
        buffers = None
        if round_.buffers:
            buffers = self._like(fold, round_.buffers, torch.float64)
        metrics: dict[int, dict[str, float]] = {}
        rejected: list[Rejected] = []
        bytes_up = 0
        for reply in (yield requests):
            node = reply.metadata.src_node_id
            where = position.pop(node, None)
            if where is None:  # an unknown sender, or a second reply: neither has a place
                rejected.append(Rejected(node, "a reply that nobody asked for"))
                continue
            try:
                update, weight, size = self._read(reply, round_)
                if buffers is not None:
                    buffers.offer(where, read_buffers(reply, round_.buffers), weight)
            except ValueError as error:
                rejected.append(Rejected(node, str(error)))
                fold.skip(where)
                if buffers is not None:
                    buffers.skip(where)
                continue
            fold.offer(where, update, weight)
            metrics[where] = numbers(reply)
            bytes_up += size
            del reply, update  # while the next is awaited, this one must not take room
        rejected += [Rejected(node, NO_REPLY) for node in position]
        sum_ = fold.finish()
        weights, limited = self._counted(fold, sorted(metrics), nodes)
        means = MeanMetrics()
        for where, weight in weights.items():
            means.add(where, metrics[where], weight)
        total = math.fsum(weights.values())
        return Sum(
            total=sum_,
            weight=total,
            replies=len(weights),
            denominator=round_.cohort if self.weighting == "fixed" else total,
            metrics=means.result(),
            buffers=buffers.finish() / total if buffers is not None and total else None,
            rejected=tuple(rejected),
            bytes_up=bytes_up,
            limited=limited,
        )

    def _fold(self, round_: Gathering) -> OrderedSum:
        """Where the updates are added up: exactly, if they lie on a grid and count alike."""
        facts, dtype = round_.facts, round_.dtype
        if self.weighting == "examples":
            dtype = torch.float64 if facts.wide else dtype
            term = round_.size * dtype.itemsize
            patience = Patience.of(self.max_examples, term, self.hold_bytes)
            return LimitedFold(round_.size, dtype, self.hold_bytes, patience=patience)
        block = exact_block(facts.l2_bound, facts.grid)
        off_grid = facts.l2_bound is not None and facts.grid is None
        if facts.wide or off_grid or block < FEW:
            return OrderedSum(round_.size, torch.float64, self.hold_bytes)
        return OrderedSum(round_.size, dtype, self.hold_bytes, block)

    def _like(self, fold: OrderedSum, size: int, dtype: torch.dtype) -> OrderedSum:
        """A fold for other vectors of the same replies, in which they count the same."""
        if isinstance(fold, LimitedFold):
            return LimitedFold(size, dtype, self.hold_bytes, patience=fold.patience)
        return OrderedSum(size, dtype)

    def _counted(
        self, fold: OrderedSum, places: Sequence[int], nodes: Sequence[int]
    ) -> tuple[dict[int, float], tuple[Limited, ...]]:
        """By place in the cohort what each reply counts for; and those that were limited."""
        if not isinstance(fold, LimitedFold):
            return dict.fromkeys(places, 1.0), ()
        counted = dict(zip(places, fold.counted, strict=True))
        limited = [
            Limited(nodes[where], one.said, one.weight, self._limit_in_words(one))
            for where, one in counted.items()
            if one.weight < one.said
        ]
        return {where: one.weight for where, one in counted.items()}, tuple(limited)

    def _limit_in_words(self, one: Counted) -> str:
        if self.max_examples:
            return f"max-examples is {self.max_examples}"
        return (
            f"no node counts for more than {TIMES} times the median of its round, which is "
            f"{one.median:g}; max-examples=N sets a limit of your own"
        )

    def _read(self, reply: Message, round_: Gathering) -> tuple[Tensor, float, int]:
        """One reply's update, weight and size in bytes; ValueError says what is wrong with it."""
        update = read_vector(reply, UPDATE, round_.size)
        wide = round_.facts.wide and update.dtype == torch.float64
        if update.dtype != round_.dtype and not wide:
            raise ValueError(f"an update of {update.dtype}, but the model is {round_.dtype}")
        facts = round_.facts
        longest = self.longest if facts.l2_bound is None else facts.l2_bound
        if facts.l2_bound is None:  # a quick look will do
            short = _length(update) <= longest  # not true of NaN
        else:
            short = is_within(update, longest * (1 + LENIENCE))
        if not short:
            length = l2_norm(update)
            what = f"norm {length:.6g}" if math.isfinite(length) else "NaN or infinity"
            cure = "; lower learning-rate" if facts.l2_bound is None else ""
            raise ValueError(f"an update with {what}, but {longest:.6g} is the longest taken{cure}")
        if facts.grid is not None and not on_grid(update, facts.grid):
            raise ValueError("an update off the grid that all nodes round to")
        weight = 1.0
        if self.weighting == "examples":
            weight = numbers(reply).get(EXAMPLES, 0.0)
            if not 0 < weight < 2**53:
                raise ValueError(f"{EXAMPLES} is {weight!r}, which is no weight")
        return update, weight, update.numel() * update.element_size()


def _length(update: Tensor) -> float:
    """A quick look at the norm: NaN or infinity where a coordinate is not finite."""
    if update.numel() < PARALLEL:
        return float(torch.linalg.vector_norm(update))  # unlike a dot product, on one thread
    return math.sqrt(float(torch.dot(update, update)))


def read_vector(reply: Message, name: str, size: int) -> Tensor:
    """The flat vector `name` of a reply's update record; ValueError says what is wrong."""
    if reply.has_error():
        raise ValueError(reply.error.reason or f"error code {reply.error.code}")
    record = reply.content.get(UPDATE)  # not `array_records`, which copies the whole directory
    if not isinstance(record, ArrayRecord) or name not in record:
        raise ValueError(f"a reply without {name!r}")
    vector = from_array(record[name])
    if vector.shape != (size,):
        raise ValueError(f"{name!r} has the shape {tuple(vector.shape)}, not ({size},)")
    return vector


def read_buffers(reply: Message, size: int) -> Tensor:
    """The flat buffers of a reply; ValueError says what is wrong with them."""
    vector = read_vector(reply, BUFFERS, size)
    if not vector.is_floating_point():
        raise ValueError(f"{BUFFERS!r} is of {vector.dtype}, but running statistics are real")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{BUFFERS!r} with NaN or infinity")
    return vector


def numbers(reply: Message, name: str = METRICS) -> dict[str, float]:
    """The scalar metrics of a reply; integers beyond any float become infinity."""
    record = reply.content.get(name) if reply.has_content() else None
    if not isinstance(record, MetricRecord):
        return {}
    return {k: _float(v) for k, v in record.items() if isinstance(v, int | float)}


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


class MeanMetrics:
    """Weighted means of metrics, whose bits do not depend on the order of arrival."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[dict[str, float], float]] = {}

    def add(self, position: int, metrics: Mapping[str, float], weight: float) -> None:
        """Take one node's metrics."""
        self._rows[position] = ({k: v for k, v in metrics.items() if k != EXAMPLES}, weight)

    def result(self) -> dict[str, float]:
        """The means, each over the nodes that sent a value that can be one."""
        terms: dict[str, list[tuple[float, float]]] = {}
        for metrics, weight in self._rows.values():
            for name, value in metrics.items():
                if abs(value) <= LARGEST_METRIC:  # not true of NaN
                    terms.setdefault(name, []).append((value * weight, weight))
        return {
            name: math.fsum(value for value, _ in rows) / math.fsum(weight for _, weight in rows)
            for name, rows in sorted(terms.items())
        }
