"""One process at a time in a folder: the kernel holds the lock, and frees it with the process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from umbel.core.errors import ConfigError


def take_lock(file: Path, busy: str) -> int:
    """An open file that nobody else has locked; closing it ends the lock.

    Args:
        file: made where it is missing, readable by its owner alone.
        busy: the sentence for whoever comes second.

    Raises:
        ConfigError: another process has it, or the file cannot be made.
    """
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as problem:
        raise ConfigError(f"{file.parent} cannot be used: {problem.strerror}") from problem
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(busy) from None
    except OSError:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """The lock while the block runs; see `take_lock`."""
    lock = take_lock(file, busy)
    try:
        yield
    finally:
        os.close(lock)


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock; nothing is made or changed."""
    try:
        lock = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False
