"""`umbel bench speed`: what the engine costs, measured beside what it is compared with.

Everything that is compared is measured in the same run, in turns, as medians after a warm-up.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from umbel.benchmarks.figures import Figure, plot, rows
from umbel.benchmarks.speed import (
    aggregation,
    at_rest,
    compression,
    link,
    memory,
    messages,
    methods,
    noise,
    private_fashion,
    private_round,
    private_sgd,
    robust,
    secure,
    training,
)
from umbel.core.errors import ConfigError
from umbel.server.output import strict
from umbel.server.output.rundir import machine, versions

PRIVATE = ("noise", "private-sgd", "private-round")
"""What `--privacy` measures; private-fashion takes many minutes and is measured by name."""
ON_REQUEST = (
    "methods",
    "clusters",
    "memory",
    "memory-large",
    "link",
    "secure",
    "compression",
    "robust",
    *PRIVATE,
    "private-fashion",
)
"""Parts that are measured only when they are named."""

HEADINGS = ("part", "what", "measured", "target", "beside it")


@dataclass(frozen=True)
class Apps:
    """The apps that are measured: the bundled examples, and what `umbel new` makes."""

    example: Path
    digits: Path
    private: Path


def parts(apps: Apps, quick: bool, flower: bool) -> Mapping[str, Callable[[], list[Figure]]]:
    """The parts of the benchmark by name, in the order in which they run."""
    return {
        "messages": lambda: messages.measure(quick=quick, flower=flower),
        "aggregation": lambda: aggregation.measure(quick=quick),
        "example": lambda: training.measure_example(apps.example, quick=quick, flower=flower),
        "methods": lambda: methods.measure(apps.example, quick=quick),
        "memory": lambda: memory.measure(quick=quick),
        "memory-large": lambda: memory.measure_large(quick=quick),
        "clusters": lambda: at_rest.measure(quick=quick),
        "small": lambda: training.measure_small(apps.digits, quick=quick),
        "link": lambda: link.figures(quick=quick, flower=flower),
        "secure": lambda: secure.figures(quick=quick),
        "compression": lambda: compression.measure(quick=quick),
        "robust": lambda: robust.measure(quick=quick),
        "noise": lambda: noise.measure(quick=quick),
        "private-sgd": lambda: private_sgd.measure(quick=quick),
        "private-round": lambda: private_round.measure(quick=quick),
        "private-fashion": lambda: private_fashion.measure(apps.private, quick=quick),
    }


def measure(
    apps: Apps,
    only: Sequence[str] = (),
    *,
    quick: bool = False,
    flower: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        apps: what is trained.
        only: names of parts; all of them if empty.
        quick: small sizes and few repeats: a check that it works, not a measurement.
        flower: also run Flower's simulation under Ray.
        note: told the name of every part before it begins.

    Returns:
        `machine`, `versions`, `quick`, `seconds` and `figures`, as JSON's types.

    Raises:
        ConfigError: there is no part of that name.
    """
    known = parts(apps, quick, flower)
    for name in only:
        if name not in known:
            raise ConfigError(f"there is no part {name!r} to measure; take {', '.join(known)}")
    began = time.monotonic()
    figures: list[Figure] = []
    for name in only or [name for name in known if name not in ON_REQUEST]:
        note(name)
        figures += known[name]()
    return {
        "machine": machine(),
        "versions": versions(),
        "quick": quick,
        "seconds": round(time.monotonic() - began, 1),
        "figures": [figure.as_json() for figure in figures],
    }


def main(
    apps: Apps,
    out: Path,
    only: Sequence[str] = (),
    *,
    quick: bool = False,
    flower: bool = False,
    as_json: bool = False,
) -> bool:
    """Measure, print a table, and write `speed.json` and `speed.png` to `out`.

    Returns:
        Whether every target was met.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = measure(apps, only, quick=quick, flower=flower, note=_note)
    figures = figures_of(result)
    (out / "speed.json").write_text(strict.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(figures, out / "speed.png")
    show(figures, result["machine"])
    print(f"written to {out}")
    if as_json:
        print(strict.dumps(result))
    return all(figure.met is not False for figure in figures)


def figures_of(result: Mapping[str, Any]) -> list[Figure]:
    """The figures of a result, as of `speed.json`."""
    return [
        Figure(**{name: value for name, value in item.items() if name != "met"})
        for item in result["figures"]
    ]


def show(figures: Sequence[Figure], where: Mapping[str, Any]) -> None:
    """Print the figures to stdout: a table on a terminal, tab-separated lines elsewhere."""
    about = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    if not sys.stdout.isatty():
        print(about)
        for row in [HEADINGS, *rows(figures)]:
            print("\t".join(row))
        return
    table = Table(*HEADINGS, title=about)
    for row in rows(figures):
        table.add_row(*row)
    Console().print(table)


def _note(part: str) -> None:
    print(f"measuring {part} ...", file=sys.stderr, flush=True)
