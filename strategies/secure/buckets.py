"""Secure sums of random buckets of nodes, and a robust rule over the buckets' means.

    server           draws who is in which bucket
    server -> node   a secure sum for each bucket (`secure_sum`), all of them at once
    server           the exact sum of each bucket, never less; the rule over the buckets' means

The server never sees less than the sum of a bucket. A liar cannot be told from the others of its
bucket, so it spoils the whole of it: f liars spoil at most f buckets, and the rule has to stand
that many of them. How far a spoilt bucket moves the result is the rule's bound for one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from flwr.app import Context, Message, RecordDict

from umbel.core.errors import StackError
from umbel.strategies.aggregator import Aggregate, Contribution, Judged, Rejected, RoundSpec
from umbel.strategies.aggregators.each import EachRule
from umbel.strategies.exchange import ClientFn, Gather, Sealing
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.transform import Facts


@dataclass(frozen=True)
class SecureBuckets:
    """A robust rule over the means of secure sums.

    Args:
        rule: looks at the buckets' means; its `liars` is the share of buckets that it has to stand.
        size: nodes of a bucket at least.
        sums: how each bucket is summed; it makes no sum of fewer nodes than its `min_cohort`.
        seed: decides, with the number of the round, who is with whom.

    Raises:
        StackError: buckets of fewer nodes than a sum needs.
    """

    rule: EachRule
    size: int
    sums: SecureSum = field(default_factory=SecureSum)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < self.sums.min_cohort:
            raise StackError(
                f"bucket-size is {self.size}, but no secure sum is made of fewer than "
                f"{self.sums.min_cohort} nodes; take larger buckets, or lower secure-min-cohort"
            )

    @property
    def name(self) -> str:
        return f"{self.rule.name} of {self.sums.name}s of {self.size}"

    @property
    def mode(self) -> Literal["auto", "malicious", "semi-honest"]:
        """As of the sums."""
        return self.sums.mode

    @property
    def aggregator(self) -> EachRule:
        """What the buckets' means go into."""
        return self.rule

    def check(self, facts: Facts) -> Facts:
        if facts.max_replies and facts.max_replies < self.size:
            raise StackError(
                f"bucket-size is {self.size}, but at most {facts.max_replies} nodes come in a "
                "round; take smaller buckets, or more nodes"
            )
        many = facts.expected_replies or facts.max_replies
        buckets = int(min(many, facts.max_replies or many)) // self.size
        sealed = self.sums.check(facts.replace(max_replies=0, min_replies=1))
        if many:
            self.rule.check(Facts(facts.size, max_replies=max(1, buckets)))
        return sealed.replace(kind="each", public_denominator=False, max_replies=facts.max_replies)

    def advice(self, cohort: float, private: bool) -> list[str]:
        """What is said before a run starts."""
        return [
            *self.sums.advice(min(cohort, self.size), private)[:1],
            f"the server learns the sum of each bucket of {self.size} nodes or more, and a liar "
            "spoils the bucket that it is in (docs/security.md says what that promises)",
        ]

    def answers(self) -> Mapping[str, ClientFn]:
        return self.sums.answers()

    def consider(self, request: Message, context: Context, own: Sealing) -> RecordDict | None:
        """As of the sums."""
        return self.sums.consider(request, context, own)

    def seal(
        self, content: RecordDict, request: Message, context: Context, own: Sealing
    ) -> RecordDict:
        """As of the sums."""
        return self.sums.seal(content, request, context, own)

    # ---- the server's half

    def gather(self, requests: Sequence[Message], round_: RoundSpec) -> Gather:
        buckets = self._drawn(requests, round_.number)
        trips: dict[int, Gather] = {
            i: self.sums.gather(some, replace(round_, cohort=float(len(some))))
            for i, some in enumerate(buckets)
        }
        sums: dict[int, Aggregate] = {}
        asked = {i: next(trip) for i, trip in trips.items()}
        strangers: list[Rejected] = []
        while asked:
            where = {m.metadata.dst_node_id: i for i, some in asked.items() for m in some}
            heard: dict[int, list[Message]] = {i: [] for i in asked}
            for reply in (yield [message for some in asked.values() for message in some]):
                bucket = where.get(reply.metadata.src_node_id)
                if bucket is None:
                    why = "a reply that nobody asked for"
                    strangers.append(Rejected(reply.metadata.src_node_id, why))
                else:
                    heard[bucket].append(reply)
            ahead = {}
            for i in asked:
                try:
                    ahead[i] = trips[i].send(_once(heard[i]))
                except StopIteration as end:
                    sums[i] = end.value
            asked = ahead
        members = [[message.metadata.dst_node_id for message in some] for some in buckets]
        return self._made([sums[i] for i in sorted(sums)], members, strangers, round_)

    def _drawn(self, requests: Sequence[Message], number: int) -> list[list[Message]]:
        """Buckets of at least `size`; those who are left over make some larger."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(requests), generator=generator).tolist()
        count = max(1, len(requests) // self.size)
        return [sorted_by(requests, order[i::count]) for i in range(count) if order[i::count]]

    def _made(
        self,
        sums: Sequence[Aggregate],
        members: Sequence[Sequence[int]],
        strangers: Sequence[Rejected],
        round_: RoundSpec,
    ) -> Aggregate:
        acc = self.rule.empty(replace(round_, request=None))
        rejected = [*strangers, *(one for sum_ in sums for one in sum_.rejected)]
        for i, sum_ in enumerate(sums):
            if not sum_.replies:
                rejected += [Rejected(node, sum_.aborted) for node in members[i] if sum_.aborted]
                continue
            mean = sum_.total / sum_.denominator
            self.rule.add(acc, Contribution(mean, 1.0, sum_.replies, node=i, position=i))
        made = self.rule.result(acc)
        used = [sum_ for sum_ in sums if sum_.replies]
        aborted = made.aborted
        if not used and sums:
            aborted = f"no bucket could be summed: {sums[0].aborted}"
        judged = [
            Judged(node, one.influence, f"{one.why}, which looks at the sum of its bucket")
            for one in made.judged
            for node in members[one.node_id]
        ]
        about = dict(used[0].about) if used else {}
        return replace(
            made,
            rejected=tuple(rejected),
            aborted=aborted,
            judged=tuple(judged),
            bytes_up=sum(sum_.bytes_up for sum_ in sums),
            revealed=any(sum_.revealed for sum_ in sums),
            about={**about, "nodes": made.replies, "buckets": len(used)} if about else {},
        )


def sorted_by(requests: Sequence[Message], places: Sequence[int]) -> list[Message]:
    """The requests at these places, in the order of the cohort."""
    return [requests[place] for place in sorted(places)]


def _once(replies: list[Message]) -> Iterator[Message]:
    """The replies, none of which is kept once it was looked at."""
    replies.reverse()
    while replies:
        yield replies.pop()
