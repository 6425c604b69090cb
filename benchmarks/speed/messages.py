"""What a message costs beyond the client's own work, on the embedded engine."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed import apps
from umbel.benchmarks.speed.ray_side import echo_under_ray
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.strategies.records import to_array

SMALL_MS = 0.3
COPIES = 3.0
CASES = ((100, 100), (1000, 100), (10_000, 1000))
"""Nodes of the federation, and messages of a round."""
LARGE = 10_000_000
"""Float32 parameters of the large model."""


def measure(*, quick: bool = False, flower: bool = False, workers: int = 2) -> list[Figure]:
    """Messages with ten floats and with a large model, in process and over workers.

    Args:
        quick: a tenth of the sizes, and few repeats.
        flower: measure Flower's simulation under Ray too.
        workers: worker processes.
    """
    scale = 10 if quick else 1
    figures = []
    with tempfile.TemporaryDirectory() as where:
        app = apps.write_echo(Path(where))
        for nodes, messages in ((n // scale, m // scale) for n, m in CASES):
            ray = {"Flower under Ray": 1e3 * echo_under_ray(nodes, messages)} if flower else {}
            for count in (0, workers):
                seconds = exchange(app, nodes, messages, 10, count, repeats=3 if quick else 15)
                figures.append(
                    Figure(
                        "messages",
                        f"10 floats, {messages:,} of {nodes:,} nodes, {_where(count)}",
                        1e3 * seconds,
                        "ms/message",
                        SMALL_MS,
                        ray,
                    )
                )
        size = LARGE // scale
        for count in (0, workers):
            copy = memcpy(4 * size)
            seconds = exchange(app, 20, 20, size, count, repeats=3 if quick else 7)
            figures.append(
                Figure(
                    "messages",
                    f"{size / 1e6:.0f} M float32, {_where(count)}",
                    seconds / copy,
                    "copies/message",
                    COPIES,
                    {"one copy in ms": 1e3 * copy},
                )
            )
    return figures


def _where(workers: int) -> str:
    return f"{workers} workers" if workers else "in process"


def exchange(
    app: Path, nodes: int, messages: int, size: int, workers: int, *, repeats: int
) -> float:
    """Median seconds a message, over rounds of `messages` messages with `size` float32 each."""
    model = ArrayRecord({"x": to_array(torch.zeros(size))})
    content = RecordDict({"model": model})
    times = []
    with EmbeddedGrid(app, nodes, workers=workers) as grid:
        cohort = grid.get_node_ids()[:messages]
        for repeat in range(repeats + 2):
            requests = [Message(content, node, "train", group_id=str(repeat)) for node in cohort]
            began = time.perf_counter()
            replies = sum(reply.has_content() for reply in grid.stream(requests))
            times.append((time.perf_counter() - began) / messages)
            if replies != messages:
                raise RuntimeError(f"{replies} of {messages} messages came back")
    return statistics.median(times[2:])


def memcpy(size: int) -> float:
    """Median seconds to copy `size` bytes into memory that is there already, on one thread."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(15):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
