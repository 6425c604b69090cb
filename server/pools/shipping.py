"""Work for other machines: the app's code travels by digest, and is unpacked where it is missing.

    engine -> workers   the files of the app's folder and their digest, once a run
    worker              the folder itself if it is there and the same; else a copy of its own

A worker must have the same Umbel and the same Python: results are to be the same, bit for bit.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.server.embedded.packing import Packed
from umbel.server.pools.base import Group, Results, Work
from umbel.server.pools.work import load, run_group

LARGEST_APP = 64 << 20
"""Bytes of an app's folder that are sent to workers."""
_LEFT_OUT = ("__pycache__", "runs")


def versions() -> dict[str, str]:
    """What decides over the bits of results, by name."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    return found | {name: metadata.version(name) for name in ("umbel", "flwr", "torch", "numpy")}


@dataclass(frozen=True)
class Shipment:
    """A run's work, as it travels.

    Attributes:
        work: without its app, and without a log: that is a file of the coordinator's machine.
        path: of the app's folder there.
        digest: of its code, as `AppFolder.digest` has it.
        files: contents by path within the folder.
        versions: of the coordinator's packages.
    """

    work: Work
    path: str
    digest: str
    files: Mapping[str, bytes]
    versions: Mapping[str, str]

    def unpacked(self) -> Work:
        """The work, with the app where this process can import it.

        Raises:
            ConfigError: other versions are installed here, or the folder cannot be written.
        """
        other = [
            f"{name} {mine} here and {self.versions[name]} at the coordinator"
            for name, mine in versions().items()
            if mine != self.versions[name]
        ]
        if other:
            raise ConfigError(
                f"a worker on {os.uname().nodename} has {', '.join(other)}; results would differ: "
                "install the coordinator's versions there"
            )
        return replace(self.work, app=self._folder())

    def _folder(self) -> Path:
        there = Path(self.path)
        if (there / "pyproject.toml").is_file() and open_app(there).digest() == self.digest:
            return there
        home = Path(tempfile.gettempdir()) / f"umbel-apps-{os.getuid()}"
        content = hashlib.sha256(self.digest.encode())
        for name, data in sorted(self.files.items()):
            content.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        copy = home / content.hexdigest()[:32] / there.name
        if copy.is_dir():
            return copy
        try:
            home.mkdir(mode=0o700, exist_ok=True)
            if home.stat().st_uid != os.getuid():
                raise ConfigError(f"{home} belongs to somebody else; set TMPDIR for the workers")
            self._write(home, copy)
        except OSError as error:
            raise ConfigError(
                f"a worker cannot write the app to {home}: {error}; set TMPDIR for the workers"
            ) from error
        return copy

    def _write(self, home: Path, copy: Path) -> None:
        """All files at once, so that another worker never sees half of them."""
        made = Path(tempfile.mkdtemp(dir=home)) / copy.name
        for name, data in self.files.items():
            file = made / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        try:
            made.parent.rename(copy.parent)
        except OSError:
            if not copy.is_dir():  # else another worker was quicker
                raise


def shipped(work: Work) -> Shipment:
    """A run's work, ready to travel.

    Raises:
        ConfigError: the app's folder is too large.
    """
    assert isinstance(work.app, Path)
    folder = open_app(work.app)
    files: dict[str, bytes] = {}
    size = 0
    for file in sorted(folder.path.rglob("*")):
        name = file.relative_to(folder.path)
        hidden = any(part.startswith(".") or part in _LEFT_OUT for part in name.parts)
        if hidden or not file.is_file():
            continue
        size += file.stat().st_size
        if size > LARGEST_APP:
            raise ConfigError(
                f"the app's folder {folder.path} has more than {LARGEST_APP >> 20} MiB, which is "
                "too much to send to every worker; keep data elsewhere"
            )
        files[name.as_posix()] = file.read_bytes()
    bare = replace(work, app=Path(folder.path.name), log=None)
    return Shipment(bare, str(folder.path), folder.digest(), files, versions())


def bare_group(group: Group) -> tuple[Group, list[Packed]]:
    """A group without the contents of its messages, and these contents, each once.

    In the place of a content, a task has its position among them.
    """
    contents = {id(task.content): task.content for task in group}
    places = {key: place for place, key in enumerate(contents)}
    bare = [replace(task, content=places[id(task.content)]) for task in group]
    return bare, list(contents.values())


def probe(shipment: Shipment) -> None:
    """Load the app on a worker, so that what is wrong is said before the first round."""
    load(unpacked(shipment))


def run_shipped(shipment: Shipment, bare: Group, *contents: Packed) -> Results:
    """Run a group on a worker; `contents` are those that `bare_group` took out."""
    group = [replace(task, content=contents[task.content]) for task in bare]
    return run_group(unpacked(shipment), group)


_unpacked: dict[str, Work] = {}


def unpacked(shipment: Shipment) -> Work:
    """The shipment's work in this process; looked at once a run."""
    token = shipment.work.token
    if token not in _unpacked:
        _unpacked.clear()
        _unpacked[token] = shipment.unpacked()
    return _unpacked[token]
