"""What bad peers get: a status and one sentence; what the coordinator gets: nothing to worry."""

import contextlib
import socket
import ssl
import time
import warnings
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ArrayRecord, Message, RecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.conftest import eventually
from umbel.clients.process.membership import refusal
from umbel.core.errors import ConfigError, RunError
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.hub import Hub
from umbel.server.link.listener import ListenConfig, Listener
from umbel.transport.certificates import (
    Identity,
    make_request,
    new_key,
    open_authority,
    sign_request,
)
from umbel.transport.codec import encode
from umbel.transport.link_pb2 import Begin, Frame, Offer

CONTENT = RecordDict({"a": ArrayRecord({"x": Array(np.arange(10, dtype=np.float32))})})


def still_works(lab: Any, name: str = "good") -> None:
    """A good node is served whatever the bad ones did."""
    node = lab.node(name, instance=name)
    [target] = [line.node.node_id for line in lab.hub.members() if line.node.name == name]
    asked = lab.ask([Message(CONTENT, target, "train", group_id="1")])
    begin = node.read().begin
    node.send(Frame(begin=Begin(id=begin.id, size=len(begin.inline), inline=begin.inline)))
    [reply] = asked.result()
    assert reply.content == CONTENT


def fails(peer: Any, **hello: Any) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError):
        peer.connect(**hello)
    return peer.status()


def foreign(tmp_path: Path, name: str = "n1") -> Identity:
    other = open_authority(tmp_path / "other")
    key = new_key()
    certificate = sign_request(other, make_request(key, name), name)
    return Identity(certificate.public_bytes(Encoding.PEM), key, other.pem)


def test_a_coordinator_of_another_authority_is_not_trusted(lab: Any, tmp_path: Path) -> None:
    code, said = fails(lab.peer(foreign(tmp_path)))
    assert code == grpc.StatusCode.UNAVAILABLE

    class Problem:
        def code(self) -> Any:
            return code

        def details(self) -> str:
            return said

    found: Any = Problem()
    assert isinstance(refusal(lab.address, found), RunError)  # it is asked again
    assert "is not the coordinator of this federation" in str(refusal(lab.address, found))
    still_works(lab)


def test_a_certificate_of_another_authority_does_not_get_in(lab: Any, tmp_path: Path) -> None:
    theirs = foreign(tmp_path)
    mixed = Identity(theirs.certificate, theirs.key, lab.authority.pem)
    assert fails(lab.peer(mixed))[0] == grpc.StatusCode.UNAVAILABLE
    still_works(lab)


def test_an_expired_certificate_does_not_get_in(lab: Any) -> None:
    assert fails(lab.peer(lab.identity("old", days=-0.5)))[0] == grpc.StatusCode.UNAVAILABLE
    still_works(lab)


def test_a_certificate_that_was_not_issued_here_does_not_get_in(lab: Any) -> None:
    good = lab.identity("n1")
    key = new_key()
    forged = sign_request(lab.authority, make_request(key, "n1"), "n1")
    identity = Identity(forged.public_bytes(Encoding.PEM), key, good.root)
    code, said = fails(lab.peer(identity))
    assert code == grpc.StatusCode.PERMISSION_DENIED and "not issued here" in said


