"""`umbel doctor`: each finding is of the real thing, and a fault has its cure."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

from umbel.clients.process.membership import Membership
from umbel.doctor import Finding, examine
from umbel.transport.join import write_join_file


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def joined(lab: Any, folder: Path) -> Path:
    """The state of a node that has enrolled at the laboratory's coordinator."""
    file = folder / "n1.join"
    write_join_file(file, lab.enrolment.add("n1", lab.authority, lab.address))
    membership = Membership(folder / "node")
    try:
        settings = asyncio.run(membership.enrol(file))
        app = folder / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text("")
        membership.remember(dataclasses.replace(settings, app=str(app)))
    finally:
        membership.close()
    return folder / "node"


def faults(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.state == "fault"]


def test_a_sound_coordinator_and_a_sound_node(lab: Any, tmp_path: Path) -> None:
    assert faults(examine(lab.state)) == []
    found = examine(joined(lab, tmp_path))
    assert faults(found) == []
    assert by_name(found)["coordinator"].said == "mutual TLS and a call went through"
    assert all(finding.cure for finding in found if finding.state != "ok")


def test_every_fault_of_a_node_has_a_name_and_a_cure(lab: Any, tmp_path: Path) -> None:
    state = joined(lab, tmp_path)
    settings = json.loads((state / "node.json").read_text())

    def with_(**changes: Any) -> dict[str, Finding]:
        (state / "node.json").write_text(json.dumps({**settings, **changes}))
        return by_name(examine(state))

    assert with_(address="no.such.name.invalid:7443")["name"].state == "fault"
    assert with_(address="127.0.0.1:1")["port"].state == "fault"
    assert "no app in /nowhere" in with_(app="/nowhere")["app"].said
    with_()
    (state / "identity.pem").chmod(0o644)
    found = by_name(examine(state))
    assert found["permissions"].cure == f"chmod go= {state / 'identity.pem'}"
    assert found["certificate"].state == "fault"
    (state / "identity.pem").chmod(0o600)
    (state / "identity.pem").write_text("no certificate")
    assert by_name(examine(state))["certificate"].state == "fault"


def test_a_node_of_another_federation_is_told(lab: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    from tests.server.conftest import Lab

    second = Lab(other)
    try:
        state = joined(lab, tmp_path)
        settings = json.loads((state / "node.json").read_text())
        settings["address"] = second.address
        (state / "node.json").write_text(json.dumps(settings))
        found = by_name(examine(state))["coordinator"]
    finally:
        second.close()
    assert found.state == "fault" and "not the coordinator of this federation" in found.said


def test_a_damaged_database_and_a_folder_that_is_neither(lab: Any, tmp_path: Path) -> None:
    ledger = lab.state / "populations" / "people.sqlite"
    ledger.parent.mkdir()
    ledger.write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    assert by_name(examine(lab.state))["people.sqlite"].state == "fault"
    assert faults(examine(tmp_path / "nowhere"))[-1] == "state"
