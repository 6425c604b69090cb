"""One file that holds a coordinator's state: taken while it runs, checked, and put back.

    umbel.sqlite         by SQLite's own copy, so that a write in progress is in it or not
    keys, settings       as they are
    runs/                each file whole: they are replaced in one step, or only grow
    populations/         last, by SQLite's own copy

Ledgers are copied after the runs, so that what a copied run has released is in the copied ledger.
What was released after the copy is in no copy: putting one back says so in every ledger, as a
release without a bound, unless the operator states that nothing was released since.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dp_accounting import NonPrivateDpEvent

from umbel.core.errors import CheckError, ConfigError, RunError
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.population import Register

FORMAT = 1
DATABASE = "umbel.sqlite"
POPULATIONS = "populations"
_LIST = "backup.json"
_PASSING = {"lock", "status.json"}
"""Files of a running server that mean nothing to the next one."""
_LARGEST_LIST = 256 << 20


@dataclass(frozen=True)
class Backup:
    """What a copy says of itself.

    Attributes:
        made: when it was begun, UTC, ISO 8601.
        version: of Umbel.
        files: SHA-256 in hex of each file, by its path in the state folder.
    """

    made: str
    version: str
    files: Mapping[str, str]


def back_up(state: Path, target: Path, *, version: str) -> Backup:
    """Copy a coordinator's state into one tar file, readable by its owner alone.

    The server may be running. The copy is read again before it gets its name.

    Args:
        state: the coordinator's `--state`.
        target: the file; it must not exist.
        version: of Umbel.

    Raises:
        ConfigError: no coordinator's state, or a target that exists.
        RunError: the copy cannot be written.
    """
    if not (state / DATABASE).is_file():
        raise ConfigError(f"{state} is no coordinator's state (there is no {DATABASE} in it)")
    if target.exists():
        raise ConfigError(f"{target} is there already; name another file")
    made = datetime.now(UTC).isoformat(timespec="seconds")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _for_the_owner(part) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            digests = dict(_add_all(tar, state))
            backup = Backup(made, version, digests)
            _add_list(tar, backup)
        _check(part, backup)
        part.rename(target)
    except OSError as error:
        raise RunError(f"{target} cannot be written ({error.strerror}); make room") from error
    except sqlite3.Error as error:
        raise RunError(f"a database of {state} cannot be copied ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return backup


def restore(
    source: Path, state: Path, *, nothing_since: bool = False, register: Register | None = None
) -> tuple[Backup, list[str]]:
    """Put a copy back into a folder that is not there yet.

    Every file is compared with its digest before the folder gets its name. Ledgers then say that
    what was released after the copy is unknown, as a release without a bound.

    Args:
        source: what `back_up` made.
        state: the new `--state`; missing, or empty.
        nothing_since: the operator states that no run released anything after the copy was made.
        register: of the ledgers of this machine; the user's own if None.

    Returns:
        What the copy says of itself; the populations whose ledgers are infinite from now on.

    Raises:
        ConfigError: the folder has files, or the file is no copy.
        CheckError: the copy is damaged, or this machine knows a later state of a ledger.
    """
    if state.exists() and any(state.iterdir()):
        raise ConfigError(f"{state} is not empty; put the copy into a new folder")
    state.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{state.name}-", dir=state.parent) as name:
        fresh = Path(name) / "state"
        fresh.mkdir(mode=0o700)
        backup = _unpack(source, fresh)
        doubtful = _ledgers(fresh, backup, nothing_since=nothing_since, register=register)
        if state.exists():
            state.rmdir()
        fresh.rename(state)
    return backup, doubtful


def _ledgers(
    state: Path, backup: Backup, *, nothing_since: bool, register: Register | None
) -> list[str]:
    """Open every ledger, which checks it, and write down what is not known."""
    doubtful: list[str] = []
    for file in sorted((state / POPULATIONS).glob("*.sqlite")):
        population = _population_of(file)
        with Ledger(file, population, coordinator_key(state), register) as ledger:
            what = f"put back from the copy of {backup.made}"
            ledger.begin("restore", restored=what, nothing_since=nothing_since)
            if nothing_since:
                continue
            unknown = Charge(NonPrivateDpEvent(), ADD_OR_REMOVE)
            ledger.charge("restore", f"{what}; later releases unknown", "model-user", [unknown])
            ledger.charge("restore", f"{what}; later releases unknown", "server", [unknown])
            doubtful.append(population)
    return doubtful


def _population_of(file: Path) -> str:
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
        try:
            row = database.execute("SELECT body FROM entry WHERE number = 1").fetchone()
            return str(json.loads(row[0])["population"])
        except (sqlite3.Error, TypeError, ValueError, KeyError) as error:
            raise CheckError(f"{file.name} in the copy is no ledger ({error})") from error


# ---- the tar file


def _add_all(tar: tarfile.TarFile, state: Path) -> Iterator[tuple[str, str]]:
    """Add every file in the order that the module's head gives; name and digest of each."""
    files = sorted(_files(state), key=lambda name: (_turn(name), name))
    with tempfile.TemporaryDirectory(prefix="umbel-backup-") as folder:
        for name in files:
            path = state / name
            if path.suffix == ".sqlite":
                copy = Path(folder) / "copy.sqlite"
                _copy_database(path, copy)
                path = copy
            digest = _add(tar, path, name)
            if digest is not None:
                yield name, digest


