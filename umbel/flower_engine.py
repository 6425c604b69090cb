"""`umbel server --engine flower`: Flower's SuperLink, from the same enrolment.

    listen     as always, so that nodes can enrol
    start      a SuperLink on the next port: TLS with the same certificate, node authentication,
               its database in --state
    register   the nodes' keys; those of revoked nodes are taken out again, also during the run
    submit     the app, with every option that was changed
    follow     the run to its end, with its rounds on the screen and in `umbel status`

Only Flower's own commands are used, with a home of their own in --state, so an operator's
configuration of Flower is neither read nor changed. Flower does not continue a run whose
SuperLink was stopped; whoever starts again begins a new one.
"""

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from umbel.core.app_folder import AppFolder, open_app
from umbel.core.errors import ConfigError, RunError
from umbel.core.options import Options
from umbel.flower_node import toml
from umbel.flower_process import FlowerProcess, environment, program
from umbel.runner import Subject, prepare
from umbel.server.link.grid import StoppedError
from umbel.server.link.service import ServerSettings, Service, WatchedProgress
from umbel.server.output import progress as showing
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.session import STATE
from umbel.transport.keyfiles import write_secret

log = logging.getLogger("umbel.server")
_CONNECTION = "umbel"
_UP_S = 120.0
_LOOK_S = 1.0
_ASK_S = 3.0
_IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs")


