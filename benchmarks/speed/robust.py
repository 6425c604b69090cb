"""Robust rules over many updates, beside Flower's own in the same run, and their memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, MultiKrum

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.aggregation import gathering, messages, side_by_side
from umbel.benchmarks.speed.processes import growth
from umbel.core.flower import take_identity
from umbel.core.names import EXAMPLES, METRICS, UPDATE
from umbel.core.records import to_array
from umbel.server.drive import drive
from umbel.strategies.aggregators.each import EachRule
from umbel.strategies.aggregators.krum import MultiKrum as OwnMultiKrum
from umbel.strategies.aggregators.median import Median
from umbel.strategies.aggregators.trimmed_mean import TrimmedMean
from umbel.strategies.exchange import PlainExchange
from umbel.transport.allocator import share_one_arena

REPLIES = 100
SIZE = 1_000_000
LIARS = 0.2
REPEATS = 3
PART = 0.5
"""Of Flower's time, the most that a rule may take."""
ABOVE = 1.25
"""Of the replies themselves, the most memory that a rule may take."""


def measure(*, quick: bool = False) -> list[Figure]:
    """Aggregate 100 updates of 1 M float32 by each rule, ours and Flower's in turns."""
    size = SIZE // 100 if quick else SIZE
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(size, generator=generator) * 0.01 for _ in range(REPLIES)]
    requests, replies = messages(updates, [10.0] * REPLIES)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    count = int(LIARS * REPLIES)
    pairs: list[tuple[EachRule, Any]] = [
        (Median(LIARS), FedMedian(weighted_by_key=EXAMPLES)),
        (TrimmedMean(LIARS), FedTrimmedAvg(weighted_by_key=EXAMPLES, beta=LIARS)),
        (
            OwnMultiKrum(LIARS),
            MultiKrum(
                weighted_by_key=EXAMPLES,
                num_malicious_nodes=count,
                num_nodes_to_select=REPLIES - count - 2,
            ),
        ),
    ]
    figures = [_beside(rule, flower, requests, replies, size) for rule, flower in pairs]
    del updates, requests, replies  # they would take room beside what is measured next
    return [*figures, *(_memory(rule, size) for rule, _ in pairs)]


def _beside(
    rule: EachRule, flower: Any, requests: list[Message], replies: list[Message], size: int
) -> Figure:
    def own() -> None:
        made = drive(
            PlainExchange(rule).gather(requests, gathering(size, REPLIES)), lambda _: iter(replies)
        )
        if made.replies != REPLIES:
            raise RuntimeError(f"{rule.name} did not use every reply: {made.rejected[:1]}")

    # Flower takes the arrays out of the replies that it is given.
    fresh = [_again(requests, replies) for _ in range(REPEATS + 1)]

    def theirs() -> None:
        flower.aggregate_train(1, fresh.pop())

    ours, other = side_by_side([own, theirs], REPEATS)
    return Figure(
        "robust",
        f"{rule.name} of {REPLIES} x {size / 1e6:g} M float32",
        1e3 * ours,
        "ms",
        PART * 1e3 * other,
        {"Flower's": 1e3 * other},
    )


def _again(requests: list[Message], replies: list[Message]) -> list[Message]:
    """The replies in contents of their own, over the same arrays."""
    return [
        Message(
            RecordDict(
                {
                    UPDATE: ArrayRecord(dict(reply.content.array_records[UPDATE])),
                    METRICS: reply.content.metric_records[METRICS],
                }
            ),
            reply_to=request,
        )
        for request, reply in zip(requests, replies, strict=True)
    ]


def _memory(rule: EachRule, size: int) -> Figure:
    held = 4 * size * REPLIES
    # Memory that this process has had before and keeps would hide what a rule takes.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        most = fresh.submit(_peak, rule, size).result()
    return Figure(
        "robust",
        f"peak memory of {rule.name}, {REPLIES} replies that arrive one by one",
        most / 1e6,
        "MB",
        ABOVE * held / 1e6,
        {"the replies": held / 1e6},
    )


def _peak(rule: EachRule, size: int) -> float:
    """Bytes by which a process of its own grows while replies come and are judged."""
    take_identity(1)
    share_one_arena()  # as a coordinator of the link does
    requests = [Message(RecordDict(), node, "train") for node in range(1001, 1001 + REPLIES)]
    metrics = MetricRecord({EXAMPLES: 10})

    def arriving(size: int) -> Callable[[Sequence[Message]], Iterator[Message]]:
        def replies(_: Sequence[Message]) -> Iterator[Message]:
            for at, request in enumerate(requests):
                update = torch.full((size,), float(at))
                record = ArrayRecord({UPDATE: to_array(update)})
                yield Message(RecordDict({UPDATE: record, METRICS: metrics}), reply_to=request)

        return replies

    def judged(size: int) -> None:
        drive(PlainExchange(rule).gather(requests, gathering(size, REPLIES)), arriving(size))

    judged(1000)  # what libraries take when they are first used is no rule's
    return growth(lambda: judged(size))
