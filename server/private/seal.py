"""What is made of a certified run afterwards: its result, its report and the report's drawings.

    seal.json   SHA-256 of certificate.json, result.json, report.html and *.png, signed by the
                coordinator

A report can be drawn again at any time, by anyone; a certificate stays as it was issued. So the
pages have a signature of their own, which the coordinator renews whenever it draws them, and which
nobody else can: a page that was changed, or drawn elsewhere, is not the coordinator's.
"""

from collections.abc import Mapping
from typing import Any

from umbel.core.errors import UmbelError
from umbel.core.files import sha256
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import loads_strictly
from umbel.server.private.certificate import hashes, signed_text
from umbel.server.private.coordinator_key import (
    coordinator_key,
    key_path,
    public_text,
    sign,
    signed_by,
)
from umbel.server.private.population import state_of

SEAL = "seal.json"


def pages(run: RunDirectory) -> dict[str, str]:
    """SHA-256 of the files that a seal covers, as far as a run has them."""
    names = ["result.json", "report.html", *sorted(path.name for path in run.path.glob("*.png"))]
    return {name: sha256(run.path / name) for name in names if (run.path / name).is_file()}


def seal(run: RunDirectory) -> bool:
    """Sign the pages of a certified run; whether they are signed now.

    A run without a certificate needs no seal, and says True. False where this is not the
    coordinator that issued the certificate, or where what it covers is not what it was.
    """
    if not run.certificate_path.is_file():
        return True
    state = state_of(run)
    if not key_path(state).is_file():
        return False
    try:
        key = coordinator_key(state)
        certificate = loads_strictly(run.certificate_path.read_bytes())
        own = certificate["key"] == public_text(key)
        whole = signed_by(certificate["key"], certificate["signature"], signed_text(certificate))
        unchanged = certificate["files"] == hashes(run)
    except (UmbelError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if not (own and whole and unchanged):
        return False
    body: dict[str, Any] = {
        "certificate": sha256(run.certificate_path),
        "files": pages(run),
        "key": public_text(key),
    }
    run.write_json(SEAL, {**body, "signature": sign(key, sealed_text(body))})
    return True


def sealed_text(body: Mapping[str, Any]) -> bytes:
    """What a seal's signature is over; no certificate has these bytes."""
    return b"umbel-seal:" + signed_text(body)
