"""Certificates of a federation: ECDSA P-256, made by its own authority or brought along.

    authority   signs; lives with the coordinator, in its state folder
    server      carries the DNS names and IP addresses that nodes connect to
    node        its subject's common name is the node's name; its key never leaves the node
    ticket      a short-lived certificate in a join file: it may enrol and nothing else

Validity begins a day in the past, so that a clock that is an hour off does no harm.
"""

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel.transport.keyfiles import KeyFileError, read_secret, write_secret

_BACKDATED = datetime.timedelta(days=1)
_AUTHORITY_DAYS = 3650
SERVER_DAYS = 365.0
NODE_DAYS = 90.0
TICKET_PREFIX = "ticket:"
_BLOCK = re.compile(rb"-----BEGIN [^-]+-----.+?-----END [^-]+-----\n?", re.DOTALL)
_LONGEST_NAME = 64  # of a common name in X.509


class CertificateError(Exception):
    """A certificate, request or key that cannot be used."""


class CertificateExpiredError(CertificateError):
    """A certificate whose time is over, by the clock of this machine."""


@dataclass(frozen=True)
class Identity:
    """A key and the certificate for it, both PEM.

    Attributes:
        certificate: the owner's, then those of intermediates if any.
        key: unencrypted PKCS #8 or SEC 1.
        root: the authority that the peer's certificate must come from.
    """

    certificate: bytes
    key: bytes
    root: bytes


@dataclass(frozen=True)
class Authority:
    """What signs the certificates of a federation."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def open_authority(folder: Path) -> Authority:
    """The authority in a folder; it is made where there is none.

    Raises:
        KeyFileError: the key is open to others.
        CertificateError: the file is damaged.
    """
    file = folder / "authority.pem"
    if not file.exists():
        _make_authority(file)
    identity = read_identity(file)
    key, certificate = load_key(identity.key), load_certificate(identity.certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{file} does not hold an elliptic-curve key")
    return Authority(certificate, key)


def make_server_identity(
    authority: Authority, names: Sequence[str], days: float = SERVER_DAYS
) -> Identity:
    """A new key and certificate for a server that is reached under `names` (DNS or IP)."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _issue(
        authority,
        key.public_key(),
        _first_name(names),
        days,
        ExtendedKeyUsageOID.SERVER_AUTH,
        names,
    )
    return Identity(_pem(certificate), key_pem(key), authority.pem)


def make_ticket(authority: Authority, name: str, days: float) -> Identity:
    """What a join file carries: a key and a certificate that may enrol `name` and no more."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = (TICKET_PREFIX + name)[:_LONGEST_NAME]
    certificate = _issue(
        authority, key.public_key(), subject, days, ExtendedKeyUsageOID.CLIENT_AUTH
    )
    return Identity(_pem(certificate), key_pem(key), authority.pem)


def new_key() -> bytes:
    """A new ECDSA P-256 key, PEM."""
    return key_pem(ec.generate_private_key(ec.SECP256R1()))


def make_request(key: bytes, name: str) -> bytes:
    """A signing request (PEM) for a node's own key."""
    private = load_key(key)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise CertificateError("a node's key is an elliptic-curve key")
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a signing request is for.

    Raises:
        CertificateError: the request is damaged, not signed by its key, or of another curve.
    """
    try:
        asked = x509.load_pem_x509_csr(request)
        public = asked.public_key()
        sound = asked.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as problem:
        raise CertificateError("the signing request is damaged") from problem
    if not sound:
        raise CertificateError("the signing request is not signed by its own key")
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise CertificateError("the signing request must be for an ECDSA P-256 key")
    return public


def sign_request(
    authority: Authority, request: bytes, name: str, days: float = NODE_DAYS
) -> x509.Certificate:
    """A node's certificate for the key in its request; the name is ours, not the request's.

    Raises:
        CertificateError: the request is damaged, not signed by its key, or of another curve.
    """
    public = requested_key(request)
    return _issue(authority, public, name, days, ExtendedKeyUsageOID.CLIENT_AUTH)


def load_identity(certificate: Path, key: Path, root: Path) -> Identity:
    """Certificates that someone brought along, checked before anything is started.

    Raises:
        CertificateError: a file is missing or damaged, the key is not the certificate's, or
            the certificate has expired.
        KeyFileError: the key is open to others.
    """
    try:
        pems = certificate.read_bytes(), root.read_bytes()
    except OSError as problem:
        raise CertificateError(f"{problem.filename} cannot be read: {problem.strerror}") from None
    secret = read_secret(key)
    parsed = load_certificate(pems[0])
    check_pair(parsed, load_key(secret))
    load_certificate(pems[1])
    if parsed.not_valid_after_utc < _now():
        raise CertificateExpiredError(
            f"{certificate} expired on {parsed.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            f"{by_this_clock()}"
        )
    return Identity(pems[0], secret, pems[1])


def save_identity(file: Path, identity: Identity) -> None:
    """Write key, certificate and root to one file (0600): all of them are there or none."""
    parts = (identity.key, identity.certificate, identity.root)
    write_secret(file, b"".join(part.rstrip() + b"\n" for part in parts))


def read_identity(file: Path) -> Identity:
    """What `save_identity` wrote.

    Raises:
        KeyFileError: missing, or open to others.
        CertificateError: damaged.
    """
    blocks = _BLOCK.findall(read_secret(file))
    if len(blocks) < 3 or b"PRIVATE KEY" not in blocks[0]:
        raise CertificateError(f"{file} is damaged: it must hold a key, a certificate and a root")
    identity = Identity(b"".join(blocks[1:-1]), blocks[0], blocks[-1])
    check_pair(load_certificate(identity.certificate), load_key(identity.key))
    load_certificate(identity.root)
    return identity


def common_name(certificate: x509.Certificate) -> str:
    """The name in a certificate's subject; empty if there is none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the certificate, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def renewal_due(certificate: x509.Certificate, now: datetime.datetime | None = None) -> bool:
    """Whether less than a third of the certificate's life is left."""
    ends, begins = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    return (now or _now()) > ends - (ends - begins) / 3


