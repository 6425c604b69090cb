"""Join files: what an operator hands to a node so that it can enrol, once, before a date.

A join file is a secret like a password: it holds the coordinator's address, the authority's
certificate with its fingerprint (read it out over the telephone if you like), a one-time token,
and a short-lived ticket certificate, so that even the first connection is mutual TLS. The
node's own key is made on the node and never travels.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umbel.transport.certificates import (
    CertificateError,
    Identity,
    fingerprint,
    load_certificate,
)
from umbel.transport.keyfiles import KeyFileError, read_secret, write_secret

_FORMAT = "umbel-join-1"


class JoinError(Exception):
    """A join file that cannot be used."""


@dataclass(frozen=True)
class JoinFile:
    """The content of a join file.

    Attributes:
        name: of the node.
        address: HOST:PORT of the coordinator.
        token: spent by the first enrolment.
        expires: seconds since 1970, by the coordinator's clock.
        root: the authority's certificate, PEM.
        root_fingerprint: SHA-256 of it.
        ticket: certificate for the enrolment call alone, PEM.
        ticket_key: its key, PEM.
    """

    name: str
    address: str
    token: str
    expires: float
    root: str
    root_fingerprint: str
    ticket: str
    ticket_key: str

    @property
    def identity(self) -> Identity:
        """What the enrolment call is made with."""
        return Identity(self.ticket.encode(), self.ticket_key.encode(), self.root.encode())


def make_join_file(name: str, address: str, expires: float, ticket: Identity) -> JoinFile:
    """A join file with a new token."""
    return JoinFile(
        name=name,
        address=address,
        token=secrets.token_urlsafe(32),
        expires=expires,
        root=ticket.root.decode(),
        root_fingerprint=fingerprint(load_certificate(ticket.root)),
        ticket=ticket.certificate.decode(),
        ticket_key=ticket.key.decode(),
    )


def write_join_file(path: Path, join: JoinFile) -> None:
    """Write a join file, mode 0600."""
    write_secret(path, json.dumps({"format": _FORMAT, **asdict(join)}, indent=1).encode() + b"\n")


def read_join_file(path: Path) -> JoinFile:
    """Read a join file.

    Raises:
        JoinError: missing, open to others, damaged, or its fingerprint is another's.
    """
    try:
        fields: Any = json.loads(read_secret(path))
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError("it is not of the format " + _FORMAT)
        join = JoinFile(**fields)
        for field, kind in JoinFile.__annotations__.items():
            if not isinstance(getattr(join, field), (int, float) if kind is float else str):
                raise ValueError(f"its {field} is not a {kind.__name__}")
        root = load_certificate(join.root.encode())
    except KeyFileError as problem:
        raise JoinError(str(problem)) from problem
    except (ValueError, TypeError, CertificateError) as problem:
        raise JoinError(
            f"{path} is not a join file ({problem}); make one with: umbel nodes add NAME"
        ) from problem
    if fingerprint(root) != join.root_fingerprint:
        raise JoinError(f"{path} was changed: the authority in it has another fingerprint")
    return join
