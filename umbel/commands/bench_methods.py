"""`umbel bench methods`: every method over seeds, where nodes are unlike each other."""

import time
from pathlib import Path
from typing import Annotated

import typer


def methods(
    data: Annotated[
        str, typer.Option(help="digits (one to three minutes) or fashion-mnist (100 nodes, hours).")
    ] = "digits",
    names: Annotated[
        str, typer.Option("--methods", help="Methods. Default: all.", metavar="'A B'")
    ] = "",
    splits: Annotated[
        str, typer.Option(help="dirichlet, shards. Default: both.", metavar="'A B'")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 3,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Options of every run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write; a folder of an earlier call goes on. Default: "
            "runs/bench-methods-<date>."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Train by every method, over seeds and splits: one table and plots with mean and spread."""
    from rich.console import Console

    from umbel.benchmarks.methods import suite
    from umbel.benchmarks.methods.settings import METHODS, SPLITS, setting_named
    from umbel.core.options import parse
    from umbel.federation import Federation
    from umbel.running import run
    from umbel.server.output import strict

    console, setting = Console(stderr=True, highlight=False), setting_named(data)
    where = out or Path("runs") / time.strftime("bench-methods-%Y%m%d-%H%M%S")
    runs = suite.planned(
        where,
        names.split() or list(METHODS),
        splits.split() or list(SPLITS),
        seeds,
        parse(config or []),
    )
    federation = Federation(**setting.parts())
    suite.measure(federation, run, setting.nodes, runs, lambda line: console.print(line))
    said = suite.write(data, suite.tables(setting, runs), where)
    typer.echo((where / "methods.md").read_text(encoding="utf-8"))
    typer.echo(f"{where}")
    if as_json:
        typer.echo(strict.dumps(said))
