"""Keys of secure aggregation: agreement, sealing, signatures, and what exactly is signed.

Agreement is X25519 (RFC 7748), derivation HKDF-SHA256 (RFC 5869) salted with the session and
labelled with its purpose, sealing ChaCha20-Poly1305 (RFC 8439) under a key that seals one
message. A node signs with Ed25519 (RFC 8032), or with the P-256 key of its certificate where it
has one. All of it comes from the `cryptography` package.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.poly1305 import Poly1305

PUBLIC_BYTES = 32
DIGEST_BYTES = 32
_FIELD = struct.Struct(">cQ").pack
_ECDSA = ec.ECDSA(hashes.SHA256())


def transcript(purpose: str, *fields: bytes | str | int) -> bytes:
    """Fields as bytes that can be read in one way only, for hashing and signing.

    Every field is preceded by its kind and length, so neither a shifted border between two
    fields nor another purpose gives the same bytes.

    Example:
        >>> transcript("t", "ab", "c") == transcript("t", "a", "bc")
        False
    """
    parts = [_begin(purpose)]
    for part in fields:
        if isinstance(part, bytes):
            kind, raw = b"b", part
        elif isinstance(part, str):
            kind, raw = b"s", part.encode()
        else:
            kind, raw = b"i", part.to_bytes((part.bit_length() + 8) // 8, signed=True)
        parts.append(_FIELD(kind, len(raw)))
        parts.append(raw)
    return b"".join(parts)


@lru_cache(maxsize=64)
def _begin(purpose: str) -> bytes:
    raw = purpose.encode()
    return b"umbel-secure-1" + _FIELD(b"s", len(raw)) + raw


def digest(purpose: str, *fields: bytes | str | int) -> bytes:
    """SHA-256 of a transcript."""
    return hashlib.sha256(transcript(purpose, *fields)).digest()


def sha256(content: bytes | memoryview) -> bytes:
    """SHA-256 of something long."""
    return hashlib.sha256(content).digest()


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key for one session; `repr` never shows the private half.

    Attributes:
        private: 32 bytes.
        public: 32 bytes.
    """

    private: bytes
    public: bytes
    # Kept, because making it of the private half costs as much as an exchange.
    _key: x25519.X25519PrivateKey = field(compare=False)

    @staticmethod
    def generate() -> "KeyPair":
        """A fresh key from the operating system's entropy."""
        return KeyPair._from(x25519.X25519PrivateKey.generate())

    @staticmethod
    def of(private: bytes) -> "KeyPair":
        """The pair of a private key."""
        return KeyPair._from(x25519.X25519PrivateKey.from_private_bytes(private))

    @staticmethod
    def _from(key: x25519.X25519PrivateKey) -> "KeyPair":
        return KeyPair(key.private_bytes_raw(), key.public_key().public_bytes_raw(), key)

    def agree(self, other: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
        """The key material of `length` bytes that both holders derive for one purpose.

        Raises:
            ValueError: the other's public key has not 32 bytes, or is a point of small order,
                for which the secret would be known to everybody.
        """
        shared = self._key.exchange(x25519.X25519PublicKey.from_public_bytes(other))
        return HKDF(hashes.SHA256(), length, salt, info).derive(shared)

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public.hex()[:16]}…)"


def seal(key: bytes, content: bytes, context: bytes) -> bytes:
    """Encrypts one message; a key seals once, so the nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The content of a sealed message.

    Raises:
        ValueError: it was changed, cut, or sealed for another session, sender or receiver.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, context)
    except InvalidTag:
        raise ValueError("A sealed message was changed or was meant for somebody else.") from None


def tag(key: bytes, content: bytes) -> bytes:
    """Poly1305 under a key that authenticates one message: seven times as fast as SHA-256."""
    return Poly1305.generate_tag(key, content)


def has_tag(key: bytes, content: bytes, expected: bytes) -> bool:
    """Whether `expected` is the tag, in constant time."""
    try:
        Poly1305.verify_tag(key, content, expected)
    except InvalidSignature:
        return False
    return True


SigningKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def new_signing_key() -> bytes:
    """A fresh Ed25519 key as 32 raw bytes."""
    return ed25519.Ed25519PrivateKey.generate().private_bytes_raw()


def signing_key(raw: bytes) -> ed25519.Ed25519PrivateKey:
    """The Ed25519 key of 32 raw bytes."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(raw)


def public_identity(key: SigningKey) -> bytes:
    """The public half of a signing key as a DER SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def sign(key: SigningKey, message: bytes) -> bytes:
    """A signature with Ed25519, or ECDSA over SHA-256 for the P-256 key of a certificate."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    return key.sign(message, _ECDSA)


@lru_cache(maxsize=1 << 12)
def verifier(identity: bytes) -> Callable[[bytes, bytes], None] | None:
    """What checks a signature over a message with the key of an identity; None for other keys.

    It is kept, because the first use of a key that was just read costs half a verification.

    Raises:
        UnsupportedAlgorithm, ValueError: there is no such key.
    """
    key = serialization.load_der_public_key(identity)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key.verify
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return partial(key.verify, signature_algorithm=_ECDSA)
    return None


@lru_cache(maxsize=1 << 16)
def verify(identity: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature is the identity's over exactly this message.

    The answer depends on the arguments alone and is kept: in an embedded run a thousand nodes
    of one process check the same thousand signatures, and a server may see one twice.

    Args:
        identity: DER SubjectPublicKeyInfo of an Ed25519 or P-256 key; anything else is False.
        message: what was signed.
        signature: 64 bytes for Ed25519, DER for ECDSA.
    """
    try:
        check = verifier(identity)
        if check is None:
            return False
        check(signature, message)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
