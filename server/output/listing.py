"""The runs that are in a folder, as `umbel runs` lists them.

    running      a process is at work on it
    finished     it has a result; `stopped` says why it ended
    unfinished   neither: it was stopped, was killed or failed

A run of `flwr run` is written by a process of Flower's, which was started from wherever its user
was when it began to live. So each such run is noted in a file of the user's data folder, and listed
wherever its directory lies.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.lock import is_locked
from umbel.server.output.rundir import LOCK, RunDirectory
from umbel.server.private.coordinator_key import data_folder

_NOTED = "flower-runs"


def listed(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """What one line says of each run, the oldest first.

    Args:
        folders: of runs, such as `runs`; state folders of coordinators, which have such a folder;
            or runs themselves. What is no run in them is passed over.

    Raises:
        ConfigError: there is no such folder.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        for run in _runs_in(folder):
            found.setdefault(run.path.resolve(), _line(run))
    return sorted(found.values(), key=lambda line: (line["started"] or "", line["run"]))


def note(run: Path) -> None:
    """Remember a run that Flower's own process keeps, so that its user finds it."""
    file = data_folder() / _NOTED
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file.open("a", encoding="utf-8") as noted:
        noted.write(f"{run.absolute()}\n")


def noted() -> list[Path]:
    """The remembered runs that are still there."""
    try:
        lines = (data_folder() / _NOTED).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(lines) if RunDirectory(Path(line)).holds_run()]


def _runs_in(folder: Path) -> list[RunDirectory]:
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}; give one that holds runs, or a coordinator's --state"
        )
    if RunDirectory(folder).holds_run():
        return [RunDirectory(folder)]
    inside = [folder, folder / "runs"] if (folder / "runs").is_dir() else [folder]
    runs = (RunDirectory(path) for each in inside for path in each.iterdir() if path.is_dir())
    return [run for run in runs if run.holds_run() and os.access(run.path, os.R_OK | os.X_OK)]


def _line(run: RunDirectory) -> dict[str, Any]:
    line: dict[str, Any] = {"run": str(run.path), "state": "damaged", "started": None}
    empty = ("app", "engine", "rounds", "accuracy", "metrics", "epsilon", "delta", "stopped")
    line |= dict.fromkeys((*empty, "seconds"))
    try:
        config, result, rounds = run.config(), run.result(), run.rounds()
    except ConfigError as problem:  # one damaged run must not hide the others
        return line | {"problem": str(problem)}
    last = rounds[-1] if rounds else {}
    metrics = result.get("metrics") or last.get("metrics") or {}
    return line | {
        "state": _state(run, result),
        "started": config.get("started"),
        "app": config.get("app"),
        "engine": config.get("engine"),
        "rounds": result.get("rounds", last.get("round", 0)),
        "accuracy": metrics.get("accuracy"),
        "metrics": metrics,
        "epsilon": result.get("epsilon", last.get("epsilon")),
        "delta": result.get("delta"),
        "stopped": result.get("stopped"),
        "seconds": result.get("seconds"),
    }


def _state(run: RunDirectory, result: dict[str, Any]) -> str:
    if is_locked(run.path / LOCK):
        return "running"
    return "finished" if result else "unfinished"
