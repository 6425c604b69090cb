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
    rules: Annotated[str, typer.Option(help="Aggregators. Default: all.", metavar="'A B'")] = "",
    attacks: Annotated[str, typer.Option(help="Attacks. Default: all.", metavar="'A B'")] = "",
    floor: Annotated[
        float, typer.Option(help="So much accuracy may a rule lose that says to stand it.")
    ] = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: runs/bench-robust-<date>.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Play every attack against every aggregator; exit 3 where one falls below its floor."""
    from umbel.core.options import parse
    from umbel.opening import opened

    changes = parse(config or [])
    folder = opened(app, changes)
    server = folder.server_app()

    from rich.console import Console

    from umbel.benchmarks.robust import suite
    from umbel.benchmarks.robust.attacks import ATTACKS
    from umbel.core.errors import ConfigError
    from umbel.federation import FederationServerApp
    from umbel.server.output import strict
    from umbel.strategies.aggregators.named import RULES

    console = Console(stderr=True)
    if not isinstance(server, FederationServerApp):
        raise ConfigError(
            f"{folder.path} is not made with Umbel's Federation, so its aggregator is its own; "
            "name an app that is"
        )
    federation = server.federation
    options = federation.complete({**folder.options, **changes})
    every = [name for name in ("mean", *RULES) if name != "fltrust" or federation.root]
    cells = suite.measure(
        federation,
        nodes,
        options,
        rules.split() or every,
        attacks.split() or ATTACKS,
        liars,
        console.print,
    )
    where = out or Path("runs") / time.strftime("bench-robust-%Y%m%d-%H%M%S")
    found = suite.write(cells, where, floor)
    console.print(suite.table(cells))
    for name in found["fallen"]:
        console.print(f"{name} lost more than {floor:g} of its accuracy")
    if as_json:
        typer.echo(strict.dumps(found))
    if found["fallen"]:
        raise typer.Exit(FALLEN)