def test_no_client_certificate_no_plaintext_no_old_tls_no_noise(lab: Any) -> None:
    host, port = "127.0.0.1", lab.listener.port
    context = ssl.create_default_context(cadata=lab.authority.pem.decode())
    with (
        socket.create_connection((host, port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
        contextlib.suppress(ssl.SSLError, ConnectionError),
    ):
        wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert wrapped.recv(100) == b""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((host, port), timeout=10) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(raw)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 40, b"\x16\x03\x01\xff\xff"):
        with socket.create_connection((host, port), timeout=10) as raw:
            raw.sendall(noise)
    plain = grpc.insecure_channel(lab.address)
    with pytest.raises(grpc.RpcError):
        plain.unary_unary("/umbel.link.v1.Link/Enrol")(b"", timeout=5)
    plain.close()
    half_open = socket.create_connection((host, port))
    still_works(lab)
    half_open.close()


def test_a_ticket_enrols_once_and_does_nothing_else(lab: Any) -> None:
    join = lab.enrolment.add("n1", lab.authority, lab.address)
    ticket = lab.peer(join.identity)
    code, said = fails(ticket)
    assert code == grpc.StatusCode.PERMISSION_DENIED and "nothing else" in said
    key = new_key()
    first = ticket.enrol(join.token, key)
    assert first.name == "n1"
    assert ticket.enrol(join.token, key).name == "n1"  # the answer may have been lost
    with pytest.raises(grpc.RpcError) as used:
        ticket.enrol(join.token)
    assert "was used" in used.value.details()
    with pytest.raises(grpc.RpcError) as unknown:
        ticket.enrol("guess")
    assert "not known" in unknown.value.details()
    node = lab.peer(Identity(first.certificate, key, first.root))
    assert node.connect().welcome.name == "n1"


def test_an_expired_token_and_another_nodes_token_are_refused(lab: Any) -> None:
    late = lab.enrolment.add("late", lab.authority, lab.address, valid_s=-1)
    with pytest.raises(grpc.RpcError) as expired:
        lab.peer(late.identity).enrol(late.token)
    assert "has expired" in expired.value.details()
    one = lab.enrolment.add("one", lab.authority, lab.address)
    two = lab.enrolment.add("two", lab.authority, lab.address)
    with pytest.raises(grpc.RpcError) as swapped:
        lab.peer(one.identity).enrol(two.token)
    assert "same join file" in swapped.value.details()
    again = lab.enrolment.add("one", lab.authority, lab.address)
    with pytest.raises(grpc.RpcError):
        lab.peer(one.identity).enrol(one.token)  # a new join file voids the older one
    assert lab.peer(again.identity).enrol(again.token).name == "one"


def test_revocation_cuts_a_live_connection_and_keeps_the_node_out(lab: Any) -> None:
    identity = lab.identity("n1")
    node = lab.peer(identity)
    node.connect()
    other_process = Enrolment(lab.state)
    other_process.revoke("n1")
    other_process.close()
    code, said = node.status()
    assert code == grpc.StatusCode.PERMISSION_DENIED and "revoked" in said
    code, said = fails(lab.peer(identity))
    assert code == grpc.StatusCode.PERMISSION_DENIED and "revoked" in said
    with pytest.raises(ConfigError, match="was revoked"):
        lab.enrolment.add("n1", lab.authority, lab.address)
    still_works(lab)


def test_another_version_is_told_both_versions(lab: Any) -> None:
    code, said = fails(lab.peer(lab.identity("n1")), protocol=99, version="7.7")
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "Umbel 7.7" in said and "Umbel test" in said and "same version" in said


def test_a_second_process_with_one_certificate_is_told_so(lab: Any) -> None:
    identity = lab.identity("n1")
    first, twin = lab.peer(identity), lab.peer(identity)
    first.connect(instance="first")
    code, said = fails(twin, instance="second")
    assert code == grpc.StatusCode.ALREADY_EXISTS and "another process" in said
    again = lab.peer(identity)  # the first process itself may come again over a new connection
    assert again.connect(instance="first").welcome.name == "n1"
    assert first.status()[0] == grpc.StatusCode.ABORTED


LIES = {
    "no frame": b"\xff\xff\xff",
    "chunk of nothing": b"\x0a\x03abc",
    "a length that lies": b"\x0a\xff\xff\xff\xff\x0f",
    "two hellos": Frame(hello={"protocol": 1}),
    "2^62 bytes": Frame(begin=Begin(id="x", size=1 << 62)),
    "an offer of 2^62 bytes": Frame(offer=Offer(id="x", size=1 << 62)),
    "inside of another size": Frame(begin=Begin(id="x", size=5, inline=b"12345678")),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_node_says_ends_its_connection_with_a_sentence(lab: Any, lie: str) -> None:
    node = lab.node("liar")
    node.send(LIES[lie])
    code, said = node.status()
    assert code == grpc.StatusCode.INVALID_ARGUMENT, (code, said)
    assert said and "Traceback" not in said and len(said) < 300
    still_works(lab)


def test_a_first_frame_that_is_no_hello_is_refused(lab: Any) -> None:
    peer = lab.peer(lab.identity("n1"))
    peer._out.put(Frame(begin=Begin(id="x")))
    with pytest.raises(grpc.RpcError):
        peer.connect()
    code, said = peer.status()
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "must be a hello" in said


def test_replies_that_nobody_asked_for_are_taken_off_the_nodes_hands(lab: Any) -> None:
    one, two = lab.node("one"), lab.node("two", instance="2")
    [target] = [line.node.node_id for line in lab.hub.members() if line.node.name == "one"]
    asked = lab.ask([Message(CONTENT, target, "train", group_id="1")])
    begin = one.read().begin
    false = encode(RecordDict())
    data = b"".join(false)
    two.send(Frame(begin=Begin(id=begin.id, size=len(data), inline=data)))
    assert two.read().done.id == begin.id  # the reply of another node counts for nothing
    one.send(Frame(begin=Begin(id="unknown", size=len(data), inline=data)))
    assert one.read().done.id == "unknown"
    one.send(Frame(offer=Offer(id="unknown", size=10**6)))
    assert one.read().done.id == "unknown"
    for _ in range(2):  # the second time it is not wanted any more
        one.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
        assert one.read().done.id == begin.id
    [reply] = asked.result()
    assert reply.content == CONTENT


def test_a_large_reply_comes_when_it_was_asked_for_and_not_before(lab: Any) -> None:
    node = lab.node("n1")
    [target] = lab.grid.get_node_ids()
    asked = lab.ask([Message(CONTENT, target, "train")])
    begin = node.read().begin
    node.send(Frame(begin=Begin(id=begin.id, size=10**6)))
    code, said = node.status()
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "without being asked" in said
    again = lab.peer(lab.identity("n1"))
    again.connect(instance="new")
    assert again.read().begin.id == begin.id  # what was not answered is asked again
    again.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
    assert asked.result()[0].content == CONTENT


@pytest.mark.parametrize("content", [b"", b"nonsense", b"".join(encode(CONTENT))[:-1]])
def test_a_reply_that_cannot_be_read_costs_its_sender_only(lab: Any, content: bytes) -> None:
    node = lab.node("n1")
    [target] = lab.grid.get_node_ids()
    asked = lab.ask([Message(CONTENT, target, "train")])
    begin = node.read().begin
    node.send(Frame(begin=Begin(id=begin.id, size=len(content), inline=content)))
    [reply] = asked.result()
    assert reply.has_error() and "cannot be read" in reply.error.reason
    assert reply.metadata.src_node_id == target


def test_a_peer_that_stops_reading_holds_nobody_up(lab: Any) -> None:
    big = RecordDict({"a": ArrayRecord({"x": Array(np.zeros(4_000_000, np.float32))})})
    deaf = lab.node("deaf")  # grpc takes a few chunks on its behalf, then none
    good = lab.node("good", instance="2")
    ids = {line.node.name: line.node.node_id for line in lab.hub.members()}
    asked = lab.ask([Message(big, ids["deaf"], "train")], timeout=3)
    small = lab.ask([Message(CONTENT, ids["good"], "train")])
    begin = good.read().begin
    good.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
    assert small.result()[0].content == CONTENT
    assert asked.result() == []
    del deaf


@pytest.mark.parametrize("since", ["heard", "sending_since"])
def test_a_connection_that_is_only_half_there_is_closed(lab: Any, since: str) -> None:
    """A cable was pulled: nothing arrives, or nothing is taken, and nobody says goodbye."""
    node = lab.node("n1")
    [line] = lab.hub.members()
    setattr(line.session, since, time.monotonic() - 61)
    code, said = node.status()
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED and "nothing was heard for too long" in said
    eventually(lambda: lab.hub.connected() == 0)
    still_works(lab)


def test_a_flood_of_frames_holds_nobody_up(lab: Any) -> None:
    node = lab.node("n1")
    for _ in range(20_000):
        node.send(Frame(offer=Offer(id="x", size=1)))
    still_works(lab)


def test_a_port_in_use_is_named(lab: Any) -> None:
    doors = ListenConfig(lab.address, lab.listener.doors.identity, lab.authority, "test", "app")
    with pytest.raises(ConfigError, match="port is in use"):
        Listener(Hub(), lab.enrolment, doors).start()


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "umbel.sqlite").write_bytes(b"not a database, not even nearly" * 100)
    with pytest.raises(ConfigError, match="is damaged"):
        Enrolment(tmp_path)


def test_tokens_lie_in_the_database_as_hashes(lab: Any) -> None:
    join = lab.enrolment.add("n1", lab.authority, lab.address)
    data = b"".join(file.read_bytes() for file in lab.state.glob("umbel.sqlite*"))
    assert join.token.encode() not in data
    assert (lab.state / "umbel.sqlite").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="the nodes are: n1"):
        lab.enrolment.revoke("nobody")
    for name in ("", "a b", "x" * 60, "../x"):
        with pytest.raises(ConfigError, match="cannot be a node's name"):
            lab.enrolment.add(name, lab.authority, lab.address)


def test_the_health_service_answers_nodes(lab: Any) -> None:
    peer = lab.peer(lab.identity("n1"))
    stub = health_pb2_grpc.HealthStub(peer.channel)
    found = stub.Check(health_pb2.HealthCheckRequest(service="umbel.link.v1.Link"), timeout=10)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
