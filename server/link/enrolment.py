"""Who belongs to a federation: nodes, tokens, certificates and revocations, in SQLite.

The database lies in the coordinator's `--state` and is shared between the server process and
`umbel nodes` and `umbel status` in other terminals; the server notices their changes within a
second. Tokens are kept as hashes: whoever reads the database cannot enrol with it.

What was written is moved out of the write-ahead log at once, so a plain copy of the one file is
a copy of everything. The database knows its authority and has a number of its own: another's in
its place, or none, is noticed before anybody is let in by it.
"""

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from umbel.core.errors import ConfigError, RunError
from umbel.transport.certificates import (
    NODE_DAYS,
    TICKET_PREFIX,
    Authority,
    CertificateError,
    common_name,
    fingerprint,
    load_certificate,
    make_ticket,
    open_authority,
    requested_key,
    sign_request,
)
from umbel.transport.join import JoinFile, make_join_file

FIRST_NODE_ID = 1001
_MAKING = "being made"
_SCHEMA = """
create table if not exists nodes (
    node_id integer primary key, name text unique not null, created real not null,
    revoked real, own_certificate integer not null default 0);
create table if not exists certificates (
    serial text primary key, name text not null, issued real not null, expires real not null,
    public_key text not null);
create table if not exists tokens (
    digest text primary key, name text not null, expires real not null,
    used real, request text);
create table if not exists facts (name text primary key, value text not null);
"""


class RefusedError(Exception):
    """A peer may not do this; the sentence is for the peer."""


@dataclass(frozen=True)
class EnrolledNode:
    """One node of the federation.

    Attributes:
        node_id: Flower's id of it, the same for ever.
        name: people's.
        created: when the operator added it, seconds since 1970.
        revoked: when it was revoked, or None.
        enrolled: whether it has a certificate.
        expires: when its newest certificate ends, or None.
    """

    node_id: int
    name: str
    created: float
    revoked: float | None
    enrolled: bool
    expires: float | None


@dataclass
class Fact:
    """A value that is kept under a name, while it is changed."""

    value: Any


_KEEP = "insert into facts values (?, ?) on conflict(name) do update set value=excluded.value"


