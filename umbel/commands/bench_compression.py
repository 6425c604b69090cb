"""`umbel bench compression`: fewer bytes up, and what they cost in accuracy."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def compression(
    app: Annotated[
        Path | None, typer.Option(help="On this app's data and model, not the bundled example's.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Change the app's options."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 3,
    kinds: Annotated[
        str,
        typer.Option(help="Kinds of runs: plain secure epsilon=8. Default: all.", metavar="'A B'"),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write, and to go on. Default: runs/bench-compression-<date>."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Run an app with each way to send updates; with the same --out a stopped command goes on."""
    from rich.console import Console

    from umbel.benchmarks.compression import suite
    from umbel.core.errors import ConfigError
    from umbel.running import run
    from umbel.server.output import strict
    from umbel.server.output.progress import SilentProgress

    console = Console(stderr=True)
    chosen = kinds.split() or list(suite.WAYS)
    for kind in chosen:
        if kind not in suite.WAYS:
            raise ConfigError(f"kinds has {kind!r}; it can be {', '.join(suite.WAYS)}")

    def play(
        options: Mapping[str, Any], place: Path
    ) -> tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]:
        where: dict[str, Any] = {"resume": place} if place.exists() else {"app": app, "out": place}
        result = run(options=dict(options), progress=SilentProgress(), **where)
        return result.metrics, result.lines()

    where = out or Path("runs") / time.strftime("bench-compression-%Y%m%d-%H%M%S")
    given = " ".join(config or [])
    cells = suite.measure(play, range(seeds), chosen, given, where, console.print)
    found = suite.write(cells, where)
    console.print(suite.table(cells), markup=False)
    if as_json:
        typer.echo(strict.dumps(found))
