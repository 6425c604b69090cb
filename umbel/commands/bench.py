"""`umbel bench`: measure this installation on this machine."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from umbel.commands.bench_methods import methods
from umbel.commands.bench_privacy import privacy
from umbel.commands.bench_robust import robust
from umbel.commands.groups import Commands

app = Commands(name="bench", help="Benchmarks.", no_args_is_help=True)


@app.command()
def speed(
    part: Annotated[
        list[str] | None,
        typer.Argument(
            help="messages, aggregation, example, small; memory, memory-large, link, secure, "
            "robust, noise, private-sgd, private-round, private-fashion (long). Default: "
            "the first four."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: runs/bench-speed-<date>.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works.")] = False,
    flower: Annotated[
        bool, typer.Option("--flower", help="Measure Flower beside it (Ray, SuperLink).")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Measure real nodes over mutual TLS: the part link.")
    ] = False,
    secure: Annotated[
        bool, typer.Option("--secure", help="Measure secure sums: the part secure.")
    ] = False,
    private: Annotated[
        bool,
        typer.Option("--privacy", help="Measure noise, private-sgd and private-round."),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 3 if a target is missed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Speed and memory of the embedded engine, beside bare loops and Flower."""
    from umbel.benchmarks.speed.suite import PRIVATE, Apps, main
    from umbel.opening import example
    from umbel.scaffold import new_app

    named = [*(part or []), *(["link"] if link else []), *(["secure"] if secure else [])]
    named = [*(PRIVATE if private else []), *named]
    out = out or Path("runs") / time.strftime("bench-speed-%Y%m%d-%H%M%S")
    with tempfile.TemporaryDirectory() as made:
        apps = Apps(example(), new_app(Path(made) / "digits"), example("private-fashion"))
        met = main(apps, out, named, quick=quick, flower=flower, as_json=as_json)
    if check and not met:
        raise typer.Exit(3)


app.command("methods")(methods)
app.command("privacy")(privacy)
app.command("robust")(robust)


@app.callback()
def group() -> None:
    """Measure this installation on this machine."""