def serve_with_flower(
    path: Path, settings: ServerSettings, changes: Options, *, version: str, nodes: int = 0
) -> dict[str, Any]:
    """Run an app on a SuperLink until its run has ended.

    Returns:
        What the app itself reports if it is a federation (its run directory is `run`), with
        `flower_run`, Flower's id; other apps have `run`, `stopped` and `seconds` alone.

    Raises:
        ConfigError: a value that cannot be used.
        RunError: Flower's processes or its run failed.
        StoppedError: by a signal.
    """
    if settings.own_certificate is not None:
        raise ConfigError("--engine flower needs the built-in authority; leave out --certificate")
    folder = open_app(path)
    prepared = prepare(Subject.of(folder), changes)
    home = settings.state.absolute() / "flower"
    shown = showing.choose(sys.stderr)
    service = Service(settings, version=version, app_digest=folder.digest())
    ended = False
    try:
        with _signals():
            service.start()
            for note in prepared.notes:
                shown.note(note)
            shown.note(
                f"nodes enrol on port {service.listener.port}; Flower's SuperLink is being "
                f"started on port {service.listener.port + 1}"
            )
            with _superlink(service, home) as process:
                superlink = _SuperLink(home, service, process, shown)
                superlink.wait_until_up()
                superlink.wait_for_nodes(nodes)
                result = superlink.run(folder, prepared.changes)
                ended = True
                return result
    finally:
        shown.finish("")
        service.stop(for_good=ended)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the SuperLink too, in order."""

    told: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not told:  # the order that the first one began is kept whatever follows
            told.append(number)
            stopped = StoppedError()
            stopped.number = number
            raise stopped

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller stops us
        before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _superlink(service: Service, home: Path) -> Iterator[FlowerProcess]:
    """A SuperLink process, ended at the end."""
    state = service.settings.state.absolute()
    env = environment(home, **{STATE: str(state)})
    identity = service.listener.doors.identity
    write_secret(home / "server.key", identity.key)
    (home / "server.crt").write_bytes(identity.certificate)
    (home / "root.crt").write_bytes(identity.root)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f'address = "localhost:{service.listener.port + 1}"\n'
        f'root-certificates = "{home / "root.crt"}"\n'
    )
    host = service.settings.listen.rpartition(":")[0]
    command = [
        program("flower-superlink"),
        *("--ssl-certfile", str(home / "server.crt")),
        *("--ssl-keyfile", str(home / "server.key")),
        *("--ssl-ca-certfile", str(home / "root.crt")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(home / "superlink.sqlite")),
        *("--host", host, "--port", str(service.listener.port + 1)),
    ]
    with (home / "superlink.log").open("ab") as out:
        process = FlowerProcess(home, command, stdout=out, stderr=out, env=env, cwd=state)
    try:
        yield process
    finally:
        process.end()


class _SuperLink:
    """A SuperLink, through Flower's command line.

    Attributes:
        registered: by node, Flower's id of it and the key that it was registered with; kept in
            the federation's database, because Flower tells the id only once.
    """

    def __init__(
        self, home: Path, service: Service, process: FlowerProcess, shown: Progress
    ) -> None:
        self._home, self._service, self._process = home, service, process
        self._shown = shown
        self.registered: dict[str, dict[str, str]] = service.enrolment.fact("superlink") or {}

    def wait_until_up(self) -> None:
        """Until the SuperLink answers."""
        until = time.monotonic() + _UP_S
        while "nodes" not in (said := self._flwr("supernode", "list", _CONNECTION)):
            if time.monotonic() > until:
                raise RunError(f"Flower's SuperLink does not answer: {_reason(said)}")
            time.sleep(_LOOK_S)
        listed = {str(node.get("node-id")) for node in said["nodes"]}
        self.registered = {n: k for n, k in self.registered.items() if k["id"] in listed}

    # ---- nodes

    def register(self) -> None:
        """Register the keys of new nodes, and take out those that are no longer any node's."""
        keys = self._service.enrolment.public_keys()
        before = {name: dict(known) for name, known in self.registered.items()}
        for name, known in before.items():
            if keys.get(name) != known["key"]:
                log.info("node %s is taken out of the SuperLink", name)
                self._flwr("supernode", "unregister", known["id"], _CONNECTION)
                del self.registered[name]
        for name in keys.keys() - self.registered.keys():
            file = self._home / f"{name}.pub"
            file.write_text(keys[name])
            said = self._flwr("supernode", "register", str(file), _CONNECTION, "--name", name)
            if "node-id" not in said:
                raise RunError(
                    f"Flower did not register node {name}: {_reason(said)}; if it says that the "
                    f"key is in use, remove {self._home / 'superlink.sqlite'} and start again"
                )
            self.registered[name] = {"id": str(said["node-id"]), "key": keys[name]}
        if self.registered != before:
            self._service.enrolment.keep("superlink", self.registered)

    def wait_for_nodes(self, needed: int) -> None:
        """Until enough SuperNodes are online; registers nodes that enrol meanwhile."""
        said = ""
        while True:
            self.register()
            online = self._look_for_nodes()
            want, absent = self._service.missing(needed)
            absent = [name for name in absent if name not in online]
            if len(online) >= want:
                self._shown.note(f"{len(online)} SuperNodes are online")
                return
            text = f"waiting for SuperNodes: {len(online)} of {want}"
            text += f"; not here: {_some(absent)}" if absent else ""
            lines = self._service.hub.lines.values()
            others = sorted(line.node.name for line in lines if line.session is not None)
            text += f"; here without --engine flower: {_some(others)}" if others else ""
            if text != said:
                self._shown.note(text)
                said = text
            time.sleep(_LOOK_S)

    def _look_for_nodes(self) -> set[str]:
        """The nodes whose SuperNodes are online; `umbel status` shows them too."""
        listed = self._flwr("supernode", "list", _CONNECTION).get("nodes", [])
        status = {str(node.get("node-id")): node.get("status") for node in listed}
        online = {n for n, known in self.registered.items() if status.get(known["id"]) == "online"}
        self._service.external_nodes = [
            {"name": name, "state": "connected", "last_seen": time.time()} for name in online
        ]
        return online

    # ---- the run

    def run(self, folder: AppFolder, changed: Options) -> dict[str, Any]:
        """Submit the app, and follow its run to the end."""
        began = time.monotonic()
        rounds = _Rounds(self._service, self._shown, len(self._service.external_nodes))
        own = {k: v for k, v in changed.items() if k in folder.options}
        path = folder.path if own == changed else self._with_options(folder, changed)
        words = ["run", str(path), _CONNECTION]
        if own:
            words += ["-c", " ".join(f"{k}={toml(v)}" for k, v in own.items())]
        said = self._flwr(*words)
        if "run-id" not in said:
            raise RunError(f"Flower did not take the app: {_reason(said)}")
        run_id = str(said["run-id"])
        self._shown.note(f"Flower's run {run_id} has begun")
        self._service.position |= {"run": f"flower:{run_id}", "phase": "training", "round": 0}
        try:
            status = self._follow(run_id, rounds.look)
        except BaseException:
            with contextlib.suppress(RunError):
                self._flwr("stop", run_id, _CONNECTION)
            raise
        rounds.look()
        if status != "finished:completed":
            raise RunError(
                f"Flower's run {run_id} ended as {status}; see {self._home / 'superlink.log'}"
            )
        seconds = round(time.monotonic() - began, 3)
        found = rounds.result() or {"run": f"flower:{run_id}", "stopped": "completed"}
        self._service.position["phase"] = "finished"
        return {**found, "flower_run": run_id, "seconds": seconds}

    def _follow(self, run_id: str, look: Callable[[], bool]) -> str:
        """Flower's status of a run that has ended."""
        asked, pause = time.monotonic(), _ASK_S
        while True:
            done = look()
            self.register()  # a revocation takes effect during the run
            if done or time.monotonic() - asked > pause:
                asked = time.monotonic()
                runs = self._flwr("ls", _CONNECTION, "--run-id", run_id).get("runs", [])
                status = str(runs[0].get("status", "")) if runs else ""
                if status.startswith("finished"):
                    return status
                self._look_for_nodes()
                # Flower's commands are costly: where they are slow, they are used less.
                pause = max(_ASK_S, 5 * (time.monotonic() - asked))
            time.sleep(_LOOK_S)

    def _with_options(self, folder: AppFolder, changed: Options) -> Path:
        """A copy of the app whose options name what was changed.

        Flower takes no option that an app's own `pyproject.toml` does not name; Umbel's options
        need not be there.
        """
        copy = self._home / "app"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder.path, copy, ignore=_IGNORED)
        file = copy / "pyproject.toml"
        project = tomllib.loads(file.read_text())
        config = project["tool"]["flwr"]["app"].setdefault("config", {})
        config |= {k: v for k, v in changed.items() if k not in folder.options}
        file.write_text(tomli_w.dumps(project))
        return copy

    def _flwr(self, *words: str) -> dict[str, Any]:
        """What a command says in JSON."""
        if not self._process.running():
            raise RunError(f"Flower's SuperLink has ended; see {self._home / 'superlink.log'}")
        done = subprocess.run(
            [program("flwr"), *words, "--format", "json"],
            capture_output=True,
            text=True,
            env=environment(self._home),
            start_new_session=True,
        )
        return _last_json(done.stdout) or {"error-message": (done.stderr or done.stdout)[-500:]}


