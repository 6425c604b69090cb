"""How the replies of a round reach an aggregator: the bottom of every stack.

An exchange is a generator. It yields lists of requests; for each it is sent an iterator of the
replies in order of arrival; it returns the aggregate. So a protocol of several trips reads from
top to bottom and knows nothing of networks. `umbel.server.drive` runs it over a Flower grid.

Which rule the contributions go into is the aggregator's (`umbel.strategies.aggregator`): a
`PlainExchange` reads every reply and feeds any rule; one that sums in secret can feed only a rule
that takes sums.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.core.contents import take_record
from umbel.core.names import (
    BUFFERS,
    EXAMPLES,
    MEMBERS,
    METRICS,
    MODEL,
    NO_REPLY,
    POOL,
    UPDATE,
)
from umbel.core.records import from_array
from umbel.privacy.bounds.clipping import is_within, l2_norm
from umbel.privacy.noise.lattice import on_grid
from umbel.strategies.aggregator import (
    Aggregate,
    Aggregator,
    Contribution,
    Rejected,
    RoundSpec,
)
from umbel.strategies.transform import Facts

LENIENCE = 1e-9
"""Two machines may add up the squares of one update in different orders."""

PARALLEL = 1 << 18
"""Coordinates from which the threads of a dot product are worth waking."""

ClientFn = Callable[[Message, Context], Message]
Gather = Generator[Sequence[Message], Iterator[Message], Aggregate]


@runtime_checkable
class Exchange(Protocol):
    """The bottom of a stack; exactly one."""

    @property
    def name(self) -> str:
        """In configs and reports."""
        ...

    def check(self, facts: Facts) -> Facts:
        """The facts of the result, from those of one update; raises StackError with the cure.

        Says `kind`, what becomes of the updates: without it, nothing that promises privacy stands
        on this exchange. Whoever writes one of their own can say what they like, so noise stands
        on Umbel's own alone (`is_own`).
        """
        ...

    def gather(self, requests: Sequence[Message], round_: RoundSpec) -> Gather:
        """Yield requests, receive iterators of replies, return the aggregate."""
        ...

    def answers(self) -> Mapping[str, ClientFn]:
        """The node's half of extra trips: query actions by name."""
        ...


@runtime_checkable
class Feeds(Protocol):
    """An exchange that says which rule it feeds, as all of Umbel's own do."""

    @property
    def aggregator(self) -> Aggregator[Any]:
        """The rule."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """An exchange whose weights can be decided by who builds a stack."""

    def weighted(self, weighting: str) -> Self:
        """The same with other weights; `fixed` counts everyone once, over the expected cohort."""
        ...


@runtime_checkable
class CapsExamples(Protocol):
    """An exchange that can limit for how many examples a node counts."""

    def with_max_examples(self, most: int) -> Self | None:
        """The same with this limit; None where numbers of examples do not count."""
        ...


@runtime_checkable
class LooksAtSums(Protocol):
    """A rule that can do with sums over several nodes, in secret, in place of each update."""

    def over_sums(self, mode: str, min_cohort: int) -> Exchange:
        """The exchange that sums so, and feeds the rule; arguments as of `SecureSum`."""
        ...


@runtime_checkable
class ComparesWithOwn(Protocol):
    """A rule that compares updates with one that the server's own examples make."""

    def compared_with(self, reference: Callable[[Message], Tensor]) -> Aggregator[Any]:
        """The rule with the way from a request of the round to the server's own update."""
        ...


@runtime_checkable
class Advises(Protocol):
    """An exchange that has something to say before a run starts."""

    def advice(self, cohort: float, private: bool) -> Sequence[str]:
        """Sentences for a person, by the expected cohort and whether the run is private."""
        ...


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
    """An exchange whose nodes do not send the update itself when they have trained."""

    def seal(
        self, content: RecordDict, request: Message, context: Context, own: Sealing
    ) -> RecordDict:
        """Node: what is sent in place of `content`."""
        ...


@runtime_checkable
class Masks(Seals, Protocol):
    """An exchange whose nodes mask their updates, so that the server sees sums of them only."""

    @property
    def mode(self) -> str:
        """What the masks withstand: `malicious`, `semi-honest`, or `auto`."""
        ...


@runtime_checkable
class Considers(Protocol):
    """An exchange that seals, and can tell before training that it would not."""

    def consider(self, request: Message, context: Context, own: Sealing) -> RecordDict | None:
        """Node: the refusal that is sent in place of an update; None where there is none."""
        ...


def is_own(part: object) -> bool:
    """Whether the facts that an exchange says follow from Umbel's own code.

    Of a class that an app wrote, one derived from Umbel's included, they are its author's word;
    and so they are where the rule that is fed is the app's.
    """
    if not type(part).__module__.startswith("umbel.strategies."):
        return False
    return not isinstance(part, Feeds) or is_own(part.aggregator)


def compares(exchange: Exchange) -> bool:
    """Whether an exchange feeds a rule that needs an update of the server's own."""
    return isinstance(exchange, Feeds) and isinstance(exchange.aggregator, ComparesWithOwn)


def takes_sums(exchange: Exchange) -> bool:
    """Whether a reply may stand for several nodes: in the clear, and for a rule that adds up."""
    return (
        is_own(exchange)
        and isinstance(exchange, Feeds)
        and exchange.aggregator.kind == "sum"
        and not isinstance(exchange, Seals)
    )


