"""`--engine flower`: Flower's SuperLink and SuperNodes, from the same enrolment.

    coordinator   listens as always, so that nodes can enrol; starts a SuperLink on the next port
                  (TLS with the same certificate, node authentication, database in --state);
                  registers the nodes' keys; submits the app; follows the run
    node          enrols as always; starts a SuperNode with its key

Only Flower's own commands are used, with a home of their own in --state, so an operator's
configuration of Flower is neither read nor changed.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from umbel.clients.process.membership import Membership, NodeSettings
from umbel.clients.process.start import StartSettings, enrolled
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.service import ServerSettings, Service
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.app import open_app
from umbel.strategies.errors import ConfigError, RunError
from umbel.strategies.options import Options, override
from umbel.transport.certificates import load_key
from umbel.transport.keyfiles import write_secret

log = logging.getLogger("umbel.server")
_CONNECTION = "umbel"
_POLL_S = 2.0


def serve_with_flower(
    path: Path, settings: ServerSettings, changes: Options, *, version: str, nodes: int = 0
) -> dict[str, Any]:
    """Run an app on a SuperLink until its run has ended.

    Returns:
        What the app itself reports if it is a federation (its run directory is `run`), with
        `flower_run`, Flower's id, and `stopped`, Flower's status.

    Raises:
        ConfigError: a value that cannot be used.
        RunError: Flower's processes failed.
    """
    if settings.own_certificate is not None:
        raise ConfigError("--engine flower needs the built-in authority; leave out --certificate")
    folder = open_app(path)
    override(folder.options, {k: v for k, v in changes.items() if k in folder.options})
    home = settings.state.absolute() / "flower"
    service = Service(settings, version=version, app_digest=folder.digest())
    try:
        service.start()
        with _superlink(service, home):
            superlink = _Commands(home, service)
            registered = superlink.register(service.enrolment)
            superlink.wait_for_nodes(service.enrolment, registered, nodes)
            return superlink.run(folder.path, changes)
    finally:
        service.stop(for_good=True)


def node_with_flower(start: StartSettings) -> None:
    """Run a SuperNode with this node's key until a signal ends it.

    Raises:
        ConfigError: the node has not enrolled, or brings its own certificate.
    """
    membership = Membership(start.state)
    try:
        settings = asyncio.run(enrolled(membership, start))
        _keep_running(
            lambda: _supernode_command(membership, settings),
            _environment(membership.folder.absolute() / "flower"),
        )
    finally:
        membership.close()


def _keep_running(command: Callable[[], list[str]], environment: Mapping[str, str]) -> None:
    """Start a SuperNode again whenever it gives up, as it does without a SuperLink."""
    stopped = threading.Event()
    process: subprocess.Popen[bytes] | None = None

    def stop(*_: Any) -> None:
        stopped.set()
        if process is not None:
            process.terminate()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    while not stopped.is_set():
        process = subprocess.Popen(command(), env=environment)
        if process.wait() != 0 and not stopped.is_set():
            log.warning("the SuperNode has ended; it is started again")
        stopped.wait(_POLL_S)


def _supernode_command(membership: Membership, settings: NodeSettings) -> list[str]:
    identity = membership.identity(settings)
    if identity is None or settings.own_certificate is not None:
        raise ConfigError("--engine flower needs a node that has enrolled with --join FILE")
    home = membership.folder.absolute() / "flower"
    key = load_key(identity.key).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_secret(home / "node.key", key)
    (home / "root.crt").write_bytes(identity.root)
    host, _, port = settings.address.rpartition(":")
    words = " ".join(f"{k}={_toml(v)}" for k, v in settings.node_config.items())
    return [
        _program("flower-supernode"),
        *("--superlink", f"{host}:{int(port) + 1}"),
        *("--root-certificates", str(home / "root.crt")),
        *("--auth-supernode-private-key", str(home / "node.key")),
        *("--node-config", words),
        *("--port", str(_free_port())),
    ]


@contextlib.contextmanager
def _superlink(service: Service, home: Path) -> Iterator[None]:
    """A SuperLink process, ended at the end."""
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
        _program("flower-superlink"),
        *("--ssl-certfile", str(home / "server.crt")),
        *("--ssl-keyfile", str(home / "server.key")),
        *("--ssl-ca-certfile", str(home / "root.crt")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(home / "superlink.sqlite")),
        *("--host", host, "--port", str(service.listener.port + 1)),
    ]
    with (home / "superlink.log").open("ab") as out:
        # A federation writes its run directory to `runs/` of where it is started.
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=_environment(home), cwd=service.settings.state
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Commands:
    """Flower's command line, towards one SuperLink."""

    def __init__(self, home: Path, service: Service) -> None:
        self._home, self._service = home, service

    def register(self, enrolment: Enrolment) -> set[str]:
        """Register every enrolled node's public key; those that are known stay."""
        done: set[str] = set()
        for name, key in enrolment.public_keys().items():
            file = self._home / f"{name}.pub"
            file.write_text(key)
            said = self._flwr(
                "supernode", "register", str(file), _CONNECTION, "--name", name, patience=60
            )
            if not said.get("success") and "already" not in json.dumps(said):
                raise RunError(f"Flower did not register node {name}: {said}")
            done.add(name)
        return done

    def wait_for_nodes(self, enrolment: Enrolment, registered: set[str], needed: int) -> None:
        """Until enough SuperNodes are online; registers nodes that enrol meanwhile."""
        said = ""
        while True:
            enrolled_now = {each.name for each in enrolment.nodes() if each.revoked is None}
            if set(enrolment.public_keys()) - registered:
                registered |= self.register(enrolment)
            listed = self._flwr("supernode", "list", _CONNECTION).get("nodes", [])
            online = sum(node.get("status") == "online" for node in listed)
            want = needed or max(1, len(enrolled_now))
            text = f"{online} of {want} SuperNodes are online"
            if text != said:
                log.info("%s", text)
                said = text
            if online >= want:
                return
            time.sleep(_POLL_S)

    def run(self, app: Path, changes: Options) -> dict[str, Any]:
        """Submit the app, and follow its run to the end."""
        began = time.monotonic()
        before = self._run_directories()
        words = ["run", str(app), _CONNECTION]
        if changes:
            words += ["-c", " ".join(f"{k}={_toml(v)}" for k, v in changes.items())]
        said = self._flwr(*words, patience=60)
        if "run-id" not in said:
            raise RunError(f"Flower did not take the app: {said}")
        run_id = str(said["run-id"])
        log.info("Flower's run %s has begun", run_id)
        self._service.position |= {"run": f"flower:{run_id}", "phase": "training"}
        while True:
            runs = self._flwr("ls", _CONNECTION, "--run-id", run_id).get("runs", [])
            status = str(runs[0].get("status", "")) if runs else ""
            if status.startswith("finished"):
                break
            time.sleep(_POLL_S)
        if status != "finished:completed":
            raise RunError(
                f"Flower's run {run_id} ended as {status}; see {self._home / 'superlink.log'}"
            )
        found: dict[str, Any] = {"run": f"flower:{run_id}"}
        for directory in self._run_directories() - before:
            result = RunDirectory.open(directory).result()
            found = {**result, "run": str(directory)} if result else found
        return {
            **found,
            "flower_run": run_id,
            "stopped": status.partition(":")[2],
            "seconds": round(time.monotonic() - began, 3),
        }

    def _run_directories(self) -> set[Path]:
        return set((self._service.settings.state / "runs").glob("*"))

    def _flwr(self, *words: str, patience: float = 30.0) -> dict[str, Any]:
        """A command's JSON; it is repeated while the SuperLink is not up yet."""
        until = time.monotonic() + patience
        while True:
            done = subprocess.run(
                [_program("flwr"), *words, "--format", "json"],
                capture_output=True,
                text=True,
                env=_environment(self._home),
            )
            found = _last_json(done.stdout)
            if found and found.get("success", True):
                return found
            if time.monotonic() > until or (found and "already" in json.dumps(found)):
                return found or {"error": (done.stderr or done.stdout)[-500:]}
            time.sleep(1)


def _last_json(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _toml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, bool) else str(value).lower()


def _program(name: str) -> str:
    """One of Flower's commands, of this environment."""
    file = Path(sys.executable).parent / name
    if not file.exists():
        raise ConfigError(f"{file} is missing; install flwr in the environment of umbel")
    return str(file)


def _free_port() -> int:
    """For the SuperNode's own apps on this machine, so that several do not clash."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(home: Path) -> Mapping[str, str]:
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Flower starts `flower-superexec` and others by name: they are beside this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}


__all__: Sequence[str] = ["node_with_flower", "serve_with_flower"]
