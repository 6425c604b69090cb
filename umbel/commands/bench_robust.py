"""`umbel bench robust`: nodes that lie, against rules that are to stand them."""

import time
from pathlib import Path
from typing import Annotated

import typer

FALLEN = 3


def robust(
    app: Annotated[
        Path | None, typer.Option(help="On this app's data and model, not the bundled example's.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Change the app's options."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Virtual nodes.", min=2)] = 20,
    liars: Annotated[float, typer.Option(help="The share of the nodes that lie.")] = 0.2,
    rules: Annotated[
        str,
        typer.Option(
            help="Aggregators: NAME, NAME/2 over pairs, secure+NAME/3. Default: all in the clear.",
            metavar="'A B'",
        ),
    ] = "",
    attacks: Annotated[str, typer.Option(help="Attacks. Default: all.", metavar="'A B'")] = "",
    omniscient: Annotated[
        bool, typer.Option("--omniscient", help="Liars see the updates of all nodes.")
    ] = False,
    floor: Annotated[
        float, typer.Option(help="So much accuracy may a rule lose that says to stand it.")
    ] = 0.1,
    pool: Annotated[
        str | None, typer.Option(help="Where nodes run: threads, or a pool of the app's own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write, and go on. Default: runs/bench-robust-<date>."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Play every attack against every aggregator; exit 3 where one falls below its floor."""
    from umbel.commands.bench_privacy import opened
    from umbel.core.options import parse
    from umbel.opening import example

    # Before anything that takes a while to import, so that a slip is told at once.
    federation, options, _, name = opened(app or example(), config or [])

    from rich.console import Console

    from umbel.benchmarks.robust import report, suite
    from umbel.server.output import strict
    from umbel.server.pools.choose import check_here
    from umbel.strategies.aggregators.named import RULES

    if pool is not None:
        check_here(pool, "liars are played around a federation of this process")
    console = Console(stderr=True)
    if app is None and "cohort" not in parse(config or []):
        options["cohort"] = "all"  # of a few nodes that are drawn, chance makes more liars
    setting = suite.Setting(federation, nodes, options, liars, omniscient, pool)
    about = {
        "app": name,
        "nodes": nodes,
        "liars": liars,
        "omniscient": omniscient,
        "options": dict(options),
    }
    where = out or Path("runs") / time.strftime("bench-robust-%Y%m%d-%H%M%S")
    every = [name for name in ("mean", *RULES) if name != "fltrust" or federation.root]
    cells = suite.measure(
        setting,
        rules.split() or every,
        attacks.split() or suite.ATTACKS,
        console.print,
        report.known(where, about),
        lambda cells: report.save(report.as_json(cells, floor, about), where),
    )
    found = report.write(cells, where, floor, about)
    typer.echo(report.table(cells))
    for fallen in found["fallen"]:
        console.print(f"{fallen} lost more than {floor:g} of its accuracy")
    if as_json:
        typer.echo(strict.dumps(found))
    if found["fallen"]:
        raise typer.Exit(FALLEN)
