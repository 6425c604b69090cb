"""Enrolment, renewal and own certificates, from the node's side, against a real listener."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from umbel.clients.process.membership import Membership
from umbel.clients.process.start import StartSettings, enrolled
from umbel.core.errors import ConfigError, RunError
from umbel.server.link.service import ServerSettings, identities, server_names
from umbel.transport.certificates import (
    Identity,
    covers,
    load_certificate,
    make_request,
    new_key,
    open_authority,
    save_identity,
    sign_request,
)
from umbel.transport.join import read_join_file, write_join_file
from umbel.transport.keyfiles import write_secret


def join(lab: Any, folder: Path, name: str = "n1", valid_s: float = 3600) -> Path:
    file = folder / f"{name}.join"
    write_join_file(file, lab.enrolment.add(name, lab.authority, lab.address, valid_s))
    return file


def test_a_node_enrols_with_a_key_that_it_made_itself(lab: Any, tmp_path: Path) -> None:
    file = join(lab, tmp_path)
    membership = Membership(tmp_path / "node")
    try:
        app = tmp_path / "app"
        start = StartSettings(tmp_path / "node", app, file, {"partition-id": 2})
        settings = asyncio.run(enrolled(membership, start))
        assert (settings.name, settings.address) == ("n1", lab.address)
        assert membership.settings() == settings
        identity = membership.identity(settings)
        assert identity is not None and identity.root == lab.authority.pem
        modes = {
            path.name: path.stat().st_mode & 0o077
            for path in (tmp_path / "node").iterdir()
            if path.suffix in (".pem", ".key", ".json")
        }
        assert modes == {"identity.pem": 0, "node.json": 0}
        secrets = [file.read_bytes() for file in lab.state.iterdir() if file.is_file()]
        assert not any(identity.key.splitlines()[1] in each for each in secrets)
        # The join file is spent, and not needed: later starts know everything.
        again = asyncio.run(enrolled(membership, StartSettings(tmp_path / "node")))
        assert again == settings
    finally:
        membership.close()


def test_a_second_node_cannot_use_the_same_join_file(lab: Any, tmp_path: Path) -> None:
    file = join(lab, tmp_path)
    for name, fits in (("one", True), ("two", False)):
        membership = Membership(tmp_path / name)
        try:
            if fits:
                asyncio.run(membership.enrol(file))
            else:
                with pytest.raises(ConfigError, match="refuses: the token of n1 was used"):
                    asyncio.run(membership.enrol(file))
        finally:
            membership.close()


def test_an_answer_that_was_lost_can_be_asked_for_again(lab: Any, tmp_path: Path) -> None:
    file = join(lab, tmp_path)
    membership = Membership(tmp_path / "node")
    try:
        settings = asyncio.run(membership.enrol(file))
        identity = membership.identity(settings)
        assert identity is not None
        # As if the node had been killed before it could write the certificate down.
        (tmp_path / "node" / "identity.pem").unlink()
        root = read_join_file(file).root_fingerprint
        write_secret(tmp_path / "node" / f"joining-{root[:16]}.key", identity.key)
        assert asyncio.run(membership.enrol(file)).name == "n1"
    finally:
        membership.close()


def test_a_certificate_is_renewed_in_its_last_third_with_a_new_key(
    lab: Any, tmp_path: Path
) -> None:
    file = join(lab, tmp_path)
    membership = Membership(tmp_path / "node")
    try:
        settings = asyncio.run(membership.enrol(file))
        young = membership.identity(settings)
        assert young is not None
        assert not asyncio.run(membership.renew_if_due(settings, young))
        key = new_key()
        old = lab.enrolment.issue("n1", make_request(key, "n1"), lab.authority, days=0.3)
        aged = Identity(old.public_bytes(Encoding.PEM), key, young.root)
        save_identity(tmp_path / "node" / "identity.pem", aged)
        assert asyncio.run(membership.renew_if_due(settings, aged))
        new = membership.identity(settings)
        assert new is not None and new.key not in (young.key, aged.key)
        assert lab.peer(new).connect().welcome.name == "n1"
        lab.enrolment.revoke("n1")
        with pytest.raises(ConfigError, match="was revoked"):
            asyncio.run(membership.renew_if_due(settings, aged))
    finally:
        membership.close()


def test_a_node_that_was_away_for_too_long_says_so_and_joins_again(
    lab: Any, tmp_path: Path
) -> None:
    file = join(lab, tmp_path)
    membership = Membership(tmp_path / "node")
    try:
        start = StartSettings(tmp_path / "node", tmp_path / "app", file)
        settings = asyncio.run(enrolled(membership, start))
        key = new_key()
        old = lab.enrolment.issue("n1", make_request(key, "n1"), lab.authority, days=-0.01)
        gone = Identity(old.public_bytes(Encoding.PEM), key, lab.authority.pem)
        save_identity(tmp_path / "node" / "identity.pem", gone)
        with pytest.raises(ConfigError, match=r"of node n1 expired on .*umbel nodes add n1"):
            membership.identity(settings)
        with pytest.raises(ConfigError, match="was used"):
            asyncio.run(enrolled(membership, start))
        again = StartSettings(tmp_path / "node", join=join(lab, tmp_path))
        assert asyncio.run(enrolled(membership, again)) == settings
        fresh = membership.identity(settings)
        assert fresh is not None and lab.peer(fresh).connect().welcome.name == "n1"
    finally:
        membership.close()


def test_certificates_brought_along_are_admitted_by_name(lab: Any) -> None:
    key = new_key()
    signed = sign_request(lab.authority, make_request(key, "own"), "own")
    identity = Identity(signed.public_bytes(Encoding.PEM), key, lab.authority.pem)
    peer = lab.peer(identity)
    with pytest.raises(Exception, match="no node 'own' is enrolled"):
        peer.connect()
    lab.enrolment.register("own")
    assert lab.peer(identity).connect().welcome.name == "own"


def test_nobody_listens(tmp_path: Path, lab: Any) -> None:
    file = join(lab, tmp_path)
    lab.listener.stop(for_good=False)
    membership = Membership(tmp_path / "node")
    try:
        with pytest.raises(RunError, match="cannot be reached"):
            asyncio.run(membership.enrol(file))
    finally:
        membership.close()


def test_the_servers_certificate_follows_its_names(tmp_path: Path) -> None:
    first = ServerSettings(tmp_path, listen="127.0.0.1:1", names=("hub.example",))
    authority, identity = identities(first)
    assert authority is not None
    again = identities(ServerSettings(tmp_path, listen="127.0.0.1:1"))[1]
    assert again == identity  # names are remembered
    more = identities(ServerSettings(tmp_path, names=("192.0.2.1",)))[1]
    assert more != identity
    wanted = ["hub.example", "192.0.2.1", "localhost", "127.0.0.1"]
    assert covers(load_certificate(more.certificate), wanted)
    assert set(wanted) <= set(server_names(ServerSettings(tmp_path)))
    assert open_authority(tmp_path).pem == more.root
