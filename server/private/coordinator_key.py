"""The coordinator's signing key: one Ed25519 key for this user on this machine.

`$UMBEL_KEY` names the file; else it is `umbel/coordinator.pem` in the user's data folder. It is
made when it is first needed, readable by its owner only, and never leaves the machine. The public
half stands in every certificate; who verifies one compares it with what the coordinator
published elsewhere.
"""

import base64
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
)

from umbel.strategies.errors import ConfigError


def key_path() -> Path:
    """`$UMBEL_KEY`, else `umbel/coordinator.pem` in `$XDG_DATA_HOME` or `~/.local/share`."""
    if chosen := os.environ.get("UMBEL_KEY"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_DATA_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path("~/.local/share").expanduser()
    return base / "umbel" / "coordinator.pem"


def coordinator_key() -> Ed25519PrivateKey:
    """This coordinator's key; it is made if there is none.

    Raises:
        ConfigError: it cannot be read or made.
    """
    path = key_path()
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


def signed_by(public: str, signature: str, message: bytes) -> bool:
    """Whether `signature` is of `message`, by the holder of `public`."""
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError):
        return False
    return True
