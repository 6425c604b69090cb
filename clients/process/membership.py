"""A node's place in a federation: its state folder, its key, its certificate."""

import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from umbel.core.errors import ConfigError, RunError
from umbel.core.text import plain
from umbel.transport.certificates import (
    CertificateError,
    CertificateExpiredError,
    Identity,
    by_this_clock,
    check_pair,
    load_certificate,
    load_identity,
    load_key,
    make_request,
    new_key,
    read_identity,
    renewal_due,
    save_identity,
)
from umbel.transport.frames import CHANNEL_OPTIONS, SERVICE
from umbel.transport.join import JoinError, read_join_file
from umbel.transport.keyfiles import KeyFileError, read_secret, write_secret
from umbel.transport.link_pb2 import Certificate, EnrolRequest, RenewRequest

_CALL_S = 20.0


class ExpiredError(ConfigError):
    """The node's certificate has expired, so that it cannot be renewed either."""


class RefusedError(ConfigError):
    """The coordinator, whose certificate is the federation's, refuses this node.

    Nothing else is final: what goes wrong before the coordinator has shown its certificate may
    be anybody's doing and be over in a minute.
    """


@dataclass(frozen=True)
class NodeSettings:
    """What a node remembers between starts.

    Attributes:
        address: HOST:PORT of the coordinator.
        name: the node's.
        app: the app's folder.
        node_config: of the node, such as its `partition-id`.
        own_certificate: paths of certificate, key and root that someone brought along.
        proxy: go through the HTTP proxy of the environment.
        policy: path of the policy file; empty is the one in the state folder.
    """

    address: str
    name: str = ""
    app: str = ""
    node_config: Mapping[str, Any] = field(default_factory=dict)
    own_certificate: tuple[str, str, str] | None = None
    proxy: bool = False
    policy: str = ""


class Membership:
    """The state folder of one node process.

    Attributes:
        proxy: enrol and renew through the HTTP proxy of the environment.

    Raises:
        ConfigError: another process uses the folder, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proxy = False
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process uses {folder}; give each node a state folder of its own"
            ) from None
        except OSError as problem:
            raise ConfigError(f"{folder} cannot be used: {problem.strerror}") from problem

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    # ---- settings

    def settings(self) -> NodeSettings | None:
        """What earlier starts have left, or None."""
        return settings_in(self.folder)

    def remember(self, settings: NodeSettings) -> None:
        """Keep settings for the next start."""
        try:
            write_secret(
                self.folder / "node.json", json.dumps(dataclasses.asdict(settings)).encode()
            )
        except OSError as problem:
            raise ConfigError(f"{self.folder} cannot be written: {problem.strerror}") from problem

    # ---- certificates

    def identity(self, settings: NodeSettings) -> Identity | None:
        """The node's key and certificate, or None before it has enrolled.

        Raises:
            ExpiredError: the node was away for longer than its certificate is good for.
            ConfigError: a file is damaged, or open to others.
        """
        try:
            if settings.own_certificate is not None:
                paths = [Path(each) for each in settings.own_certificate]
                return load_identity(paths[0], paths[1], paths[2])
            file = self.folder / "identity.pem"
            if not file.exists():
                return None
            identity = read_identity(file)
            ends = load_certificate(identity.certificate).not_valid_after_utc
        except CertificateExpiredError as problem:
            raise ExpiredError(str(problem)) from problem
        except (CertificateError, KeyFileError) as problem:
            raise ConfigError(str(problem)) from problem
        if ends < datetime.datetime.now(datetime.UTC):
            raise ExpiredError(
                f"the certificate of node {settings.name} expired on {ends:%Y-%m-%d %H:%M} UTC"
                f"{by_this_clock()}; if the clock is right, start it once with --join and a new "
                "join file, which the operator makes with: "
                f"umbel nodes add {settings.name}"
            )
        return identity

    async def enrol(self, join_file: Path) -> NodeSettings:
        """Exchange a join file for a certificate; the key is made here and stays here.

        Raises:
            ConfigError: the file cannot be used, or the coordinator refuses it.
            RunError: the coordinator cannot be reached.
        """
        try:
            join = read_join_file(join_file)
        except JoinError as problem:
            raise ConfigError(str(problem)) from problem
        key = self._pending_key(join.root_fingerprint)
        request = EnrolRequest(token=join.token, request=make_request(key, join.name))
        answer = await self._call(join.address, join.identity, "Enrol", request)
        self._accept(answer, key)
        return NodeSettings(address=join.address, name=answer.name)

    async def renew_if_due(self, settings: NodeSettings, identity: Identity) -> bool:
        """A new key and certificate in the last third of the old one's life."""
        if settings.own_certificate is not None:
            return False
        if not renewal_due(load_certificate(identity.certificate)):
            return False
        key = new_key()
        request = RenewRequest(request=make_request(key, settings.name))
        self._accept(await self._call(settings.address, identity, "Renew", request), key)
        return True

    def _pending_key(self, root: str) -> bytes:
        """The key of an enrolment; the same for a second try, whose answer may have been lost."""
        file = self.folder / f"joining-{root[:16]}.key"
        if not file.exists():
            write_secret(file, new_key())
        return read_secret(file)

    def _accept(self, answer: Certificate, key: bytes) -> None:
        try:
            check_pair(load_certificate(answer.certificate), load_key(key))
        except CertificateError as problem:
            raise RunError(f"the coordinator has sent an unusable certificate: {problem}") from (
                problem
            )
        identity = Identity(answer.certificate, key, answer.root)
        save_identity(self.folder / "identity.pem", identity)
        for file in self.folder.glob("joining-*.key"):
            file.unlink()

    async def _call(
        self, address: str, identity: Identity, name: str, request: EnrolRequest | RenewRequest
    ) -> Certificate:
        async with open_channel(address, identity, proxy=self.proxy) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=Certificate.FromString,
            )
            try:
                answer: Certificate = await call(request, timeout=_CALL_S)
                return answer
            except grpc.aio.AioRpcError as problem:
                raise refusal(address, problem) from None


