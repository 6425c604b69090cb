"""A node's own policy: read from its file, and the identities that it accepts."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from umbel.core.errors import ConfigError
from umbel.privacy.masking import keys
from umbel.privacy.masking.session import Member
from umbel.strategies.policy.reading import load_policy
from umbel.strategies.secure.policy import Policy, RefusalError, fingerprint
from umbel.transport.certificates import (
    load_certificate,
    load_key,
    make_request,
    new_key,
    open_authority,
    sign_request,
)


def member(node: int, identity: bytes, certificate: bytes = b"") -> Member:
    return Member(node, bytes(32), bytes(32), identity, certificate, b"")


def fresh() -> bytes:
    return keys.public_identity(keys.signing_key(keys.new_signing_key()))


def test_a_policy_file_sets_every_limit(tmp_path: Path) -> None:
    identity = fresh()
    (tmp_path / "roster.txt").write_text(f"# who\nclinic-a {fingerprint(identity).upper()}\n")
    file = tmp_path / "policy.toml"
    file.write_text(
        'mode = "malicious"\nmin-cohort = 20\nmin-neighbours = 30\nbits = [16, 32]\n'
        'max-norm = 2.5\nmin-noise = 1\nroster = "roster.txt"\n'
    )
    whole = load_policy(file)
    policy = whole.sums
    assert (policy.mode, policy.min_cohort, policy.min_neighbours) == ("malicious", 20, 30)
    assert (policy.bits, whole.max_norm, whole.min_noise) == ((16, 32), 2.5, 1)
    assert policy.check_identities([member(1, identity)], {}) == "roster-file"
    with pytest.raises(RefusalError, match="node 2 is not in the roster file"):
        policy.check_identities([member(1, identity), member(2, fresh())], {})


@pytest.mark.parametrize(
    "text",
    [
        "min-cohort = 'five'",
        "min-cohorts = 5",
        "mode = 'honest'",
        "bits = [20]",
        "bits = [30, 20]",
        "max-norm = 0",
        "min-noise = true",
        "roster = 3",
        "roster = 'none.txt'",
        "authority = 'none.pem'",
        "not toml",
    ],
)
def test_a_policy_that_cannot_be_read_stops_the_node(tmp_path: Path, text: str) -> None:
    """A typing error must never mean a weaker policy."""
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_policy(file)
    with pytest.raises(ConfigError):
        load_policy(tmp_path / "missing.toml")


def test_a_roster_file_with_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "roster.txt").write_text("clinic-a 1234\n")
    (tmp_path / "policy.toml").write_text('roster = "roster.txt"')
    with pytest.raises(ConfigError, match="clinic-a 1234"):
        load_policy(tmp_path / "policy.toml")


def certified(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    """Identity, certificate and authority of a node that has enrolled."""
    authority = open_authority(folder)
    key = new_key()
    certificate = sign_request(authority, make_request(key, name), name)
    private = load_key(key)
    identity = keys.public_identity(private)  # type: ignore[arg-type]
    der = serialization.Encoding.DER
    root = load_certificate(authority.pem).public_bytes(der)
    return identity, certificate.public_bytes(der), root


def test_members_need_a_certificate_of_the_authority(tmp_path: Path) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir(mode=0o700)
    identity, certificate, root = certified(tmp_path / "ours", "clinic-a")
    other, foreign, _ = certified(tmp_path / "theirs", "clinic-b")
    policy = Policy(authority=root)
    assert policy.check_identities([member(1, identity, certificate)], {}) == "authority"
    for bad in (
        member(2, other, foreign),  # of another authority
        member(2, identity, b""),  # of none
        member(2, fresh(), certificate),  # somebody else's certificate
        member(2, identity, certificate[:-3]),
    ):
        with pytest.raises(RefusalError, match="no valid certificate"):
            policy.check_identities([bad], {})
    assert x509.load_der_x509_certificate(certificate).subject is not None


def test_identities_are_pinned_on_first_use() -> None:
    first, second, pins = fresh(), fresh(), dict[int, bytes]()
    policy = Policy()
    assert policy.check_identities([member(1, first), member(2, second)], pins) == "first-use"
    assert policy.check_identities([member(1, first)], pins) == "first-use"
    with pytest.raises(RefusalError, match="another key than before"):
        policy.check_identities([member(1, second)], pins)
