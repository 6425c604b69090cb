"""Certificates, keys and join files."""

import base64
import datetime
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel.transport.certificates import (
    CertificateError,
    Identity,
    common_name,
    covers,
    fingerprint,
    load_certificate,
    load_identity,
    make_request,
    make_server_identity,
    make_ticket,
    new_key,
    open_authority,
    read_identity,
    renewal_due,
    save_identity,
    sign_request,
)
from umbel.transport.join import JoinError, make_join_file, read_join_file, write_join_file
from umbel.transport.keyfiles import KeyFileError, read_secret, write_secret


def test_the_authority_is_made_once_and_its_key_is_the_owners(tmp_path: Path) -> None:
    first = open_authority(tmp_path)
    again = open_authority(tmp_path)
    assert fingerprint(first.certificate) == fingerprint(again.certificate)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"authority.pem": 0o600}


def test_a_server_certificate_carries_dns_names_and_addresses(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    identity = make_server_identity(authority, ["hub.example", "192.0.2.7", "::1"])
    certificate = load_certificate(identity.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    assert covers(certificate, ["hub.example", "::1"]) and not covers(certificate, ["other"])
    certificate.verify_directly_issued_by(authority.certificate)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_nodes_key_stays_and_its_certificate_says_the_authoritys_name(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    key = new_key()
    certificate = sign_request(authority, make_request(key, "i-say-i-am-root"), "clinic-1")
    assert common_name(certificate) == "clinic-1"
    certificate.verify_directly_issued_by(authority.certificate)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert b"PRIVATE" not in make_request(key, "x")


def test_requests_that_are_damaged_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    other = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    foreign = builder.sign(other, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    good = x509.load_pem_x509_csr(make_request(new_key(), "x"))
    forged = bytearray(good.public_bytes(serialization.Encoding.DER))
    forged[-1] ^= 1
    for request in (b"", b"hello", foreign):
        with pytest.raises(CertificateError):
            sign_request(authority, request, "x")

    body = base64.encodebytes(bytes(forged))
    wrapped = b"-----BEGIN CERTIFICATE REQUEST-----\n" + body
    wrapped += b"-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(CertificateError, match="not signed by its own key"):
        sign_request(authority, wrapped, "x")


def test_renewal_is_due_in_the_last_third(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    certificate = sign_request(authority, make_request(new_key(), "x"), "x", days=29)
    begins = certificate.not_valid_before_utc
    assert not renewal_due(certificate, begins + datetime.timedelta(days=19))
    assert renewal_due(certificate, begins + datetime.timedelta(days=21))


def test_an_identity_is_one_file_and_comes_back(tmp_path: Path) -> None:
    identity = make_server_identity(open_authority(tmp_path), ["localhost"])
    save_identity(tmp_path / "server.pem", identity)
    assert read_identity(tmp_path / "server.pem") == identity
    other = make_server_identity(open_authority(tmp_path), ["localhost"])
    mixed = Identity(identity.certificate, other.key, identity.root)
    save_identity(tmp_path / "mixed.pem", mixed)
    with pytest.raises(CertificateError, match="does not belong"):
        read_identity(tmp_path / "mixed.pem")
    write_secret(tmp_path / "half.pem", identity.key)
    with pytest.raises(CertificateError, match="damaged"):
        read_identity(tmp_path / "half.pem")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"secret")
    assert read_secret(tmp_path / "key") == b"secret"
    for mode in (0o640, 0o604, 0o644, 0o620):
        (tmp_path / "key").chmod(mode)
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_secret(tmp_path / "key")
    with pytest.raises(KeyFileError, match="there is no file"):
        read_secret(tmp_path / "none")


def bring(folder: Path, days: float = 9) -> tuple[Path, Path, Path]:
    authority = open_authority(folder)
    key = new_key()
    certificate = sign_request(authority, make_request(key, "own"), "own", days)
    (folder / "own.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "root.crt").write_bytes(authority.pem)
    write_secret(folder / "own.key", key)
    return folder / "own.crt", folder / "own.key", folder / "root.crt"


def test_own_certificates_are_checked_before_use(tmp_path: Path) -> None:
    certificate, key, root = bring(tmp_path)
    assert load_identity(certificate, key, root).root == root.read_bytes()
    write_secret(tmp_path / "other.key", new_key())
    with pytest.raises(CertificateError, match="does not belong"):
        load_identity(certificate, tmp_path / "other.key", root)
    with pytest.raises(CertificateError, match="cannot be read"):
        load_identity(tmp_path / "none", key, root)
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="lets others read"):
        load_identity(certificate, key, root)


def test_an_expired_own_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="expired on"):
        load_identity(*bring(tmp_path, days=-0.5))


def test_a_join_file_comes_back_and_its_changes_are_noticed(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    join = make_join_file("clinic-1", "hub:7443", 1e9, make_ticket(authority, "clinic-1", 1))
    file = tmp_path / "clinic-1.join"
    write_join_file(file, join)
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_join_file(file) == join
    assert len(join.token) >= 43
    other = open_authority(tmp_path / "other").pem.decode()
    for change in (
        {"root": other},
        {"root": "x"},
        {"token": 5},
        {"format": "x"},
        {"surprise": 1},
    ):
        write_secret(file, json.dumps(json.loads(read_secret(file)) | change).encode())
        with pytest.raises(JoinError):
            read_join_file(file)
        write_join_file(file, join)
    file.chmod(0o644)
    with pytest.raises(JoinError, match="lets others read"):
        read_join_file(file)
    for text in (b"", b"[]", b"{", b"\xff"):
        write_secret(file, text)
        with pytest.raises(JoinError, match=r"umbel nodes add"):
            read_join_file(file)