def settings_in(folder: Path) -> NodeSettings | None:
    """What a node's starts have left in its state folder, or None.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        fields = json.loads((folder / "node.json").read_text())
        if fields.get("own_certificate"):
            fields["own_certificate"] = tuple(fields["own_certificate"])
        return NodeSettings(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as problem:
        raise ConfigError(
            f"{folder / 'node.json'} is damaged ({problem}); remove it and join again"
        ) from problem


def open_channel(address: str, identity: Identity, *, proxy: bool = False) -> grpc.aio.Channel:
    """A channel to the coordinator, under mutual TLS.

    gRPC would go through any `http_proxy` that it finds in the environment; here that is asked
    for, because a proxy is for pages, and few of them let a connection live for days.
    """
    credentials = grpc.ssl_channel_credentials(identity.root, identity.key, identity.certificate)
    options = [
        *CHANNEL_OPTIONS,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", int(proxy)),
    ]
    return grpc.aio.secure_channel(address, credentials, options=options)


def ignored_proxies() -> str:
    """The environment's variables that name a proxy which is not used; empty if none does."""
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    return ", ".join(name for name in names if os.environ.get(name))


def refusal(address: str, problem: grpc.aio.AioRpcError) -> RefusedError | RunError:
    """What a failed call means: RefusedError where the right coordinator said no."""
    code, said = problem.code(), plain(problem.details() or "")
    if code == grpc.StatusCode.UNAVAILABLE:
        return RunError(_unreachable(address, said))
    final = (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
    if code in final:
        return RefusedError(f"the coordinator at {address} refuses: {said}")
    return RunError(f"the coordinator at {address} says: {said or code}")


def _unreachable(address: str, said: str) -> str:
    """Why no connection came about, as far as gRPC's words tell."""
    if "CERTIFICATE_VERIFY_FAILED" in said:
        for words in ("has expired", "is not yet valid"):
            if words in said:
                return (
                    f"the certificate of {address} {words}{by_this_clock()}; if the clock is "
                    "right, the coordinator's is wrong, or its certificate must be renewed by "
                    "starting it again"
                )
    if "CERTIFICATE_VERIFY_FAILED" in said or "Hostname Verification" in said:
        return (
            f"{address} is not the coordinator of this federation: its certificate is another "
            "authority's or does not carry this address"
        )
    if "ndshake failed" in said:
        why = said.rpartition("OPENSSL_internal:")[2].partition(":")[0].strip()
        return (
            f"what answers at {address} does not speak as a coordinator does ({why[:60]}): "
            "another service, a portal that asks to sign in, or bytes that were changed on the way"
        )
    if "Socket closed" in said:
        return (
            f"the coordinator at {address} cannot be reached: the connection was closed at once; "
            "perhaps it is starting or full, or does not accept this node's certificate"
            f"{by_this_clock()}"
        )
    return f"the coordinator at {address} cannot be reached"
