"""What is wrong with this machine, a coordinator's state or a node's: one line a finding.

Every check looks at the real thing (the disk, the certificate, the port, the connection) and says
what it saw, whether that is in order, and what to do if it is not.
"""

import asyncio
import datetime
import os
import resource
import shutil
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from umbel.clients.process.membership import NodeSettings, open_channel, refusal, settings_in
from umbel.core.errors import UmbelError
from umbel.core.lock import locked
from umbel.server.link.doorkeeper import most_connections
from umbel.server.private.coordinator_key import data_folder
from umbel.transport.certificates import (
    CertificateError,
    Identity,
    by_this_clock,
    load_certificate,
    load_identity,
    read_identity,
)
from umbel.transport.keyfiles import KeyFileError

T = TypeVar("T")
State = Literal["ok", "warning", "fault"]

LITTLE_DISK = 1 << 30
LITTLE_MEMORY = 1 << 30
SOON = datetime.timedelta(days=30)
_PATIENCE_S = 10.0
_HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        what: of which thing.
        state: whether it is in order; a warning is not wrong yet.
        said: what was seen.
        cure: what to do; empty where nothing is to be done.
    """

    what: str
    state: State
    said: str
    cure: str = ""


def examine(state: Path | None) -> list[Finding]:
    """Every finding about this machine, and about a state folder if one is given."""
    findings = [*_versions(), *_machine(state or Path.cwd())]
    if state is None:
        return findings
    if (state / "umbel.sqlite").exists():
        return [*findings, *_coordinator(state)]
    if (state / "node.json").exists() or (state / "identity.pem").exists():
        return [*findings, *_node(state)]
    said = f"{state} is neither a coordinator's state nor a node's"
    cure = "name the folder that umbel server or umbel client was given as --state"
    return [*findings, Finding("state", "fault", said, cure)]


# ---- the machine


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", python)
    for package in ("umbel", "flwr", "torch", "grpcio", "cryptography"):
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "fault", "is not installed", f"pip install {package}")


def _machine(folder: Path) -> Iterator[Finding]:
    yield _disk(folder)
    yield _memory()
    yield Finding("processor", "ok", f"{len(os.sched_getaffinity(0))} cores for this process")
    yield _gpu()
    yield _files()
    now = datetime.datetime.now(datetime.UTC)
    yield Finding("clock", "ok", f"{now:%Y-%m-%d %H:%M:%S} UTC; compare it with a clock you trust")


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free under {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "fault", f"{folder} cannot be written", "run as its owner")
    if free < LITTLE_DISK:
        return Finding("disk", "warning", said, "make room: umbel prune, or a larger disk")
    return Finding("disk", "ok", said)


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the kernel would give back from its caches counts too
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    said = f"{free / 1e9:.1f} GB available"
    if free < LITTLE_MEMORY:
        return Finding("memory", "warning", said, "end other programs, or train a smaller model")
    return Finding("memory", "ok", said)


def _gpu() -> Finding:
    import torch  # takes seconds, so not before it is asked for

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("gpu", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        cure = "install the PyTorch of your CUDA version (pytorch.org)"
        return Finding("gpu", "warning", "there is one, and this PyTorch cannot use it", cure)
    return Finding("gpu", "ok", "none; training uses the processor")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"this process may open {soft:,} files ({hard:,} at most)"
    if hard != resource.RLIM_INFINITY and hard < 4096:
        return Finding("open files", "warning", said, "ulimit -n 65536, or LimitNOFILE in the unit")
    return Finding("open files", "ok", f"{said}, enough for {most_connections():,} nodes")


# ---- a coordinator


def _coordinator(state: Path) -> Iterator[Finding]:
    yield from _private_folder(state)
    yield _database(state / "umbel.sqlite")
    yield from _pem(state / "authority.pem", "authority")
    yield from _pem(state / "server.pem", "server certificate")
    for ledger in sorted((state / "populations").glob("*.sqlite")):
        yield _database(ledger)
    yield _server(state)
    yield _kept_elsewhere(state)


def _server(state: Path) -> Finding:
    """Whether a server runs on this state."""
    try:
        with locked(state / "lock", "a server runs on it"):
            return Finding("server", "ok", "none runs on this state now")
    except UmbelError as busy:
        return Finding("server", "ok", str(busy))


def _kept_elsewhere(state: Path) -> Finding:
    if (state / "coordinator.pem").exists():
        return Finding("signing key", "ok", str(state / "coordinator.pem"))
    said = f"none in {state} yet; the first private run makes it"
    return Finding("signing key", "ok", f"{said} (other runs use {data_folder()})")


def _database(file: Path) -> Finding:
    try:
        uri = f"{file.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10)) as database:
            found = str(database.execute("pragma quick_check").fetchone()[0])
    except sqlite3.Error as error:
        found = str(error)
    if found == "ok":
        return Finding(file.name, "ok", "the database is sound")
    cure = "stop the server and put back a copy (umbel restore)"
    return Finding(file.name, "fault", f"damaged: {found[:120]}", cure)


def _private_folder(state: Path) -> Iterator[Finding]:
    for file in [state, *sorted(state.glob("*.pem"))]:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            said = f"{file} is open to others (mode {mode:o})"
            yield Finding("permissions", "fault", said, f"chmod go= {file}")


def _pem(file: Path, what: str) -> Iterator[Finding]:
    if not file.exists():
        yield Finding(what, "ok", f"{file.name} is not there yet")
        return
    try:
        yield _dates(what, read_identity(file))
    except (CertificateError, KeyFileError) as problem:
        yield Finding(what, "fault", str(problem), "put back a copy (umbel restore)")


def _dates(what: str, identity: Identity) -> Finding:
    certificate = load_certificate(identity.certificate)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.datetime.now(datetime.UTC)
    said = f"valid until {ends:%Y-%m-%d}"
    if now < begins:
        cure = "set this machine's clock (timedatectl)"
        said = f"valid from {begins:%Y-%m-%d %H:%M} UTC{by_this_clock()}"
        return Finding(what, "fault", said, cure)
    if now > ends:
        cure = "if the clock is right: umbel nodes add NAME, and start the node once with --join"
        return Finding(what, "fault", f"expired on {ends:%Y-%m-%d}{by_this_clock()}", cure)
    if ends - now < SOON:
        cure = "it renews itself at the next start, if the other side can be reached"
        return Finding(what, "warning", said, cure)
    return Finding(what, "ok", said)


# ---- a node


def _node(state: Path) -> Iterator[Finding]:
    yield from _private_folder(state)
    try:
        settings = settings_in(state)
    except UmbelError as problem:
        yield Finding("settings", "fault", str(problem), "join again with a new join file")
        return
    if settings is None:
        cure = "umbel client APP --join FILE --state STATE"
        yield Finding("settings", "fault", "this node has never been started", cure)
        return
    yield Finding("node", "ok", f"{settings.name}, of the coordinator at {settings.address}")
    yield _app(settings)
    identity = _identity(state, settings)
    if isinstance(identity, Finding):
        yield identity
        return
    yield _dates("certificate", identity)
    for name in ("ledger.sqlite", "rounds"):
        file = state / name
        if file.is_file() and file.read_bytes()[:6] == b"SQLite":
            yield _database(file)
    yield from _way(settings, identity)


def _app(settings: NodeSettings) -> Finding:
    if settings.app and (Path(settings.app) / "pyproject.toml").is_file():
        return Finding("app", "ok", settings.app)
    cure = "umbel client APP --state STATE, with the app's folder"
    return Finding("app", "fault", f"there is no app in {settings.app or 'the settings'}", cure)


def _identity(state: Path, settings: NodeSettings) -> Identity | Finding:
    try:
        if settings.own_certificate is not None:
            certificate, key, root = map(Path, settings.own_certificate)
            return load_identity(certificate, key, root)
        return read_identity(state / "identity.pem")
    except (CertificateError, KeyFileError) as problem:
        cure = "umbel nodes add NAME on the coordinator, and start once with --join"
        return Finding("certificate", "fault", str(problem), cure)


def _way(settings: NodeSettings, identity: Identity) -> Iterator[Finding]:
    """The way to the coordinator: its name, its port, and a call under mutual TLS."""
    host, _, port = settings.address.rpartition(":")
    host = host.strip("[]")
    found = _tried(lambda: socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM))
    if isinstance(found, str):
        cure = "mend the name service, or start once with --address HOST:PORT"
        yield Finding("name", "fault", f"{host} is not known ({found})", cure)
        return
    yield Finding("name", "ok", f"{host} is {found[0][4][0]}")
    if not settings.proxy:
        opened = _tried(lambda: _open(host, int(port)))
        if isinstance(opened, str):
            cure = "start the coordinator, or let the firewall pass this port"
            yield Finding("port", "fault", f"{settings.address}: {opened}", cure)
            return
        yield Finding("port", "ok", f"{settings.address} answers after {1000 * opened:.0f} ms")
    problem = asyncio.run(_call(settings, identity))
    if problem:
        yield Finding("coordinator", "fault", problem, "see the sentence; umbel client says it too")
    else:
        yield Finding("coordinator", "ok", "mutual TLS and a call went through")


def _tried(work: Callable[[], T]) -> T | str:
    try:
        return work()
    except (OSError, UnicodeError) as problem:
        return str(getattr(problem, "strerror", None) or problem)


def _open(host: str, port: int) -> float:
    began = time.perf_counter()
    with socket.create_connection((host, port), timeout=_PATIENCE_S):
        return time.perf_counter() - began


async def _call(settings: NodeSettings, identity: Identity) -> str:
    """What went wrong with a call to the coordinator's health service; empty if nothing did."""
    async with open_channel(settings.address, identity, proxy=settings.proxy) as channel:
        check = channel.unary_unary(
            _HEALTH,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            await check(health_pb2.HealthCheckRequest(), timeout=_PATIENCE_S)
            return ""
        except grpc.aio.AioRpcError as problem:
            return str(refusal(settings.address, problem))
