"""`umbel server`, `client`, `nodes`, `status`, `submit`: federations over the network."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.commands.groups import Commands

nodes = Commands(help="Nodes of a federation: invite, list, shut out.", no_args_is_help=True)

State = Annotated[Path, typer.Option("--state", help="Folder that holds what lasts.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Change the app's options."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]
Certificate = Annotated[
    Path | None, typer.Option(help="Own certificate (PEM), in place of the built-in authority's.")
]
Key = Annotated[Path | None, typer.Option(help="Its key (PEM, mode 0600).")]
Root = Annotated[Path | None, typer.Option(help="The authority that the peers' come from (PEM).")]


def server(
    path: Annotated[Path, typer.Argument(metavar="APP", help="The app's folder.")],
    state: State,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where nodes connect.")] = (
        "0.0.0.0:7443"
    ),
    name: Annotated[
        list[str] | None,
        typer.Option(help="DNS name or IP address of this machine; may be repeated."),
    ] = None,
    config: Changes = None,
    nodes: Annotated[
        int, typer.Option(help="Nodes to wait for. Default: all that are enrolled.", min=0)
    ] = 0,
    enough: Annotated[
        float, typer.Option(help="Share of a round's replies to wait for: 0.8 rides out 20 %.")
    ] = 1.0,
    lost_after: Annotated[
        float, typer.Option(help="Seconds after which an absent node is given up.", min=1)
    ] = 120.0,
    stay: Annotated[bool, typer.Option("--serve", help="Stay, and take further runs.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin a new run even if one is unfinished.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: in --state.")] = None,
    largest_reply: Annotated[
        float,
        typer.Option(metavar="MB", help="Largest reply. Default: by what was asked.", min=0),
    ] = 0.0,
    unprotected: Annotated[
        bool,
        typer.Option(
            "--unprotected", help="Release without noise about people with a privacy budget."
        ),
    ] = False,
    engine: Annotated[str, typer.Option(help="link, or flower for Flower's own.")] = "link",
    health: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Local gRPC health endpoint.")
    ] = "",
    metrics: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Local Prometheus endpoint.")
    ] = "",
    certificate: Certificate = None,
    key: Key = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Coordinate a federation: wait for its nodes, run the app, end."""
    from umbel import __version__
    from umbel.core.options import parse
    from umbel.opening import opened

    _begin()
    _check_engine(engine)
    changes = parse(config or [])
    opened(path, changes).server_app()  # its faults are told before anything else is imported

    from umbel.server.link.grid import StoppedError
    from umbel.server.link.service import ServerSettings

    own = _own(certificate, key, root)
    settings = ServerSettings(
        state=state,
        listen=_address(listen),
        names=tuple(name or ()),
        own_certificate=own,
        health=health,
        metrics=metrics,
        lost_after=lost_after,
    )
    if engine == "flower":
        from umbel.flower_engine import serve_with_flower
        from umbel.server.output import strict
        from umbel.server.output.session import UNPROTECTED

        _only_link(**{"--enough": enough != 1, "--serve": stay, "--out": out is not None})
        if unprotected:
            os.environ[UNPROTECTED] = "1"  # Flower runs the app in processes of its own
        try:
            result = serve_with_flower(path, settings, changes, version=__version__, nodes=nodes)
        except StoppedError as stop:
            typer.echo("stopped; the next start begins a new run", err=True)
            raise typer.Exit(128 + stop.number) from None
        if Path(result["run"]).is_dir():
            _show(result, as_json=as_json)
        else:
            typer.echo(strict.dumps(result) if as_json else f"{result['run']}: {result['stopped']}")
        return
    from umbel.serve import RunSettings, serve

    run = RunSettings(
        app=path,
        changes=changes,
        nodes=nodes,
        enough=enough,
        stay=stay,
        fresh=fresh,
        out=out,
        largest_reply=round(largest_reply * 1e6),
        unprotected=unprotected,
    )
    try:
        serve(
            settings,
            run,
            version=__version__,
            on_result=lambda result: _show(result, as_json=as_json),
        )
    except StoppedError as stop:
        if stop.idle:
            typer.echo("stopped; no run is unfinished", err=True)
            return
        typer.echo("stopped; started again on the same --state, the run goes on", err=True)
        raise typer.Exit(128 + stop.number) from None


