"""Where data lie: a path of this machine, or an address that fsspec knows.

    /data/visits            visits.parquet            a folder, a file
    s3://bucket/visits      webhdfs://host:9870/visits    https://host/visits.csv

Whoever holds the data says no in many ways; here each becomes a sentence with the cure.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from umbel.clients.frameworks.extras import installed
from umbel.core.errors import ConfigError, UmbelError, described

WHO = "reading data at rest"
EXTRA = "data"
MOST_NAMES = 6
"""Of columns or keys, named in a sentence."""


def arrow(module: str = "") -> Any:
    """pyarrow, or one of its modules.

    Raises:
        ConfigError: it is not installed.
    """
    return installed(f"pyarrow.{module}" if module else "pyarrow", EXTRA, WHO)


@dataclass(frozen=True)
class Place:
    """A path or an address, and what its file system must be told.

    Attributes:
        path: as the app gave it.
        storage: options of fsspec's file system, such as `endpoint_url` or `anon` for S3.
    """

    path: str
    storage: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.path)  # without a password

    @property
    def remote(self) -> bool:
        """Whether fsspec is asked."""
        return "://" in self.path

    def opened(self) -> tuple[Any, str]:
        """The file system, as one of Arrow's, and the path in it.

        Raises:
            ConfigError: nobody knows such an address, or a package is missing.
        """
        if not self.remote:
            if self.storage:
                raise ConfigError(
                    f"storage has {', '.join(self.storage)}, but {self} is a path of this machine; "
                    "leave it out, or give an address such as s3://bucket/folder"
                )
            system = arrow("fs").LocalFileSystem()
            return system, os.path.abspath(os.path.expanduser(self.path))  # noqa: PTH100, PTH111
        core = installed("fsspec.core", EXTRA, WHO)
        with reading(str(self)):
            system, path = core.url_to_fs(self.path, **self.storage)
        fs = arrow("fs")
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong while something is read into a sentence about it."""
    try:
        yield
    except UmbelError:
        raise
    except Exception as error:
        raise ConfigError(_sentence(what, error)) from error


def _sentence(what: str, error: Exception) -> str:
    kind, said = type(error).__name__, described(error)
    if isinstance(error, ImportError):
        return f"{what} cannot be read without another package: {said}"
    if isinstance(error, PermissionError) or "Credential" in kind or "Credential" in said:
        return (
            f"{what} is not given to this node: {said}; give it credentials in its environment or "
            "by storage={...}, or ask for access"
        )
    if isinstance(error, FileNotFoundError):
        return f"there is no {what} on {os.uname().nodename}; correct the path, or mount it here"
    if isinstance(error, ValueError) and "rotocol" in said:
        return f"{what} is an address that fsspec does not know: {said}"
    if isinstance(error, OSError) and "magic" not in said:
        return f"{what} cannot be reached from {os.uname().nodename}: {said}"
    return f"{what} cannot be read: {said}"


def listed(names: Sequence[Any]) -> str:
    """Names for a sentence, the first few of many."""
    few = ", ".join(map(str, names[:MOST_NAMES]))
    more = len(names) - MOST_NAMES
    return few if more <= 0 else f"{few} and {more:,} more"
