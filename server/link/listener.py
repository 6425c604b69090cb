"""The gRPC server of the link: TLS, who may come in, and the frames of each connection.

    Enrol, Renew   certificates
    Connect        one stream a node: a reader and a writer, until either ends
    Health         grpc.health.v1, on the same port and on a local one if asked

A peer gets a gRPC status and one sentence, never a traceback.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from umbel.core.errors import ConfigError, UmbelError
from umbel.core.text import plain
from umbel.server.link.connection import Connection, next_frame
from umbel.server.link.doorkeeper import Doorkeeper, most_connections
from umbel.server.link.enrolment import Enrolment, RefusedError
from umbel.server.link.hub import Hub, Session, unanswered
from umbel.transport import loop
from umbel.transport.certificates import Authority, Identity, common_name
from umbel.transport.frames import (
    CHANNEL_OPTIONS,
    LARGEST_CONTENT,
    PROTOCOL,
    SERVICE,
    FrameError,
    from_wire,
    to_wire,
)
from umbel.transport.link_pb2 import (
    Certificate,
    Drain,
    EnrolRequest,
    Frame,
    Hello,
    RenewRequest,
    Welcome,
)

log = logging.getLogger("umbel.link")
_HELLO_S = 20.0
_SAY_EVERY_S = 60.0
_READ = 512 << 10  # gRPC keeps a buffer of this size for every connection that was ever busy
_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not a shared port
    ("grpc.experimental.tcp_max_read_chunk_size", _READ),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.server_handshake_timeout_ms", 20_000),  # half-open connections do not stay
]


@dataclass(frozen=True)
class ListenConfig:
    """Where a server listens, and who it is.

    Attributes:
        address: HOST:PORT for nodes; port 0 takes a free one.
        identity: the server's key and certificate, and the root of its nodes' certificates.
        authority: signs nodes' requests; None where nodes bring their own certificates.
        health: HOST:PORT of a local health endpoint without TLS; empty is none.
        version: of Umbel.
        app_digest: of the app that nodes must have.
        largest: bytes of the largest reply that is taken.
    """

    address: str
    identity: Identity
    authority: Authority | None
    version: str
    app_digest: str
    health: str = ""
    largest: int = LARGEST_CONTENT


class Listener:
    """The running gRPC server, on a thread of its own."""

    def __init__(self, hub: Hub, enrolment: Enrolment, doors: ListenConfig) -> None:
        self.hub, self.enrolment, self.doors = hub, enrolment, doors
        self.port = 0
        self.doorkeeper = Doorkeeper()
        self._health = _Health(self.doorkeeper)
        self._stopping: asyncio.Event | None = None
        self._for_good = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be used.
        """
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: loop.run(self._main(started)), name="umbel-link", daemon=True
        )
        self._thread.start()
        started.result()

    def stop(self, *, for_good: bool) -> None:
        """Tell the nodes, close all connections, and end."""
        if self._thread is None or self.hub.loop is None:
            return
        self._for_good = for_good
        if self._stopping is not None:
            with contextlib.suppress(RuntimeError):
                self.hub.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout=15)

    # ---- the event loop

    async def _main(self, started: "Future[None]") -> None:
        self.hub.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            servers = await self._listen()
        except BaseException as problem:
            started.set_exception(problem)
            return
        started.set_result(None)
        ticking = asyncio.create_task(self._tick())
        await self._stopping.wait()
        ticking.cancel()
        await self._say_goodbye()
        for server in servers:
            await server.stop(grace=1)

    async def _listen(self) -> list[grpc.aio.Server]:
        identity = self.doors.identity
        credentials = grpc.ssl_server_credentials(
            [(identity.key, identity.certificate)], identity.root, require_client_auth=True
        )
        most = ("grpc.max_allowed_incoming_connections", most_connections())
        server = grpc.aio.server(options=[*_OPTIONS, most])
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.port = _bind(
            lambda: server.add_secure_port(self.doors.address, credentials), self.doors.address
        )
        await server.start()
        servers = [server]
        if self.doors.health:
            local = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            health_pb2_grpc.add_HealthServicer_to_server(self._health, local)
            _bind(lambda: local.add_insecure_port(self.doors.health), self.doors.health)
            await local.start()
            servers.append(local)
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return servers

    def _handlers(self) -> Any:
        handlers: dict[str, Any] = {
            "Enrol": grpc.unary_unary_rpc_method_handler(
                self._enrol, EnrolRequest.FromString, Certificate.SerializeToString
            ),
            "Renew": grpc.unary_unary_rpc_method_handler(
                self._renew, RenewRequest.FromString, Certificate.SerializeToString
            ),
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect, from_wire, to_wire),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _tick(self) -> None:
        version, said = self.enrolment.version(), -_SAY_EVERY_S
        while True:
            await self._watch_the_door()
            try:
                if (fault := self.enrolment.fault()) and time.monotonic() > said + _SAY_EVERY_S:
                    said = time.monotonic()
                    log.error("%s; until then nobody is let in", fault)
                now = self.enrolment.version()
                nodes = self.enrolment.nodes() if now != version and not fault else None
                version = now
            except UmbelError as problem:
                if time.monotonic() > said + _SAY_EVERY_S:
                    said = time.monotonic()
                    log.error("%s", problem)
                nodes = None
            self.hub.tick(nodes)

    async def _watch_the_door(self) -> None:
        """A second, and a look at the door every quarter of it."""
        for _ in range(4):
            await asyncio.sleep(0.25)
            self.doorkeeper.look(self.port)

    async def _say_goodbye(self) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        sessions = self._sessions()
        for session in sessions:
            session.send(Frame(drain=Drain(for_good=self._for_good)))
        until = time.monotonic() + 2
        while time.monotonic() < until and any(
            not session.outgoing.empty() for session in self._sessions()
        ):
            await asyncio.sleep(0.01)
        for session in sessions:
            session.end("UNAVAILABLE", "the coordinator has stopped")

    def _sessions(self) -> list[Session]:
        return [line.session for line in self.hub.lines.values() if line.session is not None]

    # ---- certificates

    async def _enrol(self, request: EnrolRequest, context: Any) -> Certificate:
        return await self._certificate(
            context,
            lambda peer, authority: self.enrolment.enrol(
                peer, request.token, request.request, authority
            ),
        )

    async def _renew(self, request: RenewRequest, context: Any) -> Certificate:
        return await self._certificate(
            context,
            lambda peer, authority: self.enrolment.renew(peer, request.request, authority),
        )

    async def _certificate(
        self, context: Any, make: Callable[[bytes, Authority], Any]
    ) -> Certificate:
        self.doorkeeper.known(context.peer())
        authority = self.doors.authority
        if authority is None:
            await _refuse(
                context, "FAILED_PRECONDITION", "this coordinator's nodes bring certificates along"
            )
        try:
            signed = make(_peer(context), authority)
        except RefusedError as problem:
            return await self._turn_away(context, problem)
        except UmbelError as problem:
            log.error("%s", problem)
            return await _refuse(context, "UNAVAILABLE", "the coordinator cannot issue now")
        log.info(
            "node %s has a certificate until %s", common_name(signed), signed.not_valid_after_utc
        )
        pem, name = signed.public_bytes(Encoding.PEM), common_name(signed)
        return Certificate(certificate=pem, root=self.doors.identity.root, name=name)

    async def _turn_away(self, context: Any, problem: RefusedError) -> NoReturn:
        self.hub.traffic.refused += 1
        log.warning("refused %s: %s", context.peer(), problem)
        await _refuse(context, "PERMISSION_DENIED", str(problem))

    # ---- a node's connection

    async def _connect(self, _: AsyncIterator[Any], context: Any) -> None:
        self.doorkeeper.known(context.peer())
        try:
            session = await self._welcome(context)
        except RefusedError as problem:
            await self._turn_away(context, problem)
            return
        except FrameError as problem:
            await _refuse(context, "INVALID_ARGUMENT", str(problem))
            return
        except UmbelError as problem:
            log.error("%s", problem)
            await _refuse(context, "UNAVAILABLE", "the coordinator cannot admit nodes now")
            return
        except (TimeoutError, EOFError):
            log.warning("%s said no hello in time", context.peer())
            await _refuse(context, "UNAVAILABLE", "no hello came in time")
            return
        if session is None:
            return
        self.hub.join(session)
        status, sentence = "ABORTED", "the connection is over"
        try:
            connection = Connection(self.hub, session, context, self.doors.largest)
            status, sentence = await connection.run()
        finally:
            self.hub.leave(session)
        log.info("node %s has left: %s", session.node.name, sentence)
        await _refuse(context, status, sentence)

    async def _welcome(self, context: Any) -> Session | None:
        """The first exchange; None where the peer was refused with a sentence."""
        node = self.enrolment.identify(_peer(context))
        frame = await asyncio.wait_for(next_frame(context), _HELLO_S)
        if not isinstance(frame, Frame) or frame.WhichOneof("kind") != "hello":
            raise FrameError("the first frame of a connection must be a hello")
        hello: Hello = frame.hello
        if hello.protocol != PROTOCOL:
            sentence = (
                f"node {node.name} runs Umbel {plain(hello.version, 40)} "
                f"(protocol {hello.protocol}) and the coordinator Umbel {self.doors.version} "
                f"(protocol {PROTOCOL}); install the same version on both"
            )
            log.warning("%s", sentence)
            await _refuse(context, "FAILED_PRECONDITION", sentence)
            return None
        line = self.hub.lines.get(node.node_id)
        if line is not None and line.session is not None:
            other = line.session
            if other.hello.instance != hello.instance:
                sentence = (
                    f"another process is connected with the certificate of {node.name}; "
                    "each node needs an enrolment of its own"
                )
                log.warning("%s", sentence)
                await _refuse(context, "ALREADY_EXISTS", sentence)
                return None
        welcome = Welcome(
            protocol=PROTOCOL,
            version=self.doors.version,
            name=node.name,
            node_id=node.node_id,
            app_digest=self.doors.app_digest,
            beat_s=self.hub.beat_s,
            largest=self.doors.largest,
            note=unanswered(line, hello.held) if line is not None else "",
        )
        await context.write(Frame(welcome=welcome))
        log.info("node %s is connected from %s", node.name, context.peer())
        return Session(node, hello)


