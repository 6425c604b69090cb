"""Files that hold secrets: written whole, mode 0600, and refused when others may read them."""

import os
import stat
import tempfile
from pathlib import Path


class KeyFileError(Exception):
    """A file with a secret in it is missing, damaged, or open to others."""


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # mkstemp creates with mode 0600: the secret is never open, not even for an instant.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_secret(path: Path) -> bytes:
    """The content of a file with a secret.

    Raises:
        KeyFileError: it is missing, or its mode lets others read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise KeyFileError(
                    f"{path} holds a secret and its mode {mode:04o} lets others read it; "
                    f"replace the key if they could have, and run: chmod 600 {path}"
                )
            return file.read()
    except FileNotFoundError:
        raise KeyFileError(f"there is no file {path}") from None
    except OSError as problem:
        raise KeyFileError(f"{path} cannot be read: {problem.strerror}") from problem
