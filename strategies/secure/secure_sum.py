"""SecureSum: the server learns the sum of the updates and nothing else.

    server -> node   train      model, configuration, terms of the session
    node             the update through the stack's layers, onto the grid; kept back
    node -> server   advertise  two fresh public keys, signed; no update, no metric, no count
    server -> node   share      everybody's keys
    node -> server              sealed shares of the node's two secrets
    server -> node   mask       the shares sealed for it; who is left
    node -> server              the update plus masks that cancel in the sum, bit-packed
    server -> node   agree      whose updates arrived
    node -> server              its signature over that
    server -> node   unmask     everybody's signatures
    node -> server              one share of each neighbour's secret

`protocol.py` has the steps; here they become messages. Training happens on the first trip,
so that slow and failing nodes are out before anything depends on them.

The hashes of the model, of the configuration and of the contract (app, options, layers) are in
the session: nodes that would act on different things do not sum. A node gives a masked update once
a round, and rounds only go up. The sum is exact: integers modulo 2^B, with B large enough for the
updates' bound and the noise. The page docs/security.md says what this protects, and what not.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from umbel.core.contents import find_record, take_record
from umbel.core.errors import StackError
from umbel.core.names import CONFIG, MODEL, UPDATE
from umbel.core.records import from_array
from umbel.privacy.masking import keys, masks
from umbel.privacy.masking.session import MALICIOUS_FROM, Mode, Terms
from umbel.strategies.aggregator import Aggregate, Contribution, Rejected, RoundSpec
from umbel.strategies.aggregators.weighted_mean import WeightedMean
from umbel.strategies.contract import settings_digest
from umbel.strategies.exchange import ClientFn, Gather, Sealing
from umbel.strategies.policy.reading import policy_of
from umbel.strategies.secure.checks import AbortedError
from umbel.strategies.secure.identity import (
    check_fresh,
    keep_session,
    load_party,
    remember,
    spend,
    take_session,
)
from umbel.strategies.secure.message import REFUSED, Plain, blob, number, text
from umbel.strategies.secure.policy import RefusalError
from umbel.strategies.secure.protocol import Released, advertise, gives, respond, serve
from umbel.strategies.secure.wire import (
    SECURE,
    STAGES,
    action_of,
    content_of,
    plain_of,
    query_of,
)
from umbel.strategies.transform import Facts

FEW = 20
"""Below this many nodes a run is told that its exact sums say much about each."""

TAILS = 6.0
"""Standard deviations of the noise, and of a rotated sum, that the modulus has room for."""


@dataclass(frozen=True)
class SecureSum:
    """Sums updates under masks; the server sees the sum only.

    Args:
        mode: `malicious` needs two thirds of the nodes to stay and at least six to begin;
            `semi-honest` needs half; `auto` is malicious wherever at least nine nodes can come.
        min_cohort: no sum is made of fewer nodes; nodes hold the server to it.
        weighting: `equal` over the nodes that are in the sum, or `fixed`: the expected cohort as
            denominator, which a bounded sensitivity needs.

    Raises:
        StackError: a value out of range, or updates that are no bounded multiples of a grid.

    Edge cases: a round that ends with too few nodes gives an empty sum, `aborted` says why, and
    `revealed` whether shares had been asked for. Nodes' metrics and counts never travel beside
    the update; see `Weigh` for those that are wanted inside it.
    """

    mode: Literal["auto", "malicious", "semi-honest"] = "auto"
    min_cohort: int = 3
    weighting: Literal["equal", "fixed"] = "equal"
    name: str = "secure-sum"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "malicious", "semi-honest"):
            raise StackError(f"mode is {self.mode!r}; it can be auto, malicious or semi-honest")
        if self.min_cohort < 2:
            raise StackError(
                f"min-cohort is {self.min_cohort}; a sum of one is that one's update, so take at "
                "least 2, and rather 10"
            )

    def check(self, facts: Facts) -> Facts:
        if facts.l2_bound is None:
            raise StackError("secure-sum needs bounded updates; put Clip before it")
        if facts.grid is None:
            raise StackError("secure-sum adds whole numbers; put Quantize before it")
        floor = max(self.min_cohort, facts.min_replies)
        if facts.max_replies and facts.max_replies < max(floor, 2):
            raise StackError(
                f"secure-sum is to make no sum of fewer than {floor} nodes, but at most "
                f"{facts.max_replies} can come; lower min-cohort or take more nodes"
            )
        if self.mode == "malicious" and 0 < facts.max_replies < MALICIOUS_FROM:
            raise StackError(
                f"mode=malicious needs {MALICIOUS_FROM} nodes and at most {facts.max_replies} can "
                "come; take mode=semi-honest, which trusts the server to follow the protocol"
            )
        after = self.aggregator.check(facts)
        return after.replace(averages_buffers=False, server_sees="sum", min_replies=floor)

    @property
    def aggregator(self) -> WeightedMean:
        """What the sum goes into, as one contribution of all nodes that are in it."""
        return WeightedMean(self.weighting)

    def weighted(self, weighting: str) -> Self:
        return replace(self, weighting=cast(Any, weighting))

    def advice(self, cohort: float, private: bool) -> list[str]:
        """What is said before a run starts."""
        lines = [
            "secure sum: the server learns the sum of the nodes' updates and nothing else; "
            "designed after Bonawitz et al. 2017 and Bell et al. 2020, not independently audited"
        ]
        if not private and cohort < FEW:
            lines.append(
                f"a cohort of {cohort:g} is small: few updates can be told from their sum; "
                "take more nodes a round, or a budget such as epsilon=8"
            )
        return lines

    def answers(self) -> Mapping[str, ClientFn]:
        return {action_of(stage): partial(_answer, stage) for stage in STAGES}

    # ---- the server's half

    def gather(self, requests: Sequence[Message], round_: RoundSpec) -> Gather:
        if round_.buffers:
            raise StackError(
                "buffers=mean sends running statistics in the clear beside a secure sum; use "
                "buffers=local, or group normalisation"
            )
        key = keys.KeyPair.generate()
        terms = self._terms(requests, round_, key.public)
        step = _grid(round_.facts)
        first = _with_terms(requests, terms, step)
        nodes = [message.metadata.dst_node_id for message in requests]
        trips = serve(terms, nodes, key, round_.contract)
        try:
            next(trips)
            replies = yield first
            traffic = [0]
            for stage in STAGES:
                asked = trips.send(_plain(replies, traffic))
                replies = yield _requests(asked, query_of(stage), _group(terms))
            trips.send(_plain(replies, traffic))
        except AbortedError as aborted:
            return replace(
                Aggregate.nothing(round_.size),
                rejected=tuple(Rejected(node, why) for node, why in aborted.dropped),
                aborted=str(aborted),
                revealed=aborted.revealed,
            )
        except StopIteration as stop:
            return self._sum(stop.value, step, terms.bits, round_, traffic[0])
        raise AssertionError("unreachable: the protocol ended with neither a sum nor an abort")

    def _terms(self, requests: Sequence[Message], round_: RoundSpec, key: bytes) -> Terms:
        count = len(requests)
        mode: Mode = "semi-honest"
        if self.mode == "malicious" or (self.mode == "auto" and count >= MALICIOUS_FROM * 3 // 2):
            mode = "malicious"
        told = requests[0].content if requests else RecordDict()
        step = _grid(round_.facts)
        return Terms(
            run=round_.run_id,
            round=round_.number,
            nonce=os.urandom(16),
            model=model_digest(told),
            parameters=told_digest(told, step),
            bits=modulus_bits(round_.facts, max(count, 1)),
            size=round_.size,
            mode=mode,
            min_cohort=max(self.min_cohort, round_.facts.min_replies),
            server=key,
        )

    def _sum(
        self, released: Released, step: float, bits: int, round_: RoundSpec, bytes_up: int
    ) -> Aggregate:
        replies = len(released.included)
        total = torch.from_numpy(masks.lift(released.total, bits).astype(np.float64) * step)
        rule, part = self.aggregator, Contribution(total, float(replies), replies, summed=True)
        acc = rule.empty(round_)
        rule.add(acc, part)
        return replace(
            rule.result(acc),
            rejected=tuple(Rejected(node, why) for node, why in released.dropped),
            bytes_up=bytes_up,
            about={
                "mode": released.roster.mode,
                "identities": released.trust,
                "bits": bits,
                "nodes": replies,
                "neighbours": released.roster.degree.neighbours,
                "quorum": released.roster.quorum,
            },
        )

    # ---- the node's half

    def consider(self, request: Message, context: Context, own: Sealing) -> RecordDict | None:
        """Before training: the refusal of a session that could not be sealed; None is none."""
        try:
            asked = _asked(request, context)
            terms = _terms_of(asked, b"", b"", own.contract)
            check_fresh(terms.run, terms.round, b"", context)
            policy_of(context.node_config).sums.check_terms(terms, own.shares)
        except RefusalError as refusal:
            return content_of({REFUSED: str(refusal)})
        return None

    def seal(
        self, content: RecordDict, request: Message, context: Context, own: Sealing
    ) -> RecordDict:
        """In place of the update: fresh keys. A request without terms gets no update at all."""
        take_session(context)  # whatever was left of an earlier session is gone
        try:
            asked = _asked(request, context)
            step = math.ldexp(1.0, number(asked, "step"))
            model, parameters = model_digest(request.content), told_digest(request.content, step)
            terms = _terms_of(asked, model, parameters, own.contract)
            me = load_party(context)
            check_fresh(terms.run, terms.round, terms.ticket, context)
            vector = from_array(take_record(content, UPDATE, ArrayRecord)[UPDATE])
            values = to_words(vector, step, terms.bits)
            memory, reply = advertise(me, terms, values, own.shares)
        except RefusalError as refusal:
            return content_of({REFUSED: str(refusal)})
        keep_session(memory, context)
        return content_of(reply)


def _asked(request: Message, context: Context) -> Plain:
    """The terms that are offered; run and round are those that the node acts on."""
    asked = plain_of(request.content)
    if not asked:
        raise RefusalError("message", "the server wants an update without a secure sum")
    told: Mapping[str, Any] = find_record(request.content, CONFIG, ConfigRecord) or {}
    if number(asked, "run") != context.run_id or number(asked, "round") != told.get("round"):
        raise RefusalError(
            "round",
            f"the session is of run {number(asked, 'run'):x} and round {number(asked, 'round')}, "
            f"and the message of run {context.run_id:x} and round {told.get('round')}",
        )
    return asked


def _terms_of(asked: Plain, model: bytes, parameters: bytes, contract: bytes) -> Terms:
    """The terms, with the hashes of what this node itself received and holds."""
    mode: Mode = "malicious" if text(asked, "mode") == "malicious" else "semi-honest"
    return Terms(
        run=number(asked, "run"),
        round=number(asked, "round"),
        nonce=blob(asked, "nonce", 16),
        model=model,
        parameters=parameters,
        bits=number(asked, "bits"),
        size=number(asked, "size"),
        mode=mode,
        min_cohort=number(asked, "min-cohort"),
        server=blob(asked, "server", keys.PUBLIC_BYTES),
        contract=contract,
    )


def _answer(stage: str, message: Message, context: Context) -> Message:
    """The node's half of a trip after the first."""
    me = load_party(context)
    known = len(me.pins)
    session = take_session(context)
    memory, reply = respond(me, stage, session, plain_of(message.content))
    if gives(stage, reply):
        spend(session, context)
    keep_session(memory, context)
    if len(me.pins) > known:
        remember(me, context)
    return Message(content_of(reply), reply_to=message)


