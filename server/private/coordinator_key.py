"""The coordinator's signing key: one Ed25519 key a state folder, or a user of this machine.

    $UMBEL_KEY                         a file that the operator names
    STATE/coordinator.pem              of `umbel server --state STATE`
    DATA/umbel/coordinator.pem         of every other run; DATA is the user's data folder

It is made when it is first needed, readable by its owner only, and never leaves the machine. The
public half stands in every certificate; who verifies one compares it with what the coordinator
published elsewhere (`umbel key`).
"""

import base64
import binascii
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from umbel.core.errors import ConfigError

_NAME = "coordinator.pem"


def data_folder() -> Path:
    """`umbel` in `$XDG_DATA_HOME` or `~/.local/share`: what lasts for this user."""
    shared = os.environ.get("XDG_DATA_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path("~/.local/share").expanduser()
    return base / "umbel"


def key_path(state: Path | None = None) -> Path:
    """Where the key is: `$UMBEL_KEY`, else in the state folder, else in the data folder."""
    if chosen := os.environ.get("UMBEL_KEY"):
        return Path(chosen).expanduser()
    return (data_folder() if state is None else state) / _NAME


def coordinator_key(state: Path | None = None) -> Ed25519PrivateKey:
    """This coordinator's key; it is made if there is none.

    Raises:
        ConfigError: it cannot be read or made.
    """
    path = key_path(state)
    try:
        if not path.exists():
            _make(path)
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"the coordinator's key {path} cannot be used ({error}); certificates are signed with "
            "it, so name another file with UMBEL_KEY"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the coordinator's key {path} is no Ed25519 key; remove or replace it")
    return key


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(pem)
    try:
        os.link(fresh, path)  # fails where another process was first, whose key then stands
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half, in base64."""
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(key: Ed25519PrivateKey, message: bytes) -> str:
    """A signature, in base64."""
    return base64.b64encode(key.sign(message)).decode()


def signed_by(public: object, signature: object, message: bytes) -> bool:
    """Whether `signature` is of `message`, by the holder of `public`; both in base64."""
    if not (isinstance(public, str) and isinstance(signature, str)):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(public: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a public key in base64."""
    try:
        raw = base64.b64decode(public, validate=True)
    except (binascii.Error, ValueError):
        raw = public.encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def published_key(given: str) -> str:
    """A public key that somebody gives: a file, or the text itself; base64 or PEM.

    Raises:
        ConfigError: it is neither.
    """
    file, text = Path(given).expanduser(), given
    try:
        if file.is_file():
            text = file.read_text(encoding="ascii")
        text = text.strip()
        if text.startswith("-----BEGIN"):
            key = load_pem_public_key(text.encode())
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError("it is no Ed25519 key")
            return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
        Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"--key {given} is no public key of a coordinator ({error}); give the file or the line "
            "that `umbel key` printed there"
        ) from error
    return text
