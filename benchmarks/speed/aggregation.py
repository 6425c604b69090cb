"""The server's aggregation of many updates, beside Flower's own and the memory's limit."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.processes import growth
from umbel.core.flower import take_identity
from umbel.core.records import to_array
from umbel.server.drive import drive
from umbel.strategies.collect import EXAMPLES, METRICS, UPDATE, PlainSum, RoundSpec
from umbel.strategies.transform import Facts

MOST_MODELS = 12
"""Memory of a sum in models, whatever the number of replies; what the allocator keeps differs by
a few from one time to the next."""
LIMIT_MS = 35.0
REPLIES = 100
SIZE = 1_000_000


def measure(*, quick: bool = False) -> list[Figure]:
    """Aggregate 100 updates of 1 M float32, on all threads.

    Memory is that of the server's own work: replies are made one at a time as they are taken,
    by 100 and by 400 nodes, and the growth of the process is watched.
    """
    size = SIZE // 100 if quick else SIZE
    updates = [torch.randn(size, generator=_seeded(i)) * 0.01 for i in range(REPLIES)]
    weights = [float(100 + 7 * i) for i in range(REPLIES)]
    requests, replies = messages(updates, weights)
    flower = FedAvg(weighted_by_key=EXAMPLES)
    logging.getLogger("flwr").setLevel(logging.WARNING)

    def plain_sum() -> None:
        trip = PlainSum().gather(requests, gathering(size, len(requests)))
        total = drive(trip, lambda _: iter(replies))
        if total.replies != len(requests):
            raise RuntimeError(f"{total.replies} of {len(requests)} replies were used")

    def fedavg() -> None:
        flower.aggregate_train(1, replies)

    def limit() -> None:
        total = torch.zeros(size)
        for update, weight in zip(updates, weights, strict=True):
            total.add_(update, alpha=weight)

    repeats = 3 if quick else 11
    ours, theirs, least = side_by_side([plain_sum, fedavg, limit], repeats)
    # In a process of its own: what earlier parts have left in this one would hide the growth.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        few, many = alone.submit(_peaks, size).result()
    return [
        Figure(
            "aggregation",
            f"{REPLIES} x {size / 1e6:g} M float32, {torch.get_num_threads()} threads",
            1e3 * ours,
            "ms",
            LIMIT_MS,
            {"Flower's FedAvg": 1e3 * theirs, "additions alone": 1e3 * least},
        ),
        Figure(
            "aggregation",
            f"peak memory of {4 * REPLIES} replies",
            many / 1e6,
            "MB",
            MOST_MODELS * 4 * size / 1e6,
            {f"{REPLIES} replies": few / 1e6, "one model": 4 * size / 1e6},
        ),
    ]


def side_by_side(functions: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of each, taken in turns after one round of warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in times]


def _peaks(size: int) -> tuple[float, float]:
    take_identity(1)
    _peak(size, 4 * REPLIES)  # what the allocator keeps is there before either is measured
    return _peak(size, REPLIES), _peak(size, 4 * REPLIES)


def _peak(size: int, count: int) -> float:
    """Bytes by which this process grows while it adds up replies that arrive one by one."""
    update, metrics = torch.ones(size), MetricRecord({EXAMPLES: 10})
    requests = [Message(RecordDict(), node, "train") for node in range(1001, 1001 + count)]

    def arriving(_: Sequence[Message]) -> Iterator[Message]:
        for request in requests:
            record = ArrayRecord({UPDATE: to_array(update)})
            yield Message(RecordDict({UPDATE: record, METRICS: metrics}), reply_to=request)

    return growth(lambda: drive(PlainSum().gather(requests, gathering(size, count)), arriving))


def gathering(size: int, cohort: int) -> RoundSpec:
    """A round of plain float32 updates."""
    return RoundSpec(1, size, torch.float32, cohort, Facts(size=size))


def messages(
    updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[list[Message], list[Message]]:
    """Requests, and the replies with these updates and numbers of examples."""
    take_identity(1)
    requests = [Message(RecordDict(), 1001 + i, "train") for i in range(len(updates))]
    replies = []
    for request, update, weight in zip(requests, updates, weights, strict=True):
        record = ArrayRecord({UPDATE: to_array(update)})
        metrics = MetricRecord({EXAMPLES: weight})
        replies.append(Message(RecordDict({UPDATE: record, METRICS: metrics}), reply_to=request))
    return requests, replies


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
