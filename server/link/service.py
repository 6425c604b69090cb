"""The coordinator process around a run: state folder, doors, who is here, status, metrics."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from umbel.core.errors import ConfigError
from umbel.core.flower import UNAVAILABLE
from umbel.core.lock import take_lock
from umbel.core.text import plain
from umbel.server.link.doorkeeper import check_room_for, raise_file_limit
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.hub import Hub, NodeState
from umbel.server.link.listener import ListenConfig, Listener
from umbel.server.output import strict
from umbel.server.output.progress import Progress
from umbel.transport.allocator import share_one_arena
from umbel.transport.certificates import (
    Authority,
    CertificateError,
    Identity,
    covers,
    load_certificate,
    load_identity,
    make_server_identity,
    read_identity,
    renewal_due,
    save_identity,
)
from umbel.transport.keyfiles import KeyFileError
from umbel.transport.scheduling import work_in_batches

STALE_S = 10.0
"""A status that is older than this is of a server that no longer runs."""


@dataclass(frozen=True)
class ServerSettings:
    """How a coordinator process is set up.

    Attributes:
        state: the folder that holds everything that lasts.
        listen: HOST:PORT for nodes.
        names: DNS names and addresses under which nodes reach this machine.
        own_certificate: paths of certificate, key and root that someone brought along.
        health: HOST:PORT of a local health endpoint without TLS; empty is none.
        metrics: HOST:PORT of a local Prometheus endpoint; empty is none.
        lost_after: seconds after which an absent node is given up.
        room: bytes of replies held at once; 0 chooses.
    """

    state: Path
    listen: str = "0.0.0.0:7443"
    names: Sequence[str] = ()
    own_certificate: tuple[Path, Path, Path] | None = None
    health: str = ""
    metrics: str = ""
    lost_after: float = 120.0
    room: int = 0


class Service:
    """A coordinator that listens.

    Raises:
        ConfigError: the state folder, a certificate or an address cannot be used.
    """

    def __init__(self, settings: ServerSettings, *, version: str, app_digest: str) -> None:
        self.settings = settings
        self._lock = _lock(settings.state)
        self.enrolment = Enrolment(settings.state)
        authority, identity = identities(settings, self.enrolment)
        self.hub = Hub(lost_after=settings.lost_after, lost_code=UNAVAILABLE, room=settings.room)
        doors = ListenConfig(
            settings.listen, identity, authority, version, app_digest, settings.health
        )
        self.listener = Listener(self.hub, self.enrolment, doors)
        self.changed = threading.Event()
        self.hub.on_change = self.changed.set
        self.position: dict[str, Any] = {"run": None, "round": 0, "phase": "waiting"}
        self.external_nodes: Sequence[Mapping[str, Any]] = ()  # nodes that another engine serves
        self._farewell: dict[str, str] = {}  # what the nodes do that were here at the end, by name
        self._stopped = threading.Event()
        self._writer = threading.Thread(target=self._write_status, daemon=True)
        self._metrics: Any = None

    def start(self) -> None:
        """Listen, and keep the status up to date."""
        share_one_arena()
        work_in_batches()
        raise_file_limit()
        check_room_for(self._enrolled())
        self.listener.start()
        if self.settings.metrics:
            self._metrics = _serve_metrics(self.settings.metrics, self)
        self._writer.start()

    def stop(self, *, for_good: bool) -> None:
        """Say goodbye to the nodes and close everything."""
        self.position |= {"phase": "finished" if for_good else "stopped", "ended": True}
        here = [line.node.name for line in list(self.hub.lines.values()) if line.session]
        self._farewell = dict.fromkeys(here, "finished" if for_good else "waiting")
        self.listener.stop(for_good=for_good)
        self._stopped.set()
        if self._writer.is_alive():
            self._writer.join(timeout=5)
        if self._metrics is not None:
            self._metrics[0].shutdown()
            self._metrics[0].server_close()
        self.enrolment.close()
        os.close(self._lock)

    def _enrolled(self) -> int:
        return sum(node.revoked is None for node in self.enrolment.nodes())

    def missing(self, needed: int) -> tuple[int, list[str]]:
        """How many nodes are needed (0 asks for all enrolled), and who of them is not here."""
        enrolled = [node for node in self.enrolment.nodes() if node.revoked is None]
        here = {line.node.name for line in list(self.hub.lines.values()) if line.session}
        absent = [node.name for node in enrolled if node.name not in here]
        return (needed or max(1, len(enrolled)), absent)

    def wait_for_nodes(
        self, needed: int, say: Callable[[str], None], check: Callable[[], None]
    ) -> None:
        """Until enough nodes are connected; tells who is here and who is not.

        `check` is called often, and may raise to end the wait.
        """
        said = ""
        while True:
            check()
            want, absent = self.missing(needed)
            check_room_for(want)
            here = self.hub.connected()
            if here >= want:
                say(f"{here} nodes are connected")
                return
            names = f"; not here: {', '.join(absent[:8])}" if absent else ""
            more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
            text = f"waiting for nodes: {here} of {want}{names}{more}"
            if text != said:
                say(text)
                said = text
            self.changed.wait(timeout=0.5)
            self.changed.clear()

    # ---- status

    def stand(self, line: Mapping[str, Any]) -> None:
        """Where the run stands: `line` is what `metrics.jsonl` gets of its last round."""
        self.position |= {
            "round": line["round"],
            "metrics": dict(line.get("metrics") or {}),
            "epsilon": line.get("epsilon"),
            "round_seconds": line.get("seconds"),
        }

    def status(self) -> dict[str, Any]:
        """What `umbel status --json` prints."""
        traffic = self.hub.traffic
        return {
            **self.position,
            "pid": os.getpid(),
            "at": time.time(),
            "address": f"{self.settings.listen.rpartition(':')[0]}:{self.listener.port}",
            "nodes": [*self._node_states(), *self.external_nodes],
            "traffic": dict(vars(traffic)),
        }

    def _node_states(self) -> list[dict[str, Any]]:
        rows = map(_node_status, list(self.hub.lines.values()))
        return [
            {**row, "state": self._farewell[row["name"]]}
            if row["state"] == "away" and row["name"] in self._farewell
            else row
            for row in rows
        ]

    def _write_status(self) -> None:
        before: tuple[float, int] = (time.monotonic(), 0)
        while True:
            ended = self._stopped.wait(timeout=1)
            status = self.status()
            now, total = time.monotonic(), self._total_bytes()
            status["bytes_per_second"] = (total - before[1]) / max(1e-9, now - before[0])
            before = (now, total)
            write_status(self.settings.state, status)
            if ended:
                return

    def _total_bytes(self) -> int:
        return self.hub.traffic.bytes_down + self.hub.traffic.bytes_up


class WatchedProgress:
    """A progress that also keeps the service's position."""

    def __init__(self, shown: Progress, service: Service) -> None:
        self._shown, self._service = shown, service

    def start(self, title: str, rounds: int, nodes: int) -> None:
        self._service.position |= {"rounds": rounds, "phase": "training"}
        self._shown.start(title, rounds, nodes)

    def message_done(self, done: int, total: int) -> None:
        self._service.position["replies"] = f"{done}/{total}"
        self._shown.message_done(done, total)

    def round_done(self, line: Mapping[str, Any]) -> None:
        self._service.stand(line)
        self._shown.round_done(line)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def finish(self, text: str) -> None:
        self._shown.finish(text)