class ReadsReplies:
    """The gathering of replies in the clear, one after the other as they arrive.

        server -> node  the request            (every node of the cohort)
        node -> server  update, weight         the server sees each

    Where the engine asks one of its processes for many virtual nodes at once (`clients.pooling`),
    its reply is one contribution that stands for them.
    """

    longest: float

    @property
    def aggregator(self) -> Aggregator[Any]:
        """The rule that is fed."""
        raise NotImplementedError

    def check(self, facts: Facts) -> Facts:
        return self.aggregator.check(facts).replace(server_sees="each")

    def answers(self) -> Mapping[str, ClientFn]:
        return {}

    def gather(self, requests: Sequence[Message], round_: RoundSpec) -> Gather:
        rule = self.aggregator
        acc = rule.empty(replace(round_, request=requests[0] if requests else None))
        nodes = [message.metadata.dst_node_id for message in requests]
        position = {node: i for i, node in enumerate(nodes)}
        pools = _pools(requests)
        rejected: list[Rejected] = []
        bytes_up = 0
        for reply in (yield requests):
            node = reply.metadata.src_node_id
            where = position.pop(node, None)
            if where is None:  # an unknown sender, or a second reply: neither has a place
                rejected.append(Rejected(node, "a reply that nobody asked for"))
                continue
            try:
                if node in pools:
                    part, size = _partial_sum(reply, pools[node], round_)
                else:
                    part, size = self._single(reply, round_)
                factor = round_.factors.get(node, 1.0)
                vector = part.vector if factor == 1 else part.vector * factor
                rule.add(
                    acc,
                    replace(part, vector=vector, node=node, position=where, version=round_.number),
                )
            except ValueError as error:
                rejected.append(Rejected(node, str(error)))
                rule.skip(acc, where)
                continue
            bytes_up += size
            del reply, part  # while the next is awaited, this one must not take room
        rejected += [Rejected(node, NO_REPLY) for node in position]
        made = rule.result(acc)
        return replace(made, rejected=(*rejected, *made.rejected), bytes_up=bytes_up)

    def _single(self, reply: Message, round_: RoundSpec) -> tuple[Contribution, int]:
        update, weight, size = self._read(reply, round_)
        buffers = read_buffers(reply, round_.buffers) if round_.buffers else None
        metrics = numbers(reply)
        return Contribution(update, weight, metrics=metrics, buffers=buffers), size

    def _read(self, reply: Message, round_: RoundSpec) -> tuple[Tensor, float, int]:
        """One reply's update, weight and size in bytes; ValueError says what is wrong with it."""
        if round_.packing is None:
            update = read_vector(reply, UPDATE, round_.size)
            size = update.numel() * update.element_size()
        else:
            record = _update_record(reply)
            update, size = round_.packing.read(record, round_.dtype, round_.facts)
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
        weight = numbers(reply).get(EXAMPLES, 0.0)
        return update, weight, size


@dataclass(frozen=True)
class PlainExchange(ReadsReplies):
    """Replies in the clear into any rule: what a stack makes of an aggregator at its bottom.

    Args:
        into: the rule.
        longest: an update with a larger Euclidean norm is rejected; a divergent node must not
            ruin the round.
    """

    into: Aggregator[Any]
    longest: float = 1e8

    @property
    def name(self) -> str:
        return self.into.name

    @property
    def aggregator(self) -> Aggregator[Any]:
        return self.into


def exchange_of(part: Exchange | Aggregator[Any]) -> Exchange:
    """An exchange as it is; an aggregator under a plain one."""
    return part if isinstance(part, Exchange) else PlainExchange(part)


def _pools(requests: Sequence[Message]) -> dict[int, int]:
    """For how many nodes each process is asked, by the node that the request is addressed to."""
    return {
        message.metadata.dst_node_id: take_record(message.content, MODEL, ArrayRecord)[
            MEMBERS
        ].shape[0]
        for message in requests
        if message.metadata.message_type == f"query.{POOL}"
    }


def _partial_sum(reply: Message, count: int, round_: RoundSpec) -> tuple[Contribution, int]:
    """The sum that a process has made of its virtual nodes' updates.

    It is exact, since every term is a multiple of one grid and was bounded by itself.
    """
    vector = read_vector(reply, UPDATE, round_.size)
    bound = round_.facts.l2_bound or math.inf
    metrics = numbers(reply)
    if metrics.get(EXAMPLES) != count:
        raise ValueError(f"a sum over another number of nodes than the {count} asked")
    if not l2_norm(vector) <= count * bound * (1 + LENIENCE):
        raise ValueError("a sum longer than its updates can be")
    size = vector.numel() * vector.element_size()
    return Contribution(vector, float(count), count, metrics, summed=True), size


def _length(update: Tensor) -> float:
    """A quick look at the norm: NaN or infinity where a coordinate is not finite."""
    if update.numel() < PARALLEL:
        return float(torch.linalg.vector_norm(update))  # unlike a dot product, on one thread
    return math.sqrt(float(torch.dot(update, update)))


def read_vector(reply: Message, name: str, size: int) -> Tensor:
    """The flat vector `name` of a reply's update record; ValueError says what is wrong."""
    record = _update_record(reply)
    if name not in record:
        raise ValueError(f"a reply without {name!r}")
    vector = from_array(record[name])
    if vector.shape != (size,):
        raise ValueError(f"{name!r} has the shape {tuple(vector.shape)}, not ({size},)")
    return vector


def _update_record(reply: Message) -> ArrayRecord:
    """The record that a node's update is in; ValueError says why there is none."""
    if reply.has_error():
        raise ValueError(reply.error.reason or f"error code {reply.error.code}")
    record = reply.content.get(UPDATE)  # not `array_records`, which copies the whole directory
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"a reply without {UPDATE!r}")
    return record


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
