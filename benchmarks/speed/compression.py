"""How fast updates are written down in fewer bytes and read again, on one thread.

Beside quantisation stands a pass that copies and scales the same numbers into new memory, beside
top-k PyTorch's own `topk` of the absolute values. Entropy coding, which follows where it pays, is
measured by itself.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

from umbel.benchmarks.figures import Figure
from umbel.core.records import record_of, to_array
from umbel.strategies.compression.half import Half
from umbel.strategies.compression.qsgd import Qsgd
from umbel.strategies.compression.sign import Sign
from umbel.strategies.compression.top_k import TopK
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.payload import Packing, Packs, packed

SIZE = 10_000_000
FRACTION = 0.01
GIGABYTE = 1e9


def measure(*, quick: bool = False) -> list[Figure]:
    """Milliseconds of a core for both halves of each layer, for 10 M float32.

    It is the thread's own time, so that other programs on the machine count less.
    """
    size, repeats = (20_000, 1) if quick else (SIZE, 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(torch.randn(size) * 1e-3, repeats)
    finally:
        torch.set_num_threads(threads)


def _measured(vector: torch.Tensor, repeats: int) -> list[Figure]:
    ctx = NodeContext(seed=1)
    rounded = {f"qsgd-{layer.bits}": layer for layer in (Qsgd(8), Qsgd(4), Qsgd(2))}
    ways: dict[str, Callable[[], object]] = {
        "copy and scale": lambda: vector * 2.0,
        "torch.topk": lambda: vector.abs().topk(round(FRACTION * len(vector)), sorted=False),
        **{name: _both(layer, vector, ctx) for name, layer in rounded.items()},
        "half": _both(Half(), vector, ctx),
        "sign": _fed_back(Sign(), vector),
        "top-k": _fed_back(TopK(FRACTION), vector),
        "qsgd-2, entropy coded": _coded(Qsgd(2), vector, ctx),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            if turn or repeats == 1:
                times[name].append(1e3 * (time.thread_time() - began))
    found = {name: statistics.median(taken) for name, taken in times.items()}
    copied, largest = found.pop("copy and scale"), found.pop("torch.topk")
    bytes_ = vector.numel() * vector.element_size()
    promised = max(1e3 * bytes_ / GIGABYTE, 2 * copied)
    wanted = {"qsgd-8": promised, "qsgd-4": promised, "top-k": 3 * largest}
    beside = {"top-k": {"torch.topk": largest}}
    return [
        Figure(
            "compression",
            f"{name}, {bytes_ / 1e6:,.0f} MB of float32, there and back",
            value,
            "ms",
            wanted.get(name),
            beside.get(name, {"copy and scale": copied}),
        )
        for name, value in found.items()
    ]


def _both(layer: Packs, vector: torch.Tensor, ctx: NodeContext) -> Callable[[], object]:
    """Written down and read again, with no layer around it."""

    def there_and_back() -> object:
        parts = layer.pack(vector, math.inf, ctx)
        return layer.unpack(parts, len(vector), vector.dtype)

    return there_and_back


def _fed_back(layer: TopK | Sign, vector: torch.Tensor) -> Callable[[], object]:
    """The same, with what is chosen and what is kept."""

    def there_and_back() -> object:
        ctx = NodeContext(memory={"unsent": vector})
        parts = layer.pack(layer.encode(vector, ctx), math.inf, ctx)
        return layer.unpack(parts, len(vector), vector.dtype)

    return there_and_back


def _coded(layer: Packs, vector: torch.Tensor, ctx: NodeContext) -> Callable[[], object]:
    """The same by way of what travels, entropy coded."""
    packing, facts = Packing(layer, len(vector), 0), Facts(len(vector))

    def there_and_back() -> object:
        parts = packed(layer, vector, len(vector), math.inf, ctx)
        record = record_of({name: to_array(part) for name, part in parts.items()})
        return packing.read(record, vector.dtype, facts)

    return there_and_back