class Enrolment:
    """The database of a federation.

    Args:
        folder: the coordinator's state; made if missing.

    Raises:
        ConfigError: the database cannot be opened, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "umbel.sqlite"
        self._seen: tuple[int, ...] = ()
        self._fault = ""
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = sqlite3.connect(self.path, timeout=10, check_same_thread=False)
            self.path.chmod(0o600)
            self._database.execute("pragma journal_mode=wal")
            found = self._database.execute("pragma quick_check").fetchone()[0]
            self._database.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as problem:
            raise ConfigError(_unusable(self.path, problem)) from problem
        if found != "ok":
            raise ConfigError(_unusable(self.path, found))
        if self.fact("database") is None:
            self.keep("database", secrets.token_hex(16))
        self._number = self.fact("database")
        self._seen = _state_of(self.path)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def authority(self) -> Authority:
        """The authority that lies beside the database; both are made where neither is there.

        Raises:
            ConfigError: one of them is missing, or they are not of the same federation.
            KeyFileError: the authority's key is open to others.
            CertificateError: the authority is damaged.
        """
        file = self.path.parent / "authority.pem"
        known = self.fact("authority")
        if file.exists() and known is None and not self.nodes():
            raise ConfigError(
                f"{file} is there, and {self.path} beside it is new or empty: put back a copy of "
                "the database (the nodes are in it), or move authority.pem away to begin a new "
                "federation"
            )
        if known is not None and known != _MAKING and not file.exists():
            raise ConfigError(
                f"{self.path} belongs to the authority {str(known)[:16]}, and {file} is missing: "
                "put back a copy of it, or move the database away to begin a new federation"
            )
        if not file.exists():
            self.keep("authority", _MAKING)  # whoever is killed here begins again
        authority = open_authority(self.path.parent)
        print_ = fingerprint(authority.certificate)
        if known in (None, _MAKING):
            self.keep("authority", print_)
        elif known != print_:
            raise ConfigError(
                f"{file} has the fingerprint {print_[:16]}, and {self.path} belongs to the "
                f"authority {str(known)[:16]}: put back the copies that belong together"
            )
        return authority

    def fault(self) -> str:
        """What has happened to the file since it was opened; empty if it is sound.

        Cheap where the file has not changed. Once a fault is found, nobody is let in any more:
        the file that is there now may have forgotten who was shut out.
        """
        state = _state_of(self.path)
        if state != self._seen and not self._fault:
            self._fault = self._examine()
        self._seen = state
        return self._fault

    def _examine(self) -> str:
        cure = "stop the server, put back a copy, and start it again"
        try:
            fresh = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
        except sqlite3.Error:
            return f"{self.path} is gone or cannot be opened; {cure}"
        try:
            found = fresh.execute("pragma quick_check").fetchone()[0]
            row = fresh.execute("select value from facts where name='database'").fetchone()
        except sqlite3.Error as problem:
            if "locked" in str(problem):
                return ""
            return f"{self.path} was damaged while it was in use ({problem}); {cure}"
        finally:
            fresh.close()
        if found != "ok":
            return f"{self.path} was damaged while it was in use ({str(found)[:200]}); {cure}"
        if row is None or json.loads(row[0]) != self._number:
            return f"{self.path} was replaced by another database while it was in use; {cure}"
        if _state_of(self.path)[:2] != self._seen[:2]:
            return f"{self.path} was replaced by a copy while it was in use; {cure}"
        return ""

    # ---- what an operator does

    def add(
        self, name: str, authority: Authority, address: str, valid_s: float = 24 * 3600.0
    ) -> JoinFile:
        """Add a node, or give a known one a new join file (its older ones are void).

        Raises:
            ConfigError: the name cannot be one, or the node was revoked.
        """
        self._insert(name, own_certificate=False)
        expires = time.time() + valid_s
        # The ticket outlives its token a little: a late node reads a sentence, not a TLS alert.
        join = make_join_file(
            name, address, expires, make_ticket(authority, name, valid_s / 86400 + 7)
        )
        with self._write() as database:
            database.execute("delete from tokens where name=? and used is null", (name,))
            database.execute(
                "insert into tokens (digest, name, expires) values (?, ?, ?)",
                (_digest(join.token), name, expires),
            )
        return join

    def register(self, name: str) -> None:
        """Admit a node that brings a certificate of the operator's own authority."""
        self._insert(name, own_certificate=True)

    def revoke(self, name: str) -> None:
        """Shut a node out, now and for good.

        Raises:
            ConfigError: there is no such node.
        """
        with self._write() as database:
            changed = database.execute(
                "update nodes set revoked=coalesce(revoked, ?) where name=?", (time.time(), name)
            ).rowcount
            database.execute("delete from tokens where name=?", (name,))
        if not changed:
            known = ", ".join(node.name for node in self.nodes()) or "none"
            raise ConfigError(f"there is no node {name!r}; the nodes are: {known}")

    def nodes(self) -> list[EnrolledNode]:
        """All nodes, in the order in which they were added."""
        rows = self._read(
            "select n.node_id, n.name, n.created, n.revoked, n.own_certificate,"
            " max(c.expires) from nodes n left join certificates c on c.name = n.name"
            " group by n.node_id order by n.node_id"
        )
        return [
            EnrolledNode(row[0], row[1], row[2], row[3], bool(row[4]) or row[5] is not None, row[5])
            for row in rows
        ]

    def public_keys(self) -> dict[str, str]:
        """The newest public key of every node that is not revoked, in OpenSSH's form."""
        rows = self._read(
            "select c.name, c.public_key from certificates c join nodes n on n.name = c.name"
            " where n.revoked is null order by c.issued"
        )
        return dict(rows)

    # ---- what a peer asks for

    def enrol(
        self, peer: bytes, token: str, request: bytes, authority: Authority
    ) -> x509.Certificate:
        """Exchange a token and a signing request for a certificate.

        A request for the same key may come again, from a node that lost the answer.

        Raises:
            RefusedError: the token is unknown, used, expired, or another node's.
        """
        self._trust()
        row = self._read(
            "select name, expires, used, request from tokens where digest=?", (_digest(token),)
        )
        if not row:
            raise RefusedError("this token is not known here; ask the operator for a new join file")
        name, expires, used, known_request = row[0]
        asked = _key_digest(request)
        presented = _peer_name(peer)
        if presented != TICKET_PREFIX + name:
            raise RefusedError("the token and the certificate are not of the same join file")
        if used is not None and known_request != asked:
            raise RefusedError(f"the token of {name} was used; ask for a new join file")
        if expires < time.time():
            raise RefusedError(f"the token of {name} has expired; ask for a new join file")
        certificate = self.issue(name, request, authority)
        with self._write() as database:
            database.execute(
                "update tokens set used=?, request=? where digest=?",
                (time.time(), asked, _digest(token)),
            )
        return certificate

    def renew(self, peer: bytes, request: bytes, authority: Authority) -> x509.Certificate:
        """A new certificate for a node that has one.

        Raises:
            RefusedError: it has none, or was revoked.
        """
        return self.issue(self.identify(peer).name, request, authority)

    def identify(self, peer: bytes) -> EnrolledNode:
        """Which node a certificate (PEM, already verified by TLS) belongs to.

        Raises:
            RefusedError: none, or one that was revoked.
        """
        self._trust()
        try:
            certificate = load_certificate(peer)
        except CertificateError as problem:
            raise RefusedError(str(problem)) from problem
        name = common_name(certificate)
        if name.startswith(TICKET_PREFIX):
            raise RefusedError("a join file's ticket can enrol a node, and nothing else")
        node = next((each for each in self.nodes() if each.name == name), None)
        if node is None:
            raise RefusedError(f"no node {name!r} is enrolled here; run: umbel nodes add {name}")
        if node.revoked is not None:
            raise RefusedError(f"node {name} was revoked by the operator")
        serial = str(certificate.serial_number)
        known = self._read("select 1 from certificates where serial=? and name=?", (serial, name))
        if not known and not self._own_certificate(name):
            raise RefusedError(f"this certificate of {name} was not issued here")
        return node

    # ---- what the server remembers

    def fact(self, name: str) -> Any:
        """A value that was kept under a name, or None."""
        rows = self._read("select value from facts where name=?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def keep(self, name: str, value: Any) -> None:
        """Keep a value under a name."""
        with self._write() as database:
            database.execute(_KEEP, (name, json.dumps(value)))

    @contextmanager
    def changed(self, name: str) -> Iterator[Fact]:
        """A kept value to change; no other process changes it meanwhile."""
        with self._write() as database:
            database.execute("begin immediate")
            rows = database.execute("select value from facts where name=?", (name,)).fetchall()
            fact = Fact(json.loads(rows[0][0]) if rows else None)
            yield fact
            database.execute(_KEEP, (name, json.dumps(fact.value)))

    def version(self) -> int:
        """A number that changes when another process has written."""
        return int(self._read("pragma data_version")[0][0])

    # ---- inside

    def _insert(self, name: str, *, own_certificate: bool) -> None:
        if not name or len(name) > 57 or not all(c.isalnum() or c in "-_." for c in name):
            raise ConfigError(
                f"{name!r} cannot be a node's name; use up to 57 letters, digits, '-', '_' and '.'"
            )
        for node in self.nodes():
            if node.name == name and node.revoked is not None:
                raise ConfigError(f"node {name} was revoked; enrol the machine under a new name")
        with self._write() as database:
            database.execute(
                "insert into nodes (node_id, name, created, own_certificate) values"
                " ((select coalesce(max(node_id), ?) + 1 from nodes), ?, ?, ?)"
                " on conflict(name) do update set own_certificate="
                "max(own_certificate, excluded.own_certificate)",
                (FIRST_NODE_ID - 1, name, time.time(), int(own_certificate)),
            )

    def issue(
        self, name: str, request: bytes, authority: Authority, *, days: float = NODE_DAYS
    ) -> x509.Certificate:
        """A certificate for a node's signing request, remembered.

        Raises:
            RefusedError: the node was revoked, or the request is no good.
        """
        for node in self.nodes():
            if node.name == name and node.revoked is not None:
                raise RefusedError(f"node {name} was revoked by the operator")
        try:
            certificate = sign_request(authority, request, name, days)
        except CertificateError as problem:
            raise RefusedError(str(problem)) from problem
        row = (
            str(certificate.serial_number),
            name,
            time.time(),
            certificate.not_valid_after_utc.timestamp(),
            _openssh(certificate),
        )
        with self._write() as database:
            database.execute("insert into certificates values (?, ?, ?, ?, ?)", row)
        return certificate

    def _own_certificate(self, name: str) -> bool:
        return bool(self._read("select 1 from nodes where name=? and own_certificate", (name,)))

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._database.execute(query, values).fetchall()
            except sqlite3.Error as problem:
                raise RunError(_unusable(self.path, problem)) from problem

    def _checkpoint(self) -> None:
        """Move what was written from the log into the file; a reader may put it off."""
        with suppress(sqlite3.OperationalError):
            self._database.execute("pragma wal_checkpoint(truncate)")

    def _trust(self) -> None:
        if self.fault():
            raise RunError(self.fault())

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                with self._database:
                    yield self._database
                self._checkpoint()
        except sqlite3.Error as problem:
            raise RunError(_unusable(self.path, problem)) from problem


def _peer_name(peer: bytes) -> str:
    try:
        return common_name(load_certificate(peer))
    except CertificateError as problem:
        raise RefusedError(str(problem)) from problem


def _openssh(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _key_digest(request: bytes) -> str:
    """Of the key that is to be certified; signatures over it differ each time."""
    try:
        key = requested_key(request)
    except CertificateError as problem:
        raise RefusedError(str(problem)) from problem
    data = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return hashlib.sha256(data).hexdigest()


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced (the first two) or written to."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _unusable(path: Path, problem: object) -> str:
    text = str(problem)
    if "full" in text or "disk I/O" in text or "No space" in text:
        return f"{path} cannot be written ({text}); make room on its disk and start again"
    if "locked" in text:
        return f"{path} is locked by another process; wait for it or stop it"
    if "malformed" in text or "not a database" in text or "***" in text:
        return f"{path} is damaged ({text[:200]}); put back a copy of it, or enrol anew elsewhere"
    return f"{path} cannot be used: {text}"
