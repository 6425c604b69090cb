"""What ends a node for good: the right coordinator's word, and nothing before it."""

import asyncio
import contextlib
import datetime
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Lab, eventually
from tests.server.test_link_faults import shut
from tests.server.test_link_membership import join
from umbel.clients.process import link as link_module
from umbel.clients.process.app_process import AppProcess, AppSettings
from umbel.clients.process.link import NodeLink
from umbel.clients.process.membership import Membership, NodeSettings, RefusedError
from umbel.server.link.hub import Hub
from umbel.server.link.listener import ListenConfig, Listener
from umbel.transport import certificates
from umbel.transport.certificates import Identity, make_server_identity, open_authority
from umbel.transport.join import write_join_file

PORTAL = b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/\r\n\r\n"


class Node:
    """A node's connection on a thread of its own, without an app: it is never asked anything."""

    def __init__(self, folder: Path, settings: NodeSettings, **options: Any) -> None:
        self.events: list[str] = []
        self.problem: BaseException | None = None
        self._membership = Membership(folder)
        app = AppSettings(folder, folder / "memory", {})
        self._link = NodeLink(
            self._membership,
            settings,
            AppProcess(app),
            version="test",
            app_digest="app",
            on_event=self.events.append,
            **options,
        )
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._link.run())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except Exception as problem:
            self.problem = problem
        finally:
            self._loop.close()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        if self._task is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(30)
        self._membership.close()


class Road:
    """What lies between a node and its coordinator; the first connections meet an accident.

    An accident may end by naming the port that the connection leads to from then on.
    """

    def __init__(
        self, target: int, accident: Callable[[socket.socket], int | None], times: int
    ) -> None:
        self._target, self._accident, self.left = target, accident, times
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            target: int | None = self._target
            if self.left > 0:
                self.left -= 1
                target = None
                with contextlib.suppress(OSError):
                    target = self._accident(near)
            if target is None:
                shut(near)
                continue
            far = socket.create_connection(("127.0.0.1", target))
            self._sockets.append(far)
            for source, sink in ((near, far), (far, near)):
                self._start(pump, source, sink)

    def close(self) -> None:
        for each in self._sockets:
            shut(each)
        for thread in self._threads:
            thread.join(30)
        for each in self._sockets:
            each.close()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    shut(source)
    shut(sink)


def says(answer: bytes) -> Callable[[socket.socket], None]:
    def accident(near: socket.socket) -> None:
        near.recv(1 << 16)
        near.sendall(answer)

    return accident


@pytest.fixture
def enrolled(lab: Any, tmp_path: Path) -> tuple[Path, NodeSettings]:
    """A node's folder and settings, once it has enrolled."""
    membership = Membership(tmp_path / "node")
    settings = asyncio.run(membership.enrol(join(lab, tmp_path)))
    membership.close()
    return tmp_path / "node", settings


@contextlib.contextmanager
def node(folder: Path, settings: NodeSettings, **options: Any) -> Iterator[Node]:
    opened = Node(folder, settings, **options)
    try:
        yield opened
    finally:
        opened.stop()