def client(
    state: State,
    path: Annotated[
        Path | None, typer.Argument(metavar="[APP]", help="The app's folder; later starts know it.")
    ] = None,
    join: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Join file, for the first start.")
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(metavar="'K=V ...'", help="This node's own configuration."),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Of the coordinator, if it has moved.")
    ] = "",
    any_app: Annotated[
        bool, typer.Option("--any-app", help="Work even if the coordinator's app differs.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End with the coordinator's run.")] = False,
    threads: Annotated[int, typer.Option(help="Of tensor operations. Default: all.", min=0)] = 0,
    gpu: Annotated[str, typer.Option(help="auto, none, or a number.")] = "auto",
    give_up: Annotated[
        bool,
        typer.Option("--give-up", help="End when refused, in place of asking again slowly."),
    ] = False,
    proxy: Annotated[
        bool | None,
        typer.Option("--proxy/--no-proxy", help="Use http_proxy. Default: as the last start."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What this node allows. Default: policy.toml in --state."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="link, or flower for Flower's own.")] = "link",
    certificate: Certificate = None,
    key: Key = None,
    root: Root = None,
) -> None:
    """Be a node of a federation: stay connected, train when asked."""
    from umbel import __version__
    from umbel.core.options import parse

    _begin()
    _check_engine(engine)
    if path is not None:
        from umbel.opening import opened

        opened(path, {})

    from umbel.clients.process.start import StartSettings, start_node

    settings = StartSettings(
        state=state,
        app=path,
        join=join,
        node_config=None if node_config is None else parse(node_config),
        address=_address(address) if address else "",
        own_certificate=_own(certificate, key, root),
        any_app=any_app,
        once=once,
        threads=threads,
        gpu=gpu,
        give_up=give_up,
        proxy=proxy,
        policy=policy,
    )
    if engine == "flower":
        from umbel.flower_node import node_with_flower

        node_with_flower(settings)
        return
    start_node(settings, version=__version__)


@nodes.command("add")
def nodes_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node.")],
    state: State,
    address: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where the node reaches the coordinator."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Join file. Default: NAME.join.")] = None,
    valid: Annotated[float, typer.Option(help="Hours until the join file is void.")] = 24.0,
    own_certificate: Annotated[
        bool, typer.Option("--own-certificate", help="It brings a certificate; no join file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Invite a node: write a join file for it, or admit its own certificate."""
    from umbel.server.link.enrolment import Enrolment
    from umbel.server.output import strict
    from umbel.transport.join import write_join_file

    os.umask(0o077)
    enrolment = Enrolment(state)
    try:
        if own_certificate:
            enrolment.register(name)
            typer.echo(strict.dumps({"node": name}) if as_json else f"node {name} is admitted")
            return
        address = _address(address or enrolment.fact("address") or "")
        enrolment.keep("address", address)
        host = address.rpartition(":")[0].strip("[]")
        names = enrolment.fact("names") or []
        if host not in names:
            enrolment.keep("names", [host, *names])
        join = enrolment.add(name, enrolment.authority(), address, valid * 3600)
    finally:
        enrolment.close()
    file = out or Path(f"{name}.join")
    write_join_file(file, join)
    if as_json:
        typer.echo(strict.dumps({"node": name, "join_file": str(file), "expires": join.expires}))
        return
    typer.echo(f"{file} admits node {name} once, within {valid:g} hours; carry it there safely")
    typer.echo(f"the authority's fingerprint is {join.root_fingerprint}")


@nodes.command("list")
def nodes_list(state: State, as_json: AsJson = False) -> None:
    """Show the nodes."""
    from umbel.server.link.service import read_status
    from umbel.server.output import strict

    rows = read_status(state)["nodes"]
    if as_json:
        typer.echo(strict.dumps({"nodes": rows}))
        return
    _table([(row["name"], row["state"], _ago(row["last_seen"])) for row in rows])


@nodes.command("revoke")
def nodes_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the node.")], state: State
) -> None:
    """Shut a node out for good; a live connection is cut within a second or two."""
    from umbel.server.link.enrolment import Enrolment

    enrolment = Enrolment(state)
    try:
        enrolment.revoke(name)
    finally:
        enrolment.close()
    typer.echo(f"node {name} is revoked")


def status(state: State, as_json: AsJson = False) -> None:
    """Show where a federation stands."""
    from umbel.core.text import plain
    from umbel.server.link.service import read_status
    from umbel.server.output import strict

    found = read_status(state)
    if as_json:
        typer.echo(strict.dumps(found))
        return
    typer.echo(f"run       {found['run'] or 'none'}")
    typer.echo(f"phase     {found['phase']}")
    pace = f", {found['round_seconds']:.3g} s each" if found.get("round_seconds") else ""
    typer.echo(f"round     {found['round']} of {found.get('rounds', '?')}{pace}")
    for label, value in (found.get("metrics") or {}).items():
        typer.echo(f"{plain(label, 40):9} {value:.4g}")
    if found.get("epsilon") is not None:
        typer.echo(f"epsilon   {found['epsilon']:.3g}")
    traffic = found.get("traffic")
    if traffic:
        down, up = traffic["bytes_down"] / 1e6, traffic["bytes_up"] / 1e6
        rate = found.get("bytes_per_second", 0.0) / 1e6
        typer.echo(f"traffic   {down:.1f} MB down, {up:.1f} MB up, {rate:.1f} MB/s now")
    typer.echo(f"nodes     {len(found['nodes'])}")
    titles = ("name", "state", "last seen", "doing", "version", "device")
    keys = ("phase", "version", "device")
    rows = [
        (row["name"], row["state"], _ago(row["last_seen"]), *(row.get(key) or "" for key in keys))
        for row in found["nodes"]
    ]
    _table([titles, *rows] if rows else [])


def submit(state: State, config: Changes = None) -> None:
    """Ask a coordinator that stays (--serve) for another run."""
    from umbel.core.options import parse
    from umbel.serve import submit as submit_run

    submit_run(state, parse(config or []))
    typer.echo("the coordinator will run it next")


def _address(text: str) -> str:
    from umbel.core.errors import ConfigError

    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535 or any(map(str.isspace, text)):
        raise ConfigError(f"{text!r} is no address; write HOST:PORT, such as hub.example:7443")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ConfigError(f"{text!r} is no address; an IPv6 address stands in brackets: [::1]:7443")
    return text


def _own(
    certificate: Path | None, key: Path | None, root: Path | None
) -> tuple[Path, Path, Path] | None:
    from umbel.core.errors import ConfigError

    if certificate is None and key is None and root is None:
        return None
    if certificate is None or key is None or root is None:
        raise ConfigError("own certificates need all three: --certificate, --key and --root")
    return certificate, key, root


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(("  " + "  ".join(cells)).rstrip())


def _ago(when: Any) -> str:
    if not when:
        return "never seen"
    seconds = max(0.0, time.time() - float(when))
    return (
        "now"
        if seconds < 5
        else f"{seconds:.0f} s ago"
        if seconds < 120
        else (f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago")
    )


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    from umbel.server.output import strict
    from umbel.server.output.report import write_report
    from umbel.summary import lines

    report = write_report(Path(result["run"]))
    for line in [strict.dumps(result)] if as_json else lines(result, report):
        typer.echo(line)
    sys.stdout.flush()


def _begin() -> None:
    """What a process of a federation begins with, before gRPC is imported."""
    os.umask(0o077)  # whatever lies beside keys is for their owner's eyes
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say, we say in a sentence
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )


def _only_link(**given: bool) -> None:
    from umbel.core.errors import ConfigError

    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ConfigError(f"{names[0]} is of the link engine; leave it out, or use --engine link")


def _check_engine(engine: str) -> None:
    from umbel.core.errors import ConfigError

    if engine not in ("link", "flower"):
        raise ConfigError(f"there is no engine {engine!r}; use link or flower")
