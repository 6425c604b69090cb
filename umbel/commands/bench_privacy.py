"""`umbel bench privacy`: attack the stack that will run."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from umbel.benchmarks.attack.suite import Report

CHECK_FAILED = 3


class Fault(StrEnum):
    """What can be broken on purpose."""

    NOISE = "noise"
    CLIP = "clip"
    WEIGHTS = "weights"


_FAULTS = {
    Fault.NOISE: "noise x 0.25",
    Fault.CLIP: "clip skipped",
    Fault.WEIGHTS: "weights not bounded",
}


def privacy(
    app: Annotated[
        Path | None, typer.Option(help="Attack this app's task and stack, not the bundled ones.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Change the app's options."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="All defences and large samples, or five minutes."),
    ] = False,
    inject: Annotated[
        Fault | None, typer.Option(help="Break the audited stack on purpose: it must be noticed.")
    ] = None,
    utility: Annotated[
        bool, typer.Option("--utility", help="Measure accuracy against epsilon instead.")
    ] = False,
    recipes: Annotated[
        str, typer.Option(help="Of --utility: quick, best, cnn, few (6,000 users). Default: all.")
    ] = "",
    epsilons: Annotated[
        str, typer.Option(help="Of --utility, instead of its plan's.", metavar="'1 2.7 ...'")
    ] = "",
    repeats: Annotated[
        int | None, typer.Option(help="Runs at each epsilon, for --utility.", min=1)
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Print the Markdown table of an earlier run's folder.", metavar="RUN"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is not noise.", min=0)] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes; 0 is none. Default: one a core.", min=0)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: runs/bench-privacy-<date>.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object as the last line on stdout.")
    ] = False,
) -> None:
    """Attack every defence, test every claim; exit 3 where one does not hold or was not tested."""
    from umbel.core.errors import ConfigError

    if config and app is None and not utility:
        raise ConfigError("-c changes an app's options; name the app with --app")
    # an app's faults are told before anything else is imported
    own = None if app is None or utility or table else opened(app, config or [])

    from rich.console import Console

    from umbel.benchmarks.attack import report as privacy_report
    from umbel.server.output import strict

    if table is not None:
        typer.echo(_table(table))
        return
    if utility:
        _utility(app, full, recipes, epsilons, repeats, out, as_json)
        return
    report = _measured(own, full, inject, seed, workers)
    out = out or Path("runs") / time.strftime("bench-privacy-%Y%m%d-%H%M%S")
    report.about["command"] = " ".join(["umbel", *sys.argv[1:]])  # type: ignore[index]
    files = privacy_report.write(report, out)
    problems = report.problems()
    if as_json:
        typer.echo(strict.dumps({**privacy_report.to_json(report), "report": str(files[-1])}))
    else:
        for half in privacy_report.tables(report):
            Console().print(half)
        for row in report.rows:
            for verdict in row.verdicts:
                typer.echo(verdict.sentence)
        for warning in report.warnings():
            typer.echo(f"warning: {warning}")
        typer.echo(f"report: {files[-1]}")
    for problem in (*problems, *report.untested()):
        sys.stderr.write(f"umbel: {problem}\n")
    if problems or report.untested():
        raise typer.Exit(CHECK_FAILED)


def _table(run: Path) -> str:
    """The rows of an earlier report that people ask for, as Markdown."""
    from umbel.benchmarks.attack import report as privacy_report
    from umbel.core.errors import ConfigError
    from umbel.server.output import strict

    file = run / "report.json"
    try:
        content = strict.loads(file.read_text(encoding="utf-8"))
        return privacy_report.markdown(content, privacy_report.BRIEF).rstrip()
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{file} is no report of umbel bench privacy; give the folder that it printed at its "
            "end, such as runs/bench-privacy-20261123-200000"
        ) from None


def _utility(
    app: Path | None,
    full: bool,
    recipes: str,
    texts: str,
    repeats: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Accuracy against epsilon, by whole private runs."""
    from umbel.benchmarks.speed import utility
    from umbel.core.errors import ConfigError
    from umbel.opening import example
    from umbel.running import run
    from umbel.server.output import strict
    from umbel.server.output.rundir import machine, versions

    try:
        epsilons = [float(text) for text in texts.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"epsilons is {texts!r}; give numbers, such as '1 2.7 8'") from None
    try:
        names = recipes.replace(",", " ").split()
        settings = utility.plan(full, recipes=names, epsilons=epsilons, repeats=repeats)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    out = out or Path("runs") / time.strftime("bench-utility-%Y%m%d-%H%M%S")
    command = " ".join(["umbel", *sys.argv[1:]])
    points = utility.measure(
        run,
        app or example("private-fashion"),
        settings,
        out,
        lambda text: print(text, file=sys.stderr, flush=True),
        {"command": command, "machine": machine(), "versions": versions()},
    )
    for line in utility.lines(points):
        typer.echo(line)
    typer.echo(f"written: {out / 'utility.json'}, {out / 'utility.png'}")
    if as_json:
        typer.echo(strict.dumps(strict.loads((out / "utility.json").read_text(encoding="utf-8"))))


def _measured(
    own: tuple[Any, dict[str, Any], int, str] | None,
    full: bool,
    inject: Fault | None,
    seed: int,
    workers: int | None,
) -> "Report":
    from umbel.benchmarks.attack import jobs, plans
    from umbel.benchmarks.attack.defences import FAULTS
    from umbel.benchmarks.attack.suite import Report, Row, run, stamp
    from umbel.federation import Federation

    canaries = 5000 if full else 1000
    fault = None if inject is None else _FAULTS[inject]
    if own is not None:
        from umbel.benchmarks.attack.own import attack

        federation, options, nodes, name = own
        broken = None if fault is None else FAULTS[fault]
        return attack(
            federation, nodes, options, name=name, canaries=canaries, seed=seed, fault=broken
        )
    if fault is not None:
        found = jobs.audit_fault(
            Federation, fault, epsilon=1.0, canaries=canaries, delta=1e-5, seed=seed
        )
        words = "A central Gaussian stack that was broken on purpose."
        row = Row("canaries", fault, words, {}, found, [])
        return Report([row], about=stamp(seed, canaries))
    plan = plans.full(seed) if full else plans.quick(seed)
    return run(Federation, plan, workers=workers, say=_progress)


def opened(app: Path, config: list[str]) -> tuple[Any, dict[str, Any], int, str]:
    """An app's federation, its options with changes, its number of nodes and its name.

    Raises:
        ConfigError: the app was not made with `Federation`, or an option is unknown.
    """
    from umbel.core.errors import ConfigError
    from umbel.core.options import override, parse
    from umbel.opening import opened as opened_app

    changes = parse(config)
    folder = opened_app(app, changes)
    server = folder.server_app()

    from umbel.federation import FederationServerApp
    from umbel.running import NODES

    if not isinstance(server, FederationServerApp):
        raise ConfigError(
            f"{folder.name} keeps its own rounds, so its stack cannot be taken out and attacked; "
            "only apps made with Federation can"
        )
    federation = server.federation
    options = override(federation.complete(folder.options), changes)
    return federation, options, folder.nodes or NODES, folder.name


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{done}/{total}  {what}" + ("\n" if done == total else ""))
    else:
        sys.stderr.write(f"{done}/{total}  {what}\n")
    sys.stderr.flush()
