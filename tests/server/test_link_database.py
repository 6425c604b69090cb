"""The federation's database: copies of it, others in its place, and what it is beside."""

import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.conftest import eventually
from umbel.core.errors import ConfigError
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.service import ServerSettings, identities
from umbel.transport.certificates import make_request, new_key, open_authority


def test_a_plain_copy_of_the_file_while_it_is_in_use_has_all_enrolments(
    lab: Any, tmp_path: Path
) -> None:
    lab.node("n1")
    lab.enrolment.revoke("n1")
    lab.identity("n2")
    (tmp_path / "copy").mkdir()
    shutil.copy(lab.state / "umbel.sqlite", tmp_path / "copy")
    copied = Enrolment(tmp_path / "copy")
    try:
        assert [(node.name, node.enrolled) for node in copied.nodes()] == [
            ("n1", True),
            ("n2", True),
        ]
        assert copied.nodes()[0].revoked is not None and len(copied.public_keys()) == 1
    finally:
        copied.close()


@pytest.mark.parametrize("how", ["damaged", "another", "older copy", "removed"])
def test_a_database_that_is_changed_under_a_running_server_lets_nobody_in(
    how: str, lab: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = lab.state / "umbel.sqlite"
    identity = lab.identity("n1")
    shutil.copy(file, tmp_path / "old.sqlite")
    here = lab.node("here", instance="2")
    lab.enrolment.revoke("n1")
    if how == "damaged":
        data = bytearray(file.read_bytes())
        data[200:] = bytes(len(data) - 200)
        file.write_bytes(data)
    elif how == "another":
        other = Enrolment(tmp_path / "other")
        other.close()
        shutil.copy(tmp_path / "other" / "umbel.sqlite", file)
    elif how == "older copy":  # which does not know of the revocation
        (tmp_path / "old.sqlite").rename(file)
    else:
        file.unlink()
    eventually(lambda: "until then nobody is let in" in caplog.text)
    words = {"damaged": "damaged", "another": "another database", "older copy": "by a copy"}
    assert words.get(how, "is gone") in caplog.text
    with pytest.raises(grpc.RpcError) as refused:
        lab.peer(identity).connect()
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert lab.hub.connected() == 1, "who was here stays"
    del here


def test_an_empty_database_beside_an_authority_is_refused(tmp_path: Path) -> None:
    settings = ServerSettings(tmp_path)
    identities(settings)
    opened = Enrolment(tmp_path)
    opened.add("n1", opened.authority(), "localhost:1")
    opened.close()
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path, kept)
    for file in tmp_path.glob("umbel.sqlite*"):
        file.unlink()
    with pytest.raises(ConfigError, match="is new or empty: put back a copy of the database"):
        identities(settings)
    shutil.copy(kept / "umbel.sqlite", tmp_path)
    assert identities(settings)[0] is not None
    (tmp_path / "authority.pem").unlink()
    with pytest.raises(ConfigError, match="is missing: put back a copy of it"):
        identities(settings)
    open_authority(tmp_path)
    with pytest.raises(ConfigError, match="put back the copies that belong together"):
        identities(settings)


def test_a_start_that_was_killed_while_the_authority_was_made_goes_on(tmp_path: Path) -> None:
    opened = Enrolment(tmp_path)
    opened.keep("authority", "being made")
    opened.close()
    assert identities(ServerSettings(tmp_path))[0] is not None
    again = Enrolment(tmp_path)
    again.keep("authority", "being made")  # killed after the file, before the fact
    again.close()
    authority = identities(ServerSettings(tmp_path))[0]
    assert authority is not None


def test_a_database_of_before_knows_its_authority_from_then_on(tmp_path: Path) -> None:
    """One that was made without a number and without its authority's fingerprint."""
    authority = open_authority(tmp_path)
    opened = Enrolment(tmp_path)
    opened.add("n1", authority, "localhost:1")
    opened.issue("n1", make_request(new_key(), "n1"), authority)
    assert opened.fact("authority") is None
    assert opened.authority().pem == authority.pem
    assert opened.fact("authority") is not None
    opened.close()
