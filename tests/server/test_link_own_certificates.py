"""A federation whose certificates come from an authority of its own, end to end."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.server.small_federation import expected, wait_for, weights


@dataclass(frozen=True)
class Company:
    """An authority with an intermediate one, RSA throughout, as companies have them."""

    folder: Path
    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    @classmethod
    def found(cls, folder: Path) -> "Company":
        root_key, key = new_key(), new_key()
        root = build("Root", root_key, "Root", root_key, ca=True)
        middle = build("Middle", key, "Root", root_key, ca=True)
        (folder / "root.crt").write_bytes(root.public_bytes(Encoding.PEM))
        return cls(folder, key, middle)

    def issue(self, name: str, *names: x509.GeneralName) -> tuple[str, ...]:
        """The command line's words for a new certificate (with its chain) and its key."""
        key = new_key()
        leaf = build(name, key, "Middle", self.key, names=names)
        chain = leaf.public_bytes(Encoding.PEM) + self.certificate.public_bytes(Encoding.PEM)
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        files[0].write_bytes(chain)
        files[1].touch(mode=0o600)
        form = Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
        files[1].write_bytes(key.private_bytes(*form))
        words = {"--certificate": files[0], "--key": files[1], "--root": self.folder / "root.crt"}
        return tuple(str(word) for pair in words.items() for word in pair)


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def build(
    subject: str,
    key: rsa.RSAPrivateKey,
    issuer: str,
    issuer_key: rsa.RSAPrivateKey,
    *,
    ca: bool = False,
    names: tuple[x509.GeneralName, ...] = (),
) -> x509.Certificate:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.mark.slow
def test_server_and_nodes_with_certificates_of_their_own_train_and_are_revoked(
    federation: Any,
) -> None:
    company = Company.found(federation.folder)
    for name in ("n1", "n2"):
        federation.umbel("nodes", "add", name, "--state", "state", "--own-certificate")
    own = company.issue("hub", x509.DNSName("localhost"))
    federation.server(*own, "--serve", "-c", "rounds=2")
    address = ("--address", f"localhost:{federation.port}")
    for number, name in enumerate(("n1", "n2")):
        words = ("--node-config", f"partition-id={number} num-partitions=2", "--threads", "1")
        own = company.issue(name)
        federation.start(name, "client", "app", "--state", name, *own, *address, *words)
    wait_for(federation, federation.result)
    assert np.array_equal(weights(federation.result()), expected(federation, options="rounds=2"))
    assert not list(federation.folder.rglob("authority.pem"))

    federation.running["n1"].terminate()
    assert federation.wait("n1") == 0
    federation.start("n1", "client", "--state", "n1", "--threads", "1")  # it remembers the rest
    wait_for(federation, lambda: federation.log("n1").count("connected to localhost") == 2)
    federation.umbel("nodes", "revoke", "n2", "--state", "state")
    wait_for(federation, lambda: "was revoked; asking again" in federation.log("n2"))
    assert federation.running["n2"].poll() is None

    # A certificate of the same authority, whose name was not admitted, stays outside.
    stranger = company.issue("n3")
    federation.start("n3", "client", "app", "--state", "n3", "--give-up", *stranger, *address)
    assert federation.wait("n3") == 2
    assert "no node 'n3' is enrolled" in federation.log("n3").splitlines()[-1]