def modulus_bits(facts: Facts, count: int) -> int:
    """The bits B for which a sum of `count` updates is exact modulo 2^B.

    Without rotation a coordinate of an update is at most its bound, which no sum exceeds. After
    a rotation a coordinate of the sum is sub-Gaussian with standard deviation count x spread, and
    so is the nodes' noise; room is left for `TAILS` of them, at either side (Kairouz et al. 2021,
    section 4): a coordinate wraps around with probability below 2e-9, which costs accuracy and
    never privacy.

    Raises:
        StackError: no word is long enough.
    """
    bound, step = facts.l2_bound, _grid(facts)
    assert bound is not None
    sure = count * bound + TAILS * facts.noise
    if facts.spread is not None:
        wide = math.hypot(count * facts.spread, facts.noise, math.sqrt(count) * step / 2)
        sure = min(sure, TAILS * wide)
    bits = max(8, math.ceil(math.log2(2 * (sure / step + 1))))
    if bits > masks.MAX_BITS:
        raise StackError(
            f"sums of {count} updates of norm {bound:g} on a grid of {step:g} need {bits} bits; "
            f"more than {masks.MAX_BITS} there are not, so quantise with fewer levels"
        )
    return bits


def to_words(vector: torch.Tensor, step: float, bits: int) -> masks.Words:
    """An update on the grid as integers modulo 2^bits, shape (size,)."""
    whole = vector.numpy().astype(np.float64) / step
    if not bool(np.isfinite(whole).all()) or bool((whole != np.rint(whole)).any()):
        raise RefusalError("message", f"my update is not on the grid of {step:g}")
    if whole.size and float(np.abs(whole).max()) >= 2.0 ** (bits - 1):
        raise RefusalError("modulus", f"my update does not fit into {bits} bits")
    return masks.reduce(whole.astype(np.int64).astype(masks.word(bits)), bits)


