"""DP-SGD inside a node, beside Opacus and beside no privacy: examples a second.

One step of every way in turn, on the same batches of the same model, as medians.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from umbel.benchmarks.figures import Figure
from umbel.privacy.bounds.ghost import PerExample
from umbel.privacy.noise.entropy import Entropy
from umbel.strategies.private.gaussian import noised

BATCH, THREADS = 256, 2
TARGET = 7000.0
"""Examples a second on two threads, the model of the bundled example."""

Way = Callable[[Tensor, Tensor], None]


def model() -> nn.Module:
    """The bundled example's network: two convolutions, two dense layers, 55,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def measure(*, quick: bool = False) -> list[Figure]:
    """Microseconds an example, this library's beside the others'."""
    rates = rates_of(1 if quick else 25)
    own = rates.pop("ghost norms")
    return [
        Figure(
            part="private-sgd",
            what=f"DP-SGD, a step of {BATCH}, {THREADS} threads",
            value=1e6 / own,
            unit="us/example",
            target=1e6 / TARGET,
            beside={name: 1e6 / rate for name, rate in rates.items()},
        )
    ]


def rates_of(repeats: int) -> dict[str, float]:
    """Examples a second of every way, by name."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _timed(ways(), repeats)
    finally:
        torch.set_num_threads(before)


def _timed(found: Mapping[str, Way], repeats: int) -> dict[str, float]:
    source = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 2):
        x = torch.randn(BATCH, 1, 28, 28, generator=source)
        y = torch.randint(0, 10, (BATCH,), generator=source)
        for name, step in found.items():
            began = time.perf_counter()
            step(x, y)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: BATCH / statistics.median(times) for name, times in seconds.items()}


def ways() -> dict[str, Way]:
    """Each way to make a step; Opacus's where it is installed."""
    found = {"no privacy": _plain(), "ghost norms": _ghost()}
    try:
        import opacus  # noqa: F401
    except ImportError:
        return found
    return {**found, "opacus samples": _opacus("hooks"), "opacus ghost": _opacus("ghost")}


def _plain() -> Way:
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()

    return step


def _ghost() -> Way:
    network, entropy = model(), Entropy()
    clipper = PerExample(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)

    def each(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="none")

    def step(x: Tensor, y: Tensor) -> None:
        gradients = clipper.clipped_sum(x, y, each, 1.0).gradients
        flat = noised(torch.cat([g.flatten() for g in gradients.values()]), 1.0, entropy)
        start = 0
        for parameter in network.parameters():
            piece = flat[start : start + parameter.numel()]
            parameter.grad = piece.view(parameter.shape).to(parameter.dtype).div_(BATCH)
            start += parameter.numel()
        optimizer.step()

    return step


def _opacus(mode: str) -> Way:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    network = model()
    optimizer: Any = torch.optim.SGD(network.parameters(), 0.01)
    loader = DataLoader(
        TensorDataset(torch.zeros(BATCH, 1, 28, 28), torch.zeros(BATCH).long()), batch_size=BATCH
    )
    criterion: Any = nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PrivacyEngine().make_private(
            module=network,
            optimizer=optimizer,
            data_loader=loader,
            criterion=criterion,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    network, optimizer = made[0], made[1]
    if mode == "ghost":
        criterion = made[2]

    def step(x: Tensor, y: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.zero_grad()
            criterion(network(x), y).backward()
            optimizer.step()

    return step
