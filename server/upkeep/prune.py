"""Making room: which finished runs may go, and how they go.

A run is kept while it is unfinished, while somebody has its folder open for a run, and as long as
it is among the newest. What was released stays in the ledgers of populations, which are not here:
removing a run gives no budget back.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel.core.errors import ConfigError, RunError
from umbel.server.output.rundir import RunDirectory

DAY_S = 86_400.0


@dataclass(frozen=True)
class Candidate:
    """A finished run that may be removed.

    Attributes:
        path: its directory.
        bytes: what it takes on the disk.
        ended: when it was last written, seconds since 1970.
    """

    path: Path
    bytes: int
    ended: float


def candidates(
    runs: Path, *, keep: int, older_than_days: float = 0.0, checkpoints: bool = False
) -> list[Candidate]:
    """Finished runs that are neither among the newest `keep` nor younger than so many days.

    Args:
        runs: the folder that holds run directories.
        keep: how many of the newest finished runs stay.
        older_than_days: younger ones stay.
        checkpoints: count, and later remove, only their checkpoints.

    Raises:
        ConfigError: there is no such folder.
    """
    if not runs.is_dir():
        raise ConfigError(f"{runs} is no folder; name the one that holds the runs")
    finished = []
    for path in runs.iterdir():
        run = RunDirectory(path)
        if path.is_symlink() or not path.is_dir() or not run.holds_run() or not run.result():
            continue
        finished.append((run.result_path.stat().st_mtime, path))
    finished.sort(reverse=True)
    before = time.time() - older_than_days * DAY_S
    found = []
    for ended, path in finished[keep:]:
        what = RunDirectory(path).checkpoint_path if checkpoints else path
        if ended <= before and what.exists():
            found.append(Candidate(path, _size(what), ended))
    return found


def remove(chosen: Sequence[Candidate], *, checkpoints: bool = False) -> None:
    """Remove runs, or only their checkpoints.

    A directory is renamed first, so that a removal that is cut short leaves no half of a run.

    Raises:
        RunError: a file cannot be removed.
    """
    for candidate in chosen:
        what = RunDirectory(candidate.path).checkpoint_path if checkpoints else candidate.path
        going = what.with_name(f".{what.name}.going")
        try:
            what.rename(going)
            shutil.rmtree(going)
        except OSError as error:
            raise RunError(f"{what} cannot be removed: {error.strerror}") from error


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