def flipped(lab: Any) -> Callable[[socket.socket], None]:
    """The right coordinator's own handshake, with one byte changed on the way."""

    def accident(near: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", lab.listener.port)) as far:
            far.sendall(near.recv(1 << 16))
            data = bytearray(far.recv(1 << 16))
            data[-40] ^= 255
            near.sendall(data)
            near.recv(1 << 16)

    return accident


@pytest.mark.parametrize("what", ["portal", "noise", "alert", "nothing", "flipped", "another"])
def test_an_accident_in_the_handshake_is_over_when_it_is_over(
    what: str, lab: Any, enrolled: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder, settings = enrolled
    caplog.set_level(logging.WARNING, "umbel.node")
    other, port = None, 0
    if what == "another":  # the coordinator of another federation is on the port for a while
        theirs = make_server_identity(open_authority(tmp_path / "other"), ["127.0.0.1"])
        doors = ListenConfig("127.0.0.1:0", theirs, None, "test", "app")
        other = Listener(Hub(), lab.enrolment, doors)
        other.start()
        port = other.port
    accidents: dict[str, Callable[[socket.socket], int | None]] = {
        "another": lambda _: port,
        "portal": says(PORTAL),
        "noise": says(b"\x16\x03\x03\x00\x20" + bytes(range(32))),
        "alert": says(b"\x15\x03\x03\x00\x02\x02\x28"),
        "nothing": says(b""),
        "flipped": flipped(lab),
    }
    road = Road(lab.listener.port, accidents[what], times=2)
    try:
        moved = NodeSettings(f"127.0.0.1:{road.port}", settings.name)
        with node(folder, moved) as running:
            eventually(lambda: "connected" in running.events or not running.running)
            assert running.problem is None and road.left == 0
    finally:
        road.close()
        if other is not None:
            other.stop(for_good=False)
    said = caplog.text
    assert {
        "portal": "does not speak as a coordinator does (WRONG_VERSION_NUMBER)",
        "alert": "does not speak as a coordinator does",
        "flipped": "changed on the way",
        "another": "is not the coordinator of this federation",
    }.get(what, "cannot be reached") in said


def test_a_coordinator_whose_clock_jumped_is_asked_again_and_the_clock_is_named(
    lab: Any,
    enrolled: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, settings = enrolled
    real = certificates._now
    for days, words in ((-30, "has expired"), (30, "is not yet valid")):
        shift = datetime.timedelta(days=days)
        monkeypatch.setattr(certificates, "_now", lambda shift=shift: real() + shift)
        identity = make_server_identity(lab.authority, ["127.0.0.1"], days=3)
        monkeypatch.setattr(certificates, "_now", real)
        doors = ListenConfig("127.0.0.1:0", identity, lab.authority, "test", "app")
        listener = Listener(Hub(), lab.enrolment, doors)
        listener.start()
        try:
            moved = NodeSettings(f"127.0.0.1:{listener.port}", settings.name)
            with node(folder, moved) as running:
                told = f"{words} (this machine's clock says"
                eventually(lambda told=told: told in caplog.text)
                assert running.running and running.problem is None
        finally:
            listener.stop(for_good=False)


def test_a_revoked_node_asks_again_slowly_unless_told_to_give_up(
    lab: Any, enrolled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, settings = enrolled
    lab.enrolment.revoke("n1")
    with node(folder, settings) as running:
        eventually(lambda: "refused" in running.events)
        assert running.running and running.problem is None
        assert "node n1 was revoked by the operator; asking again about every 5" in caplog.text
    with node(folder, settings, give_up=True) as running:
        eventually(lambda: not running.running)
        assert isinstance(running.problem, RefusedError) and running.problem.exit_status == 2
    assert link_module._SLOW_WAIT_S >= 60


def test_a_proxy_of_the_environment_is_used_when_it_is_asked_for(
    lab: Any, enrolled: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, settings = enrolled
    caplog.set_level(logging.INFO, "umbel.node")
    asked: list[bytes] = []

    def connect(near: socket.socket) -> int:
        asked.append(near.recv(1 << 16))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return int(lab.listener.port)

    road = Road(0, connect, times=1)
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "http_proxy", f"http://127.0.0.1:{road.port}")
    try:
        with node(folder, settings) as running:
            eventually(lambda: "connected" in running.events)
        assert asked == [] and "http_proxy is set; the link does not go through" in caplog.text
        through = NodeSettings(settings.address, settings.name, proxy=True)
        with node(folder, through) as running:
            eventually(lambda: "connected" in running.events)
        assert asked[0].startswith(f"CONNECT {settings.address}".encode())
    finally:
        road.close()


@pytest.mark.parametrize("host", ["[::1]", "localhost"])
def test_ipv6_and_names_carry_enrolment_and_training(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr("tests.server.conftest.ListenConfig", doors_at(f"{host}:0"))
    lab = Lab(tmp_path / "lab")
    lab.address = f"{host}:{lab.listener.port}"
    try:
        file = tmp_path / "n1.join"
        write_join_file(file, lab.enrolment.add("n1", lab.authority, lab.address, 3600))
        membership = Membership(tmp_path / "node")
        settings = asyncio.run(membership.enrol(file))
        membership.close()
        assert settings.address == lab.address
        with node(tmp_path / "node", settings) as running:
            eventually(lambda: "connected" in running.events)
            assert lab.hub.connected() == 1
    finally:
        lab.close()


def doors_at(address: str) -> Callable[..., ListenConfig]:
    def made(_: str, _identity: Identity, authority: Any, *more: Any) -> ListenConfig:
        names = ["localhost", "127.0.0.1", "::1"]
        return ListenConfig(address, make_server_identity(authority, names), authority, *more)

    return made
