"""Ways to send updates, each with several seeds: bytes up, and the accuracy of the model.

    umbel bench compression --out FOLDER

Every cell is a run of the app. A cell that has ended is a line of `cells.jsonl` in the folder and
is not run again; so the command can be stopped, and goes on where it was.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umbel.core.options import Options, parse

WAYS: Mapping[str, Mapping[str, str]] = {
    "plain": {
        "none": "",
        "qsgd-4": "compression=qsgd-4",
        "qsgd-2": "compression=qsgd-2",
    },
    "secure": {
        "none": "secure=true",
        "random-k+qsgd-4": (
            "secure=true secure-norm=3 compression=random-k+qsgd-4 compression-fraction=0.58"
        ),
    },
    "epsilon=8": {
        "none": "epsilon=8",
        "random-k": "epsilon=8 compression=random-k compression-fraction=0.1",
    },
}
"""For each kind of run the options of its ways; all are compared with the first, `none`."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        kind: of the run, a key of `WAYS`.
        way: how updates are sent.
        seed: of the run.
        options: what was given beside the seed.
        accuracy: on held-out examples, of the model at the end.
        bytes_up: of a node in a round, on average.
        rounds: that were run.
    """

    kind: str
    way: str
    seed: int
    options: str
    accuracy: float
    bytes_up: float
    rounds: int


Play = Callable[[Options, Path], tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]]
"""Runs the app under options in a folder: the metrics at the end and the lines of the rounds."""


def measure(
    play: Play,
    seeds: Sequence[int],
    kinds: Sequence[str],
    given: str,
    out: Path,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """All cells, those that were run before among them.

    Args:
        play: runs the app.
        seeds: of the runs.
        kinds: keys of `WAYS`.
        given: options of all runs.
        out: the folder.
        tell: hears a line for each run.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cells.jsonl"
    found = _read(path)
    for seed in seeds:
        for kind in kinds:
            for way, more in WAYS[kind].items():
                options = f"{given} {more}".strip()
                if (kind, way, seed, options) in found:
                    continue
                place = out / f"{kind}-{way}-{seed}".replace("=", "")
                cell = _cell(play, kind, way, seed, options, place)
                found[kind, way, seed, options] = cell
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(cell)) + "\n")
                tell(f"{kind}, {way}, seed {seed}: {100 * cell.accuracy:.1f} %")
    return [cell for cell in found.values() if cell.kind in kinds and cell.seed in seeds]


def _read(path: Path) -> dict[tuple[str, str, int, str], Cell]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [Cell(**json.loads(line)) for line in lines]
    return {(cell.kind, cell.way, cell.seed, cell.options): cell for cell in cells}


def _cell(play: Play, kind: str, way: str, seed: int, options: str, place: Path) -> Cell:
    metrics, lines = play({**parse(options.split()), "seed": seed}, place)
    trained = [line for line in lines if line["round"] > 0]
    replies = sum(line["clients"] for line in trained)
    return Cell(
        kind=kind,
        way=way,
        seed=seed,
        options=options,
        accuracy=metrics["accuracy"],
        bytes_up=sum(line["bytes_up"] for line in trained) / max(1, replies),
        rounds=len(trained),
    )


def table(cells: Sequence[Cell]) -> str:
    """A Markdown table: a way a row, with what it saves and loses beside `none` of its kind."""
    lines = [
        "| | options | bytes up, a node and round | times fewer | accuracy, mean (each seed) "
        "| points |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(cell.kind for cell in cells):
        rows = {
            way: sorted((c for c in cells if (c.kind, c.way) == (kind, way)), key=lambda c: c.seed)
            for way in dict.fromkeys(cell.way for cell in cells if cell.kind == kind)
        }
        plain = rows["none"]
        for way, row in rows.items():
            bytes_, mean = _mean(row, "bytes_up"), _mean(row, "accuracy")
            each = ", ".join(f"{100 * cell.accuracy:.1f}" for cell in row)
            points = 100 * (mean - _mean(plain, "accuracy"))
            shown = WAYS[kind].get(way, "")
            lines.append(
                f"| {kind}, {way} | `{shown}` | {bytes_:,.0f} | "
                f"{_mean(plain, 'bytes_up') / bytes_:.1f} | {100 * mean:.1f} ({each}) | "
                f"{points:+.1f} |"
            )
    return "\n".join(lines)


def _mean(cells: Sequence[Cell], name: str) -> float:
    return statistics.fmean(float(getattr(cell, name)) for cell in cells)


def write(cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """Write the table and the JSON object into the folder, and return the object."""
    found = {"cells": [asdict(cell) for cell in cells]}
    (out / "compression.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "compression.md").write_text(table(cells) + "\n", encoding="utf-8")
    return found
