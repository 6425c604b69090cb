"""The command line.

Exit status: 0 done; 1 the run failed; 2 bad usage or configuration; 3 a check failed; 130
stopped by Ctrl-C. Results go to stdout, everything else to stderr. Commands import what they
need when they run, so that `umbel --help` is quick.
"""

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from umbel.commands import compare as compare_command
from umbel.commands import deliver as deliver_commands
from umbel.commands import run as run_commands
from umbel.commands import runs as runs_command
from umbel.commands import server as server_commands
from umbel.commands import upkeep as upkeep_commands
from umbel.commands.groups import Commands

# Umbel makes no connection that its user did not ask for; Flower asks this when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Threads of tensor operations wait for each other briefly, then sleep. By default they spin for
# milliseconds, and the coordinator's would do so on the cores that the worker processes need.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

CHECK_FAILED = 3
INTERRUPTED = 130

_GROUPS = {
    "privacy": "Plan a private run: epsilon of a schedule, noise for a budget.",
    "bench": "Benchmarks of this installation.",
    "data": "Data sets: list them, fetch them.",
    "registry": "Models by name: versions, tags, and where each comes from.",
    "client": "Be a node of a federation: stay connected, train when asked.",
}
"""Command groups, each in a module `umbel.commands.{name}` of its own, as `app`."""

