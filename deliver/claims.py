"""What a run promised, carried along with its model, and what is left of it after each step.

Whatever is made of a released model without the nodes' data is post-processing, and the promise
holds for it as it does for the model (Dwork and Roth 2014, proposition 2.1). A step that saw the
nodes' data again is charged to their ledger by the run that it is, and has a promise of its own.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umbel.core.errors import UmbelError
from umbel.core.files import sha256
from umbel.deliver.parcel import CLAIMS, FILE, Step, contents
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import loads_strictly
from umbel.server.private.certificate import CARD, signed_text
from umbel.server.private.coordinator_key import coordinator_key, key_path, public_text, sign
from umbel.server.private.population import state_of


def copy_claims(run: RunDirectory, folder: Path) -> Mapping[str, Any] | None:
    """Copy what is public of a certified run; its certificate, or None where it has none."""
    place = folder / CLAIMS
    place.mkdir()
    shutil.copy(run.model_path, place / run.model_path.name)
    if not run.certificate_path.is_file():
        return None
    shutil.copy(run.certificate_path, place / run.certificate_path.name)
    if (run.path / CARD).is_file():
        shutil.copy(run.path / CARD, place / CARD)
    found: Mapping[str, Any] = loads_strictly(run.certificate_path.read_bytes())
    return found


def sentence(certificate: Mapping[str, Any] | None, steps: Sequence[Step]) -> str:
    """What a card says of the run's promise."""
    if certificate is None:
        return "The run promised no privacy, so nothing is promised of this file either."
    seen = [step for step in steps if step.private]
    if seen:
        return (
            f"The step {seen[0].what} saw the nodes' data again: it was charged to their ledger, "
            "and the promise of this file is that of the certificate in `claims/`, which counts it."
        )
    shown = [step for step in steps if step.data != "none"]
    if shown:
        return (
            f"The step {shown[0].what} saw examples ({shown[0].data}) that the promise is not "
            "about, and none of the nodes' data: the run's promise to the nodes holds for this "
            "file as well."
        )
    return (
        "Every step is post-processing of the released model, without any data: the run's promise "
        "holds for this file as well."
    )


def seal_delivery(folder: Path, body: Mapping[str, Any], run: RunDirectory) -> dict[str, Any]:
    """Write `delivery.json`, signed where this machine is the coordinator of the run."""
    whole: dict[str, Any] = {**body, "files": contents(folder)}
    state = state_of(run)
    if run.certificate_path.is_file() and key_path(state).is_file():
        try:
            key = coordinator_key(state)
            certificate = loads_strictly(run.certificate_path.read_bytes())
            if certificate.get("key") == public_text(key):
                whole["key"] = public_text(key)
                whole["signature"] = sign(key, delivered_text(whole))
        except (UmbelError, OSError, ValueError):
            pass  # not signed, which `umbel verify` says
    text = json.dumps(whole, indent=2) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
    return whole


def delivered_text(body: Mapping[str, Any]) -> bytes:
    """What the signature of a delivery is over; no certificate and no seal has these bytes."""
    return b"umbel-delivery:" + signed_text(body)


def certified_model(folder: Path) -> Path:
    """Where a delivery keeps the run's model."""
    return folder / CLAIMS / "model.safetensors"


def model_hash(run: RunDirectory) -> str:
    """SHA-256 of a run's model."""
    return sha256(run.model_path)