def by_this_clock() -> str:
    """What a sentence about a certificate's time ends with."""
    return f" (this machine's clock says {_now():%Y-%m-%d %H:%M} UTC)"


def covers(certificate: x509.Certificate, names: Sequence[str]) -> bool:
    """Whether a server certificate carries all these DNS names and IP addresses."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    have = {str(name.value) for name in found}
    return all(name in have for name in names)


def load_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate of a PEM file."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise CertificateError("a certificate is damaged; it must be a PEM file") from problem


def load_key(pem: bytes) -> PrivateKeyTypes:
    """An unencrypted private key of a PEM file."""
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise CertificateError("a key is damaged or encrypted; it must be plain PEM") from problem


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key as PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def check_pair(certificate: x509.Certificate, key: PrivateKeyTypes) -> None:
    """Raise CertificateError unless the key is the certificate's."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if certificate.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise CertificateError("the key does not belong to the certificate")


def _make_authority(file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("Umbel federation")
    now = _now()
    use = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(use, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    save_identity(file, Identity(_pem(certificate), key_pem(key), _pem(certificate)))


def _issue(
    authority: Authority,
    public: ec.EllipticCurvePublicKey,
    name: str,
    days: float,
    use: x509.ObjectIdentifier,
    names: Sequence[str] = (),
) -> x509.Certificate:
    now = _now()
    ends = min(now + datetime.timedelta(days=days), authority.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(authority.certificate.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_general_name(each) for each in names])
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name.encode("idna").decode())
    except (UnicodeError, ValueError) as problem:
        raise CertificateError(f"{name!r} is neither a DNS name nor an IP address") from problem


def _first_name(names: Sequence[str]) -> str:
    if not names:
        raise CertificateError("a server certificate needs a name; say --name HOST")
    return names[0][:_LONGEST_NAME]


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


__all__ = [
    "NODE_DAYS",
    "SERVER_DAYS",
    "TICKET_PREFIX",
    "Authority",
    "CertificateError",
    "CertificateExpiredError",
    "Identity",
    "KeyFileError",
    "by_this_clock",
    "check_pair",
    "common_name",
    "covers",
    "fingerprint",
    "load_certificate",
    "load_identity",
    "load_key",
    "make_request",
    "make_server_identity",
    "make_ticket",
    "new_key",
    "open_authority",
    "read_identity",
    "renewal_due",
    "requested_key",
    "save_identity",
    "sign_request",
]
