"""`umbel runs`: the runs of some folders, a line each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FOLDER]...",
        help="Folders that hold runs, or a coordinator's state folder. Default: runs in the "
        "current folder, and those that `flwr run` has made.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]


def runs(folders: Folders = None, as_json: AsJson = False) -> None:
    """List runs: where each is, what it is of, how far it came, and what it has reached."""
    from umbel.server.output import strict
    from umbel.server.output.listing import listed, noted

    here = Path("runs")
    wanted = folders or [*([here] if here.is_dir() else []), *noted()]
    found = listed(wanted)
    if as_json:
        typer.echo(strict.dumps({"runs": found}))
        return
    if not found:
        where = ", ".join(map(str, folders)) if folders else "runs/"
        typer.echo(f"no runs in {where}; make one with: umbel run")
        return
    for line in table(found):
        typer.echo(line)


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table: titles, then a line for each run."""
    titles = ("run", "state", "app", "engine", "rounds", "accuracy", "epsilon")
    return aligned([titles, *map(_cells, found)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines in which the columns stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    from umbel.core.text import plain

    accuracy, epsilon = line["accuracy"], line["epsilon"]
    return (
        line["run"],
        line["state"],
        *("-" if line[key] is None else plain(line[key], 40) for key in ("app", "engine")),
        "-" if line["rounds"] is None else str(line["rounds"]),
        "-" if accuracy is None else f"{accuracy:.1%}",
        "-" if epsilon is None else f"{epsilon:.3g}",
    )
