"""`umbel compare`: runs side by side, and the options in which they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from umbel.commands.runs import aligned

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run directories, at least two.")
]
Goal = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help="Compare by this metric, and count the rounds until it is reached: accuracy=0.8.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write a page with the table and a plot by round."),
]
OverSeeds = Annotated[
    bool,
    typer.Option("--over-seeds", help="Runs that differ in their seed alone are one line."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]


def compare(
    runs: Runs,
    target: Goal = None,
    over_seeds: OverSeeds = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: what each reached and spent, and the options in which they differ."""
    from umbel.server.output import strict
    from umbel.server.output.averaging import averaged
    from umbel.server.output.comparing import Target, write_page
    from umbel.server.output.comparing import compare as compared

    whole = compared(runs, None if target is None else Target.parse(target))
    found = averaged(whole) if over_seeds else whole
    page = None if out is None else write_page(found, out)
    if as_json:
        typer.echo(strict.dumps({**found.as_json(), "page": page}))
        return
    table, differing = found.table(), found.differing()
    _show([table.heads, *table.rows])
    for note in found.notes():
        typer.echo(f"\nnote: {note}")
    typer.echo("")
    if differing.rows:
        _show([differing.heads, *differing.rows])
    else:
        typer.echo("They differ in no option.")
    if page is not None:
        typer.echo(f"\n{page}")


def _show(rows: Sequence[Sequence[str]]) -> None:
    for line in aligned(rows):
        typer.echo(line.replace("\u00a0", " "))