class _Rounds:
    """The rounds of a federation's run, from the directory that its server app makes."""

    def __init__(self, service: Service, shown: Progress, nodes: int) -> None:
        self._parent = service.settings.state / "runs"
        self._before = set(self._parent.glob("*"))
        self._service, self._nodes = service, nodes
        self._shown = WatchedProgress(shown, service)
        self._run: RunDirectory | None = None
        self._seen = -1

    def look(self) -> bool:
        """Show what is new; whether the app has written its result."""
        if self._run is None:
            new = [RunDirectory(path) for path in set(self._parent.glob("*")) - self._before]
            self._run = next((run for run in new if run.holds_run()), None)
            if self._run is None:
                return False
            config = self._run.config()
            rounds = int(config.get("options", {}).get("rounds", 0))
            self._service.position["run"] = str(self._run.path.absolute())
            self._shown.start(str(config.get("app", "")), rounds, self._nodes)
        for line in self._run.rounds():
            if line["round"] > self._seen:
                self._seen = line["round"]
                self._shown.round_done(line)
        return self._run.result_path.exists()

    def result(self) -> dict[str, Any]:
        """What the app has reported; empty if it is no federation."""
        return {} if self._run is None else self._run.result()


def _reason(said: dict[str, Any]) -> str:
    """Flower's own words, on one line."""
    return " ".join(str(said.get("error-message") or said).split())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _last_json(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


__all__: Sequence[str] = ["serve_with_flower"]
