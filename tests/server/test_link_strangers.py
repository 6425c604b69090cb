"""Connections of strangers: they cost neither the run its files nor the nodes their place."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from tests.server.conftest import Lab, eventually
from umbel.core.errors import ConfigError
from umbel.server.link import doorkeeper
from umbel.server.link.doorkeeper import Doorkeeper, check_room_for, most_connections
from umbel.transport.link_pb2 import Begin, Frame

CONTENT = RecordDict({"a": ArrayRecord({"x": Array(np.arange(10, dtype=np.float32))})})


def silent(port: int, many: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """So many connections that say nothing."""
    made = []
    for _ in range(many):
        each = stack.enter_context(socket.socket())
        each.settimeout(5)
        with contextlib.suppress(OSError):
            each.connect(("127.0.0.1", port))
        made.append(each)
    return made


def served(lab: Any, name: str) -> None:
    """A node connects, and its reply is heard."""
    node = lab.node(name, instance=name)
    [target] = [line.node.node_id for line in lab.hub.members() if line.node.name == name]
    asked = lab.ask([Message(CONTENT, target, "train", group_id="1")])
    begin = node.read().begin
    node.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
    assert asked.result()[0].content == CONTENT


def ended(each: socket.socket) -> bool:
    """Whether the other side has hung up."""
    each.setblocking(False)
    try:
        return each.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.fixture
def few_files() -> Iterator[None]:
    """A process that may open some hundred files, and strangers that have more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len([*Path("/proc/self/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 1700, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_silent_connections_do_not_starve_the_files_nor_shut_out_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers and coordinator share one table here, so 700 stand for any number."""
    monkeypatch.setattr("umbel.server.link.listener.most_connections", lambda: 300)
    lab = Lab(tmp_path / "lab")
    lab.listener.doorkeeper.strangers = 50
    try:
        with contextlib.ExitStack() as stack:
            first = lab.node("first", instance="first")
            made = silent(lab.listener.port, 700, stack)
            eventually(lambda: sum(map(ended, made)) >= 650)
            assert sum(ended(each) for each in made) <= 660
            served(lab, "second")
            assert lab.hub.connected() == 2, "the node that was here before has stayed"
            silent(lab.listener.port, 100, stack)
            served(lab, "third")
            del first
    finally:
        lab.close()


def test_a_connection_without_a_call_is_shut_in_time_and_one_with_a_call_stays(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "HANDSHAKE_S", 0.5)
    lab.node("n1")
    with contextlib.ExitStack() as stack:
        [one] = silent(lab.listener.port, 1, stack)
        eventually(lambda: ended(one))
    eventually(lambda: lab.listener.doorkeeper.refused >= 1)  # counted after the connection is shut
    assert lab.hub.connected() == 1
    served(lab, "n2")


def test_the_most_crowded_address_gives_way_first() -> None:
    keeper = Doorkeeper(strangers=4)
    external_nodes = {
        number: doorkeeper._Guest(
            ("198.51.100.7" if number < 6 else f"192.0.2.{number}", 1), number
        )
        for number in range(9)
    }
    assert keeper._too_many(external_nodes, set()) == [0, 1, 2, 3, 4]
    assert keeper._too_many(external_nodes, {0, 1, 2, 3, 4}) == []


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("ipv4:192.0.2.1:4711", ("192.0.2.1", 4711)),
        ("ipv6:%5B::1%5D:4711", ("::1", 4711)),
        ("ipv6:[fe80::1%25eth0]:4711", ("fe80::1", 4711)),
    ],
)
def test_peers_are_known_in_grpcs_words(said: str, meant: tuple[str, int]) -> None:
    keeper = Doorkeeper()
    keeper.known(said)
    assert keeper._known == {meant}


@pytest.mark.usefixtures("few_files")
def test_more_nodes_than_files_is_a_sentence_and_not_a_wait() -> None:
    most = most_connections()
    check_room_for(most)
    with pytest.raises(ConfigError, match=r"may open .* files.*LimitNOFILE="):
        check_room_for(most + 1)