def model_digest(content: RecordDict) -> bytes:
    """SHA-256 of the arrays that a node was sent: names, shapes, types and every bit."""
    fields: list[bytes | str | int] = []
    for name, array in sorted((find_record(content, MODEL, ArrayRecord) or {}).items()):
        tensor = from_array(array)
        fields += [name, str(tensor.dtype), str(tuple(tensor.shape))]
        fields.append(keys.sha256(tensor.contiguous().numpy().tobytes()))
    return keys.digest("model", *fields)


def told_digest(content: RecordDict, step: float) -> bytes:
    """SHA-256 of everything else that a node was told: the layers' and the round's settings."""
    told: Mapping[str, Any] = find_record(content, CONFIG, ConfigRecord) or {}
    return keys.digest("told", step.hex(), settings_digest("settings", told))


def _grid(facts: Facts) -> float:
    if facts.grid is None:
        raise StackError("secure-sum adds whole numbers; put Quantize before it")
    return facts.grid


def _with_terms(requests: Sequence[Message], terms: Terms, step: float) -> list[Message]:
    """The requests with the terms beside what they hold; one content stays one content."""
    offer = ConfigRecord(
        {
            "run": terms.run,
            "round": terms.round,
            "nonce": terms.nonce,
            "bits": terms.bits,
            "size": terms.size,
            "mode": terms.mode,
            "min-cohort": terms.min_cohort,
            "server": terms.server,
            "step": math.frexp(step)[1] - 1,
        }
    )
    content = _once(lambda told: RecordDict({**told, SECURE: offer}))
    return [
        Message(
            content(message.content),
            message.metadata.dst_node_id,
            message.metadata.message_type,
            group_id=_group(terms),
        )
        for message in requests
    ]


def _requests(asked: Mapping[int, Plain], kind: str, group: str) -> list[Message]:
    """One message a node; what is told to all is one content."""
    content = _once(content_of)
    return [Message(content(told), node, kind, group_id=group) for node, told in asked.items()]


def _once(make: Callable[[Any], RecordDict]) -> Callable[[Any], RecordDict]:
    """Makes one content of the same object, which engines encode once; its caller keeps those."""
    made: dict[int, RecordDict] = {}

    def content(told: Any) -> RecordDict:
        if id(told) not in made:
            made[id(told)] = make(told)
        return made[id(told)]

    return content


def _group(terms: Terms) -> str:
    """The messages of one session; a round that is tried again gets no answer of the last try."""
    return f"{terms.round}.{terms.nonce[:8].hex()}"


def _plain(replies: Iterator[Message], traffic: list[int]) -> Iterator[tuple[int, Plain]]:
    """Flower's messages as the protocol's; an error is a refusal."""
    for message in replies:
        node = message.metadata.src_node_id
        if message.has_error():
            yield node, {REFUSED: message.error.reason or f"error code {message.error.code}"}
            continue
        content = plain_of(message.content)
        traffic[0] += sum(len(v) for v in content.values() if isinstance(v, bytes | str))
        yield node, content
