"""The table, the plot and the JSON object of attacks against stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umbel.benchmarks.robust.suite import Cell, percent
from umbel.core.errors import ConfigError
from umbel.server.output import strict


def table(cells: Sequence[Cell]) -> str:
    """Accuracies as a Markdown table: a stack a row, an attack a column.

    Behind the accuracy of a backdoor stands its success; in the column of no attack, what the
    patch does without one.
    """
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    found = {(cell.rule, cell.attack): cell for cell in cells}
    lines = [
        "| aggregator | " + " | ".join(attacks) + " | ms |",
        "|---" * (len(attacks) + 2) + "|",
    ]
    for rule in dict.fromkeys(cell.rule for cell in cells):
        row = [found.get((rule, attack)) for attack in attacks]
        clean = found.get((rule, "none"))
        cost = "" if clean is None or clean.refused else f"{1000 * clean.seconds:.0f}"
        lines.append(f"| {rule} | " + " | ".join(map(_shown, row)) + f" | {cost} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.refused:
        return "refused"
    if cell.backdoor is None:
        return percent(cell.accuracy)
    return f"{percent(cell.accuracy)} ({percent(cell.backdoor)})"


def fallen(cells: Sequence[Cell], floor: float) -> list[str]:
    """The stacks that lose more than `floor` under liars that they say to stand."""
    return [f"{cell.rule} under {cell.attack}" for cell in cells if cell.falls(floor)]


def write(
    cells: Sequence[Cell], out: Path, floor: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `robust.json`, `robust.md` and `robust.png` into a folder, and return the object."""
    found = as_json(cells, floor, about)
    save(found, out)
    (out / "robust.md").write_text(table(cells) + "\n", encoding="utf-8")
    plot(cells, out / "robust.png")
    return found


def as_json(cells: Sequence[Cell], floor: float, about: Mapping[str, Any]) -> dict[str, Any]:
    """The object of `robust.json`."""
    return {
        "setting": dict(about),
        "cells": [asdict(cell) for cell in cells],
        "floor": floor,
        "fallen": fallen(cells, floor),
    }


def save(found: Mapping[str, Any], out: Path) -> None:
    """Write `robust.json`; an earlier one is there until this one is whole."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "robust.json.part"
    file.write_text(strict.dumps(found, indent=1) + "\n", encoding="utf-8")
    file.replace(out / "robust.json")


def known(out: Path, about: Mapping[str, Any]) -> list[Cell]:
    """The cells that a folder has.

    Raises:
        ConfigError: they are of another setting, or are no such cells.
    """
    file = out / "robust.json"
    if not file.is_file():
        return []
    try:
        found = strict.loads(file.read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in found["cells"]]
        differing = {
            n for n in about if found["setting"].get(n) != strict.loads(strict.dumps(about[n]))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be gone on with ({error}); name another --out") from error
    if differing:
        raise ConfigError(
            f"{file} was measured with other {', '.join(sorted(differing))}; name another --out"
        )
    return cells


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy as colours: a stack a row, an attack a column."""
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(cell.rule for cell in cells))
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    found = {(cell.rule, cell.attack): cell for cell in cells}
    values = [[_value(found.get((rule, attack))) for attack in attacks] for rule in rules]
    figure = Figure(
        figsize=(2.6 + 0.85 * len(attacks), 1.6 + 0.4 * len(rules)), layout="constrained"
    )
    axes = figure.subplots()
    shown = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(rules)), rules, fontsize=8)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = "" if value != value else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    figure.colorbar(shown, label="accuracy, %")
    figure.savefig(path, dpi=130)


def _value(cell: Cell | None) -> float:
    none = cell is None or cell.accuracy is None
    return float("nan") if none or cell is None else 100 * (cell.accuracy or 0.0)
