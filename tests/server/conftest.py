"""A laboratory for the link: a listening coordinator, hand-made peers, and real processes."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.fakes import Background, WarmCommand
from tests.server.small_federation import APP, OPTIONS
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.grid import LinkGrid
from umbel.server.link.hub import Hub
from umbel.server.link.listener import ListenConfig, Listener
from umbel.transport.certificates import (
    Identity,
    make_request,
    make_server_identity,
    new_key,
    open_authority,
    sign_request,
)
from umbel.transport.frames import PROTOCOL, SERVICE, from_wire, to_wire
from umbel.transport.link_pb2 import Certificate, EnrolRequest, Frame, Hello

PATIENCE_S = 30.0
Running = subprocess.Popen[bytes] | Background
UMBEL = (sys.executable, "-c", "from umbel.commands.cli import main; main()")


def eventually(what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """The first true value of a function; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.01)
    return value


class Peer:
    """A node made by hand, which can say anything."""

    def __init__(self, address: str, identity: Identity) -> None:
        credentials = grpc.ssl_channel_credentials(
            identity.root, identity.key, identity.certificate
        )
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.secure_channel(address, credentials, options)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call: Any = None

    def connect(self, **hello: Any) -> Frame:
        """Say hello, and return the answer."""
        connect = self.channel.stream_stream(
            f"/{SERVICE}/Connect",
            request_serializer=lambda item: item if isinstance(item, bytes) else to_wire(item),
            response_deserializer=from_wire,
        )
        self.call = connect(iter(self._out.get, None), timeout=PATIENCE_S)
        words = {"protocol": PROTOCOL, "version": "test", "instance": "1", **hello}
        self.send(Frame(hello=Hello(**words)))
        return self.read()

    def send(self, item: Any) -> None:
        """A frame, or bytes."""
        self._out.put(item)

    def read(self) -> Any:
        """The next frame; chunks as views."""
        return next(self.call)

    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the call ended; what was still to come is dropped."""
        with contextlib.suppress(grpc.RpcError):
            for _ in self.call:
                pass
        return self.call.code(), self.call.details()

    def enrol(self, token: str, key: bytes | None = None, name: str = "x") -> Certificate:
        """Ask for a certificate."""
        call = self.channel.unary_unary(
            f"/{SERVICE}/Enrol",
            request_serializer=EnrolRequest.SerializeToString,
            response_deserializer=Certificate.FromString,
        )
        request = EnrolRequest(token=token, request=make_request(key or new_key(), name))
        answer: Certificate = call(request, timeout=PATIENCE_S)
        return answer

    def close(self) -> None:
        """Hang up."""
        self._out.put(None)
        self.channel.close()


class Lab:
    """A coordinator that listens on a free port, in this process."""

    def __init__(self, folder: Path) -> None:
        self.state = folder
        self.authority = open_authority(folder)
        self.enrolment = Enrolment(folder)
        self.hub = Hub(lost_after=60)
        identity = make_server_identity(self.authority, ["localhost", "127.0.0.1"])
        doors = ListenConfig("127.0.0.1:0", identity, self.authority, "test", "app")
        self.listener = Listener(self.hub, self.enrolment, doors)
        self.listener.start()
        self.address = f"127.0.0.1:{self.listener.port}"
        self.grid = LinkGrid(self.hub, run_id=5)
        self._peers: list[Peer] = []

    def identity(self, name: str, days: float = 9) -> Identity:
        """A node's key and certificate, as enrolment gives them."""
        self.enrolment.add(name, self.authority, self.address)
        key = new_key()
        if days > 0:
            certificate = self.enrolment.issue(name, make_request(key, name), self.authority)
        else:
            certificate = sign_request(self.authority, make_request(key, name), name, days)
        return Identity(certificate.public_bytes(Encoding.PEM), key, self.authority.pem)

    def peer(self, identity: Identity) -> Peer:
        """A hand-made peer with this identity."""
        self._peers.append(Peer(self.address, identity))
        return self._peers[-1]

    def node(self, name: str, **hello: Any) -> Peer:
        """A hand-made node that is connected."""
        peer = self.peer(self.identity(name))
        welcome = peer.connect(**hello)
        assert welcome.welcome.name == name
        eventually(lambda: any(line.node.name == name for line in self.hub.members()))
        return peer

    def ask(self, messages: list[Any], timeout: float | None = PATIENCE_S) -> "Asked":
        """Stream messages on a thread of its own."""
        return Asked(self.grid.stream(messages, timeout))

    def ask_iterator(self, replies: Iterator[Any]) -> "Asked":
        """Collect replies on a thread of its own."""
        return Asked(replies)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.listener.stop(for_good=False)
        self.enrolment.close()