def identities(
    settings: ServerSettings, opened: Enrolment | None = None
) -> tuple[Authority | None, Identity]:
    """The authority (None with own certificates) and the server's identity, made if needed."""
    if opened is None:
        with closing(Enrolment(settings.state)) as enrolment:
            return identities(settings, enrolment)
    try:
        if settings.own_certificate is not None:
            return None, load_identity(*settings.own_certificate)
        authority = opened.authority()
        file = settings.state / "server.pem"
        names = server_names(settings, opened)
        if file.exists():
            identity = read_identity(file)
            certificate = load_certificate(identity.certificate)
            if covers(certificate, names) and not renewal_due(certificate):
                return authority, identity
        identity = make_server_identity(authority, names)
        save_identity(file, identity)
        return authority, identity
    except (CertificateError, KeyFileError) as problem:
        raise ConfigError(str(problem)) from problem
    except OSError as problem:
        raise ConfigError(
            f"{settings.state} cannot be written: {problem.strerror}; make room, or choose "
            "another folder with --state"
        ) from problem


def server_names(settings: ServerSettings, opened: Enrolment | None = None) -> list[str]:
    """The names that the server's certificate must carry; remembered from earlier starts."""
    if opened is None:
        with closing(Enrolment(settings.state)) as enrolment:
            return server_names(settings, enrolment)
    host = settings.listen.rpartition(":")[0].strip("[]")
    names = list(opened.fact("names") or [])
    wanted = [*settings.names, socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    if host not in ("", "0.0.0.0", "::"):
        wanted.insert(0, host)
    new = [name for name in dict.fromkeys(wanted) if name not in names]
    if new:
        names = [*dict.fromkeys([*settings.names, *names, *new])]
        opened.keep("names", names)
    return names


def write_status(state: Path, status: Mapping[str, Any]) -> None:
    """Replace the status file; a full disk must not end a run for it."""
    part = state / ".status.json"
    try:
        part.write_text(strict.dumps(status))
        part.replace(state / "status.json")
    except OSError:
        part.unlink(missing_ok=True)


def read_status(state: Path) -> dict[str, Any]:
    """What `umbel status` shows: the server's last word, and the nodes that it has not seen.

    A node is `connected`, `away` (it was here, and may come back), `lost` (its rounds no longer
    wait), `absent`, `invited` or `revoked`; after a server has ended, `finished` (it was told that
    the run is over) or `waiting` (it looks for a server until one is started again); `unknown`
    after one that was killed.

    Raises:
        ConfigError: nothing was ever started or enrolled here.
    """
    if not (state / "umbel.sqlite").exists():
        raise ConfigError(f"{state} is no coordinator's state; see: umbel nodes add --help")
    status: dict[str, Any] = {"run": None, "round": 0, "phase": "stopped", "nodes": []}
    try:
        status |= json.loads((state / "status.json").read_text())
        # Not of the whole: a node may be called Infinity.
        status |= {name: strict.revived(status.get(name)) for name in ("metrics", "epsilon")}
    except (OSError, ValueError):
        status["at"] = 0.0
    running = time.time() - float(status["at"]) < STALE_S and not status.get("ended")
    if not running and not status.get("ended"):
        status["phase"] = "stopped"  # killed, before it could say so
    enrolment = Enrolment(state)
    try:
        seen = {node["name"]: node for node in status["nodes"]}
        known = enrolment.nodes()
    finally:
        enrolment.close()
    ended = bool(status.get("ended"))
    status["nodes"] = [_merged(node, seen.get(node.name), running, ended) for node in known]
    status.setdefault("epsilon", None)
    return status


def _merged(
    node: Any, seen: Mapping[str, Any] | None, running: bool, ended: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": node.name, "state": "absent", "last_seen": None, **(seen or {})}
    if node.revoked is not None:
        row["state"] = "revoked"
    elif not node.enrolled:
        row["state"] = "invited"
    elif seen and not running and not ended:
        row["state"] = "unknown"  # the server was killed, and nobody has looked since
    row["certificate_expires"] = node.expires
    return row


def _node_status(line: NodeState) -> dict[str, Any]:
    session = line.session
    return {
        "name": line.node.name,
        "state": "connected" if session is not None else "lost" if line.lost else "away",
        "last_seen": time.time() if session is not None else line.seen,
        "phase": session.phase if session is not None else None,
        "version": plain(line.hello.version, 40),
        "device": plain(line.hello.device, 80),
        "partition": line.hello.partition,
        "app": plain(line.hello.app_digest, 12),
    }


def _lock(state: Path) -> int:
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ConfigError(f"{state} cannot be used: {problem.strerror}") from problem
    busy = f"another server runs on {state}; stop it, or choose another folder with --state"
    return take_lock(state / "lock", busy)


class _HubCollector(Collector):
    """Prometheus' view of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[Metric]:
        hub, position = self._service.hub, self._service.position
        traffic = hub.traffic
        found: list[Metric] = [
            GaugeMetricFamily("umbel_nodes_connected", "Nodes connected", hub.connected()),
            GaugeMetricFamily("umbel_nodes_known", "Nodes seen since the start", len(hub.lines)),
            GaugeMetricFamily("umbel_round", "Last finished round", position.get("round") or 0),
            CounterMetricFamily("umbel_bytes_down", "Bytes sent to nodes", traffic.bytes_down),
            CounterMetricFamily("umbel_bytes_up", "Bytes of nodes' replies", traffic.bytes_up),
            CounterMetricFamily("umbel_replies", "Replies received", traffic.replies),
            CounterMetricFamily("umbel_failures", "Replies that are errors", traffic.failures),
            CounterMetricFamily("umbel_refusals", "Peers refused", traffic.refused),
            CounterMetricFamily("umbel_reconnects", "Nodes that came back", traffic.reconnects),
        ]
        for name, said, value in (
            ("umbel_round_seconds", "Of the last round", position.get("round_seconds")),
            ("umbel_rounds", "Rounds of this run", position.get("rounds")),
            ("umbel_epsilon", "Privacy spent", position.get("epsilon")),
        ):
            if isinstance(value, int | float):
                found.append(GaugeMetricFamily(name, said, value))
        values = GaugeMetricFamily("umbel_metric", "Of the last evaluation", labels=["name"])
        for name, value in (position.get("metrics") or {}).items():
            values.add_metric([name], float(value))
        found.append(values)
        return found


def _serve_metrics(address: str, service: Service) -> Any:
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_HubCollector(service))
    try:
        return start_http_server(int(port), host.strip("[]") or "127.0.0.1", registry)
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"metrics cannot be served on {address}: {problem}; choose another --metrics HOST:PORT"
        ) from problem
