"""`umbel data`: which data sets there are, and fetching them ahead of a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from umbel.clients.data import datasets
from umbel.commands.groups import Commands
from umbel.server.output import strict

app = Commands(name="data", help="List data sets and fetch them.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show the data sets that can be used by name, and which of them are on this machine."""
    places = {name: datasets.place(name) for name in datasets.CATALOGUE}
    if as_json:
        rows = [
            {**asdict(entry), "place": places[entry.name]} for entry in datasets.CATALOGUE.values()
        ]
        typer.echo(strict.dumps({"datasets": rows, "cache": str(datasets.cache_folder())}))
        return
    header = ("name", "task", "train", "test", "source", "here")
    lines: list[tuple[str, ...]] = [
        (
            entry.name,
            entry.task,
            f"{entry.train:,}",
            f"{entry.test:,}",
            entry.source,
            "yes" if places[entry.name] else "no",
        )
        for entry in datasets.CATALOGUE.values()
    ]
    if not sys.stdout.isatty():
        for line in (header, *lines):
            typer.echo("\t".join(line))
        return
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        caption=f"Fetched data are kept in {datasets.cache_folder()}",
        caption_justify="left",
    )
    for title in header:
        table.add_column(
            title,
            no_wrap=title != "source",
            justify="right" if title in ("train", "test") else "left",
        )
    for line in lines:
        table.add_row(*line)
    Console().print(table)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A name that `umbel data list` shows.")],
    as_json: Json = False,
) -> None:
    """Bring a data set to this machine and check it; quick when it is there already."""
    with _shown() as progress:
        place = datasets.fetch(name, progress=progress)
    entry = datasets.find(name)
    if as_json:
        typer.echo(strict.dumps({**asdict(entry), "place": place}))
    else:
        typer.echo(
            f"{name}: {entry.train:,} training and {entry.test:,} test examples, from {place}"
        )


@contextmanager
def _shown() -> Iterator[datasets.Progress]:
    """Progress on stderr: a bar on a terminal, a line for each step elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(doing: str, share: float) -> None:  # noqa: ARG001
            if doing not in seen:
                seen.add(doing)
                typer.echo(doing, err=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("looking", total=1.0)
        yield lambda doing, share: bar.update(task, description=doing, completed=share)