class Asked:
    """Replies that are collected while the test does something else."""

    def __init__(self, replies: Iterator[Any]) -> None:
        self.replies: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(replies,))
        self._thread.start()

    def _run(self, replies: Iterator[Any]) -> None:
        self.replies.extend(replies)

    def result(self) -> list[Any]:
        """All replies."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.replies


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A listening coordinator."""
    opened = Lab(tmp_path / "lab")
    try:
        yield opened
    finally:
        opened.close()


class Processes:
    """A coordinator and nodes as real processes, in one folder.

    Attributes:
        folder: of everything.
        app: the app's folder.
        port: of the coordinator.
    """

    def __init__(self, folder: Path, warm: WarmCommand) -> None:
        self.folder, self.app, self.state = folder, folder / "app", folder / "state"
        self._warm, self._number = warm, 0
        self.marks = folder / "marks"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.running: dict[str, Running] = {}
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def write_app(self, files: dict[str, str], options: str) -> None:
        """Write a Flower app."""
        self.app.mkdir(exist_ok=True)
        for name, text in files.items():
            (self.app / name).write_text(text)
        (self.app / "pyproject.toml").write_text(
            '[project]\nname = "small"\nversion = "1.0.0"\ndescription = "Small"\n'
            'license = "Apache-2.0"\ndependencies = []\n[tool.flwr.app]\npublisher = "x"\n'
            '[tool.flwr.app.components]\nserverapp = "server_app:app"\n'
            f'clientapp = "client_app:app"\n[tool.flwr.app.config]\n{options}\n'
        )

    def umbel(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        self._number += 1
        out, err = (self.folder / f"{self._number}.{kind}" for kind in ("out", "err"))
        status = self._begin(words, out, err).wait(240)
        done = subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())
        assert not check or done.returncode == 0, done.stderr
        return done

    def start(self, name: str, *words: str) -> Running:
        """Start a command; its output goes to NAME.log."""
        log = self.folder / f"{name}.log"
        self.running[name] = self._begin(words, log, log)
        return self.running[name]

    def _begin(self, words: Sequence[str], out: Path, err: Path) -> Running:
        for file in (out, err):
            file.touch()
        if "LD_PRELOAD" not in self._environment:
            where = {"cwd": self.folder, "environment": self._environment}
            return self._warm.start(*words, **where, out=out, err=err)
        with out.open("ab") as said, err.open("ab") as complained:  # a library that exec loads
            return subprocess.Popen(
                [*UMBEL, *words],
                stdout=said,
                stderr=complained,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=self._environment,
            )

    def invite(self, *names: str, port: int = 0) -> None:
        """Enrol nodes."""
        for name in names:
            address = f"127.0.0.1:{port or self.port}"
            self.umbel("nodes", "add", name, "--state", "state", "--address", address)

    def server(self, *words: str) -> Running:
        """Start the coordinator."""
        listen = f"127.0.0.1:{self.port}"
        fixed = ("app", "--state", "state", "--listen", listen, "--json")
        return self.start("server", "server", *fixed, *words)

    def node(self, name: str, *words: str) -> Running:
        """Start a node; the first time with its join file."""
        first = [] if (self.folder / name).exists() else ["app", "--join", f"{name}.join"]
        return self.start(name, "client", *first, "--state", name, "--threads", "1", *words)

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, name: str, seconds: float = 240) -> int:
        """The exit status."""
        try:
            return self.running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} did not end:\n{self.log(name)}")

    def result(self, name: str = "server") -> dict[str, Any]:
        """The last result that a server has printed, or an empty one."""
        lines = [line for line in self.log(name).splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found | {"run": str(self.folder / found["run"])} if found else found

    def status(self) -> dict[str, Any]:
        """The server's status file."""
        try:
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def close(self) -> None:
        """End all of them. One that does not end when it is told to fails the test."""
        stubborn = []
        for process in self.running.values():
            process.terminate()
        for name, process in self.running.items():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                stubborn.append(name)
        assert not stubborn, f"{stubborn} did not end: {self.log(stubborn[0])[-3000:]}"


@pytest.fixture
def processes(tmp_path: Path, umbel: WarmCommand) -> Iterator[Processes]:
    """A folder for real processes, all of which are ended."""
    opened = Processes(tmp_path, umbel)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def federation(processes: Processes) -> Processes:
    """Real processes around the small app, whose nodes leave marks in `folder / "marks"`."""
    processes.write_app(APP, OPTIONS)
    processes.marks.mkdir()
    processes._environment["MARKS"] = str(processes.marks)
    return processes