class _Health(health.HealthServicer):
    """gRPC's health service, whose callers are known at the door like any others."""

    def __init__(self, doorkeeper: Doorkeeper) -> None:
        super().__init__()
        self._doorkeeper = doorkeeper

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self._doorkeeper.known(context.peer())
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        self._doorkeeper.known(context.peer())
        await super().Watch(request, context)


async def _refuse(context: Any, status: str, sentence: str) -> NoReturn:
    """End a call with a status and a sentence for the peer; gRPC raises to do so."""
    await context.abort(getattr(grpc.StatusCode, status), sentence)
    raise AssertionError("abort has returned")


def _bind(add: Callable[[], int], address: str) -> int:
    try:
        port = add()
    except RuntimeError as problem:
        raise ConfigError(_not_listening(address)) from problem
    if port == 0:
        raise ConfigError(_not_listening(address))
    return port


def _not_listening(address: str) -> str:
    return (
        f"cannot listen on {address}: the port is in use, or the address is not this machine's; "
        "choose another with --listen HOST:PORT"
    )


def _peer(context: Any) -> bytes:
    """The certificate (PEM) that the peer has proved to own."""
    found = context.auth_context().get("x509_pem_cert")
    if not found:
        raise RefusedError("a node needs a certificate")
    return bytes(found[0])