app = Commands(
    name="umbel",
    help="Federated learning on Flower.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AppArgument = Annotated[
    Path | None, typer.Argument(metavar="[APP]", help="An app's folder; the bundled example.")
]
Options = Annotated[
    list[str] | None,
    typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Change the app's options."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]


def _version(asked: bool) -> None:
    if asked:
        from umbel import __version__

        typer.echo(f"umbel {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Federated learning on Flower."""
    context.obj = {"debug": debug}


@app.command("run")
def run_command(
    path: AppArgument = None,
    config: Options = None,
    nodes: Annotated[int | None, typer.Option(help="Virtual nodes.", min=1)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; 0 is none. Default: one a core.", min=0)
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(help="Where nodes run: processes, threads, NAME or NAME://ADDRESS."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<run-id>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    unprotected: Annotated[
        bool,
        typer.Option(
            "--unprotected", help="Release without noise about people with a privacy budget."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an app on this machine and write a report."""
    from umbel.core.errors import ConfigError
    from umbel.core.options import parse
    from umbel.opening import opened

    if resume is not None and (path is not None or out is not None):
        raise ConfigError("--resume names the run to continue; leave out APP and --out")
    options = parse(config or [])
    if resume is None:
        opened(path, options).server_app()  # its faults are told before anything else is imported

    from umbel.running import Interrupted, run

    try:
        result = run(
            path,
            options=options,
            nodes=nodes,
            workers=workers,
            pool=pool,
            out=out,
            resume=resume,
            unprotected=unprotected,
        )
    except Interrupted as stop:  # Typer would end here without a word
        raise typer.Exit(_stopped(stop)) from None

    from umbel.server.output import strict
    from umbel.server.output.report import write_report

    report = write_report(Path(result["run"]))
    if as_json:
        typer.echo(strict.dumps(result))
        return
    from umbel.summary import lines

    for line in lines(result, report):
        typer.echo(line)


@app.command("options")
def options_command(
    path: AppArgument = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page of Umbel's own options.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every option of an app: type, default, values, meaning, and who reads it."""
    if markdown:
        from umbel.commands.options_listing import reference

        typer.echo(reference(), nl=False)
        return
    from umbel.opening import opened

    folder = opened(path, {})
    server = folder.server_app()

    from umbel.commands import options_listing
    from umbel.federation import FederationServerApp
    from umbel.server.output import strict

    federation = server.federation if isinstance(server, FederationServerApp) else None
    rows = options_listing.listing(federation, folder.options)
    if as_json:
        typer.echo(strict.dumps({"app": folder.name, "options": options_listing.as_json(rows)}))
        return
    from umbel.commands.options_table import show

    show(rows)


@app.command("new")
def new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Folder to make.")],
    framework: Annotated[
        str,
        typer.Option(metavar="NAME", help="torch, keras, jax, transformers, sklearn or numpy."),
    ] = "torch",
) -> None:
    """Make an app that runs at once."""
    from umbel.scaffold import new_app

    folder = new_app(Path(name), framework)
    typer.echo(f"made {folder}; run it with: umbel run {name}")


app.command("runs")(runs_command.runs)
app.command("compare")(compare_command.compare)
app.command("report")(run_commands.report)
app.command("verify")(run_commands.verify)
app.command("key")(run_commands.key)
app.command("export")(deliver_commands.export)
app.command("compress")(deliver_commands.compress)
app.command("tune")(deliver_commands.tune)
app.command("predict")(deliver_commands.predict)
app.command("server")(server_commands.server)
app.command("status")(server_commands.status)
app.command("submit")(server_commands.submit)
app.command("jobs")(server_commands.jobs)
app.command("cancel")(server_commands.cancel)
app.command("backup")(upkeep_commands.backup)
app.command("restore")(upkeep_commands.restore)
app.command("prune")(upkeep_commands.prune)
app.command("doctor")(upkeep_commands.doctor)
app.add_typer(server_commands.nodes, name="nodes")


def _mount(arguments: list[str]) -> None:
    """Import the group that is asked for; the others are names with a help text."""
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    completing = "_UMBEL_COMPLETE" in os.environ  # a shell asks what could come next
    for name, text in _GROUPS.items():
        if completing or name == wanted:
            module = importlib.import_module(f"umbel.commands.{name}")
            app.add_typer(module.app, name=name, help=text)
        else:
            app.add_typer(Commands(), name=name, help=text)


def main() -> None:
    """Entry point of the `umbel` command."""
    debug = "--debug" in sys.argv[1:]
    # of the whole command, but people add it at the end of the line that failed
    arguments = ["--debug"] * debug + [word for word in sys.argv[1:] if word != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    forks_die_politely()
    _mount(arguments)
    status: Any
    try:
        status = app(arguments, standalone_mode=False)
    except Exception as error:
        status = _explain(error, debug=debug)
    except KeyboardInterrupt as stop:
        status = _stopped(stop)
    sys.stdout.flush()
    for each in (signal.SIGTERM, signal.SIGINT):  # nothing is left that one could interrupt
        signal.signal(each, signal.SIG_DFL)
    sys.exit(status if isinstance(status, int) else 0)


def forks_die_politely() -> None:
    """Let a polite kill end what is forked from this process, whatever it does here.

    An app's own processes (`multiprocessing.Pool`) are ended so, and inherit the handlers by
    which this process takes it for a Ctrl-C or stops at the next safe place.
    """
    os.register_at_fork(after_in_child=_forget_our_handler)


def _forget_our_handler() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    ours = str(getattr(handler, "__module__", "")).startswith("umbel.")
    if handler is signal.default_int_handler or ours:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stopped(stop: BaseException | None) -> int:
    """Say how to go on after a signal; the exit status."""
    from umbel.core.errors import Interrupted

    run = stop.run if isinstance(stop, Interrupted) else None
    _say("stopped" if run is None else f"stopped; continue with: umbel run --resume {run}")
    return INTERRUPTED


def _explain(error: Exception, *, debug: bool) -> int:
    """Say in one sentence what went wrong; the exit status."""
    from umbel.core.errors import UmbelError, described

    if debug and not isinstance(error, click.ClickException):
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        hint = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        said = error.format_message().partition(" Did you mean")  # click and typer both ask
        text = said[0] + "".join(said[1:]).split("?")[0] + ("?" if said[1] else "")
        _say(text + (f" See: {hint} --help" if hint else ""))
        return 2
    if isinstance(error, click.Abort):
        return _stopped(error)
    if isinstance(error, UmbelError):
        _say(str(error))
        return error.exit_status
    _say(f"{described(error)}; add --debug for the traceback")
    return 1


def _say(text: str) -> None:
    sys.stderr.write(f"umbel: {text}\n")
