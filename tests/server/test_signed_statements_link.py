"""Record-level certificates of real nodes: what each has signed with its enrolled key."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.server.test_node_ledger_link import APP
from tests.server.test_standalone import FILE
from umbel.server.private.verify import check, schema

NAMES = ("ada", "bob")


def public_key_of(file: Path) -> bytes:
    """The public key of a node's enrolled certificate."""
    certificate = x509.load_pem_x509_certificates(file.read_bytes())[0]
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_nodes_of_a_link_sign_what_their_records_have_spent(processes: Any) -> None:
    processes.write_app(APP, "rounds = 3\nbatch-size = 10\nexample-epsilon = 0.5")
    processes.invite(*NAMES)
    processes.server("--nodes", "2")
    for at, name in enumerate(NAMES):
        processes.node(name, "--node-config", f"partition-id={at} num-partitions=2")
    assert processes.wait("server") == 0, processes.log("server")
    run = Path(processes.result()["run"])
    certificate = json.loads((run / "certificate.json").read_text())
    jsonschema.validate(certificate, schema())
    rows = {row["node"]: row for row in certificate["statements"]["nodes"]}
    assert sorted(rows) == sorted(NAMES) and certificate["statements"]["without"] == []
    for name, row in rows.items():
        # The key is that of the node's certificate, and the number that of its own ledger.
        key = base64.b64decode(row["key"])
        assert row["signed"] and key == public_key_of(processes.folder / name / "identity.pem")
        said = processes.umbel("client", "budget", "--state", name, "--json").stdout
        (own,) = [
            each for each in json.loads(said.splitlines()[-1])["budget"] if each["scope"] == "data"
        ]
        assert row["epsilon"] == own["epsilon"] and row["participations"] == 3
    card = (run / "MODEL_CARD.md").read_text()
    assert "Each record (such as one patient's) at each of the 2 nodes" in card
    # Whoever has published the coordinator's key can check it, with Umbel and without.
    hub = processes.folder / "hub.pub"
    hub.write_text(processes.umbel("key", "--state", "state").stdout)
    said = processes.umbel("verify", str(run), "--key", "hub.pub").stdout
    assert said.startswith("signed by the coordinator whose key was given")
    assert "for: each record" in said and said.rstrip().endswith("the certificate holds")
    assert alone(run, "--key", str(hub)).returncode == 0
    # A coordinator that makes a node's number smaller has no signature of the node for it.
    file = run / "statements.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    body = json.loads(lines[0]["statement"])
    body["epsilon"] = body["epsilon"] / 2
    lines[0]["statement"] = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = f"the statement of node {lines[0]['node']!r} is not signed with the key it names"
    assert named in check(run).problems
    found = alone(run, "--key", str(hub))
    assert found.returncode == 3 and named in found.stdout + found.stderr
    wrong = base64.b64encode(hashlib.sha256(b"another coordinator").digest()).decode()
    assert (
        "the certificate is signed with another key than the one given"
        in check(run, key=wrong).problems
    )


def alone(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The verifier that needs nothing of Umbel."""
    command = [sys.executable, str(FILE), str(run), *words]
    return subprocess.run(command, capture_output=True, text=True)
