"""What an engine gives to the server app that it runs: where to write, where to show."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.core.lock import locked
from umbel.server.output import progress
from umbel.server.output.flower_run import app_name, asked_from
from umbel.server.output.listing import note
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import LOCK, RunDirectory, machine, versions

STATE = "UMBEL_STATE"
"""Environment variable: the coordinator's state folder, where Flower runs the app on its behalf.
The run and the privacy budget of the nodes are kept there, the same as on the link."""
UNPROTECTED = "UMBEL_UNPROTECTED"
"""Environment variable: what `--unprotected` is to Umbel's engines, for Flower's own."""


@dataclass
class Session:
    """One run of one server app.

    Attributes:
        run: the run directory.
        progress: where a person watches.
        own: no engine of Umbel's will finish this run; the app must do it.
        result: what a federation's app reports when it ends; empty for other apps.
    """

    run: RunDirectory
    progress: Progress
    own: bool = False
    began: float = field(default_factory=time.monotonic)
    result: dict[str, Any] = field(default_factory=dict)

    def describe(self, parameters: int, bytes_each: int, use: str = "") -> None:
        """Write the model's size, and how it is used, into the run's configuration."""
        model: dict[str, Any] = {"parameters": parameters, "bytes": parameters * bytes_each}
        model |= {"use": use} if use else {}
        self.run.write_config({**self.run.config(), "model": model})

    def finish(self) -> dict[str, Any]:
        """Complete the result and write it down."""
        result = {
            "run": str(self.run.path),
            "epsilon": None,
            "delta": None,
            "epsilon_against": None,
            "seconds": round(time.monotonic() - self.began, 3),
            **self.result,
        }
        self.run.write_result(result)
        if self.run.certificate_path.is_file():
            from umbel.server.private.seal import seal  # certified runs only: it imports much

            seal(self.run)
        return self.run.result()  # plain values, whatever numbers an app has put into it


_current: ContextVar[Session | None] = ContextVar("session", default=None)


@contextlib.contextmanager
def session(run: RunDirectory, shown: Progress) -> Iterator[Session]:
    """The session that `current` finds while a server app runs; a run has one at a time.

    Raises:
        ConfigError: another process is at work on this run.
    """
    opened = Session(run, shown)
    busy = f"another process is at work on {run.path}; wait for its end, or start a new run"
    with locked(run.path / LOCK, busy):
        token = _current.set(opened)
        try:
            yield opened
        finally:
            _current.reset(token)


def current(name: str, options: dict[str, Any]) -> Session:
    """The engine's session; under Flower's own engines a new one, in `runs/`.

    Args:
        name: of the app; empty if only its files say it.
        options: complete ones.
    """
    found = _current.get()
    if found is not None:
        return found
    name = name or app_name() or "federation"
    config: dict[str, Any] = {
        "app": name,
        "options": options,
        "engine": "flower",
        "versions": versions(),
        "machine": machine(),
    }
    if os.environ.get(UNPROTECTED):
        config["unprotected"] = True
    state = os.environ.get(STATE)
    if state:
        config["populations"] = str(Path(state) / "populations")
        parent: Path | None = Path(state) / "runs"
    else:
        there = asked_from(name)
        parent = None if there is None else there / "runs"
    run = RunDirectory.create(parent, name, config)
    opened = Session(run, progress.choose(sys.stderr), own=True)
    if not state:
        note(run.path)
        opened.progress.note(f"the run is kept in {run.path.absolute()}; umbel runs lists it")
    return opened
