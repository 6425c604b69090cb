"""The rounds of which a node has given its masked update: a file that only grows.

A line "RUN ROUND" is written and synced before the update leaves. So a server that begins a round
anew, or goes back to an earlier one, is refused whatever has happened in between: a node that was
killed, an app that was restored, a coordinator that was started again.
"""

import os
from pathlib import Path

from umbel.core.errors import ConfigError

_LINES = 4096
"""So many lines a file may have at a start before it is written anew, one for each run."""


_sync = getattr(os, "fdatasync", os.fsync)
"""To the disk, as far as reading it back needs."""


class SpentRounds:
    """The last spent round of each run.

    Args:
        file: where they are kept; None keeps them in memory only, for tests.

    Raises:
        ConfigError: the file is damaged, or cannot be read.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._last = file, dict[int, int]()
        if file is None or not file.exists():
            return
        try:
            text = file.read_text()
            *lines, torn = text.split("\n")  # a line without its end was never acted upon
            for line in lines:
                run, round_ = map(int, line.split())
                self._last[run] = max(round_, self._last.get(run, 0))
            if torn or len(lines) > _LINES:
                self._rewrite()
        except (OSError, ValueError) as problem:
            raise ConfigError(
                f"{file}, which says what rounds this node has given its updates of, is damaged "
                f"({problem}); move it away only if no coordinator may ask for one of them again"
            ) from problem

    def last(self, run: int) -> int:
        """The last round of a run that was given; 0 before the first."""
        return self._last.get(run, 0)

    def spend(self, run: int, round_: int) -> None:
        """Commit a round before its update leaves.

        Raises:
            OSError: it cannot be written; nothing may leave then.
        """
        if self._file is not None:
            self._append(f"{run} {round_}\n")
        self._last[run] = max(round_, self.last(run))

    def _append(self, line: str) -> None:
        assert self._file is not None
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode())
            _sync(handle)
        finally:
            os.close(handle)

    def _rewrite(self) -> None:
        assert self._file is not None
        fresh = self._file.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(handle, "".join(f"{run} {at}\n" for run, at in self._last.items()).encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        fresh.replace(self._file)