def _turn(name: str) -> int:
    if name == DATABASE:
        return 0
    return 2 if name.startswith(f"{POPULATIONS}/") else 1


def _files(state: Path) -> Iterator[str]:
    for path in state.rglob("*"):
        name = path.relative_to(state).as_posix()
        passing = path.name in _PASSING or path.name.startswith(".")
        if path.is_symlink() or not path.is_file() or passing:
            continue
        if path.name.endswith((".sqlite-wal", ".sqlite-shm", ".sqlite-journal", ".tmp", ".part")):
            continue
        yield name


def _copy_database(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    uri = f"{source.absolute().as_uri()}?mode=ro"
    with (
        closing(sqlite3.connect(uri, uri=True, timeout=30)) as opened,
        closing(sqlite3.connect(target)) as copy,
    ):
        opened.backup(copy)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> str | None:
    """Add the bytes that a file has now; None where a run has removed it meanwhile."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = size, 0o600, int(path.stat().st_mtime)
            reader = _Hashed(file, size)
            tar.addfile(entry, reader)
            return reader.digest()
    except FileNotFoundError:
        return None


class _Hashed:
    """Reads so many bytes of a file, which may grow, and knows their digest."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self._hash = file, size, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        wanted = self._left if count < 0 else min(count, self._left)
        found = self._file.read(wanted)
        if len(found) < wanted:
            raise OSError(0, "a file became shorter while it was copied; try again")
        self._left -= len(found)
        self._hash.update(found)
        return found

    def digest(self) -> str:
        return self._hash.hexdigest()


def _add_list(tar: tarfile.TarFile, backup: Backup) -> None:
    body = {
        "format": FORMAT,
        "made": backup.made,
        "version": backup.version,
        "files": dict(backup.files),
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(json.dumps(body, indent=1).encode())
        file.flush()
        _add(tar, Path(file.name), _LIST)


def _check(part: Path, backup: Backup) -> None:
    """Read a copy again, and compare every file."""
    with tarfile.open(part, mode="r|") as tar:
        found = {entry.name: _digest(tar, entry) for entry in tar if entry.name != _LIST}
    if found != dict(backup.files):
        raise RunError("the copy does not read as it was written; the disk may be failing")


def _unpack(source: Path, fresh: Path) -> Backup:
    try:
        with tarfile.open(source, mode="r:") as tar:
            backup = _read_list(tar, source)
            for entry in tar:
                if entry.name == _LIST:
                    continue
                if not entry.isreg() or entry.name not in backup.files or not _is_inside(entry):
                    raise CheckError(f"{source} holds {entry.name!r}, which no copy has")
                target = fresh / entry.name
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _write(tar, entry, target, backup.files[entry.name], source)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{source} is no copy of a coordinator's state ({error})") from error
    missing = [name for name in backup.files if not (fresh / name).is_file()]
    if missing:
        raise CheckError(f"{source} lacks {missing[0]} and {len(missing) - 1} other files")
    return backup


def _read_list(tar: tarfile.TarFile, source: Path) -> Backup:
    entry = next((each for each in tar.getmembers() if each.name == _LIST), None)
    opened = tar.extractfile(entry) if entry is not None and entry.size < _LARGEST_LIST else None
    if opened is None:
        raise ConfigError(f"{source} is no copy of a coordinator's state (no {_LIST} in it)")
    try:
        body = json.loads(opened.read())
        if body["format"] != FORMAT:
            raise ConfigError(
                f"{source} has the format {body['format']!r} of Umbel {body['version']}; put it "
                "back with that version"
            )
        files = {str(name): str(digest) for name, digest in body["files"].items()}
        return Backup(str(body["made"]), str(body["version"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckError(f"the list of files in {source} is damaged ({error})") from error


def _is_inside(entry: tarfile.TarInfo) -> bool:
    path = PurePosixPath(entry.name)
    return not path.is_absolute() and ".." not in path.parts


def _write(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, target: Path, digest: str, source: Path
) -> None:
    opened = tar.extractfile(entry)
    assert opened is not None  # it is a regular file
    hashed = hashlib.sha256()
    with _for_the_owner(target) as file:
        while block := opened.read(1 << 20):
            hashed.update(block)
            file.write(block)
    if hashed.hexdigest() != digest:
        raise CheckError(f"{entry.name} in {source} is not what was copied; take an earlier copy")


def _digest(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    opened = tar.extractfile(entry)
    hashed = hashlib.sha256()
    while opened is not None and (block := opened.read(1 << 20)):
        hashed.update(block)
    return hashed.hexdigest()


@contextlib.contextmanager
def _for_the_owner(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
