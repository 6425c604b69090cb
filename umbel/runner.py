"""Every run of an app, on whatever engine: prepared, then executed.

    app + changes --prepare--> known app, checked options --execute--> a result
                     |                        |
                  refused               a run directory, an engine's grid

`umbel run`, `umbel server` and Flower's own engine differ in where messages go and in how long a
process lives; what is read, checked, written down and shown is here, once.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from umbel.clients.trainers.base import SizesGroups
from umbel.core.app_folder import AppFolder
from umbel.core.errors import ConfigError
from umbel.core.options import Options, override, renamed, renaming_notes
from umbel.federation import Federation, FederationServerApp
from umbel.server.drive import simulates
from umbel.server.kept_model import watching_strategies
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory, machine, versions
from umbel.server.output.session import Session, session
from umbel.server.round_recorder import RoundRecorder
from umbel.strategies.device_options import NONE
from umbel.strategies.private.options import PrivacyOptions

CANNOT_GO_ON = (
    "this app keeps its own rounds, so a run of it cannot go on later: started again, it begins "
    "at round 1 (apps made with Federation go on where they were)"
)


@dataclass(frozen=True)
class Subject:
    """What is run: an app's folder, or a `Federation` object of this process.

    Attributes:
        name: as it is shown.
        path: of the folder; None is an object.
        digest: of the folder's files; None is an object.
        options: of the app's pyproject.
        nodes: how many virtual nodes the app asks for, or None.
        pool: where the app says that its nodes run, or None.
        server_app: the coordinator's half.
        client: the nodes' half, or where it is imported from.
    """

    name: str
    path: Path | None
    digest: str | None
    options: Mapping[str, Any]
    nodes: int | None
    pool: str | None
    server_app: ServerApp
    client: ClientApp | Path

    @classmethod
    def of(cls, app: Federation | AppFolder) -> "Subject":
        """The subject that an app is; a folder's server app is imported.

        Raises:
            ConfigError: it does not import.
        """
        if isinstance(app, Federation):
            name = app.name or "federation"
            return cls(name, None, None, {}, None, None, app.server_app(), app.client_app())
        server = app.server_app()
        return cls(
            app.name, app.path, app.digest(), app.options, app.nodes, app.pool, server, app.path
        )

    @property
    def federation(self) -> Federation | None:
        """The app's; None of an app that keeps its own rounds."""
        app = self.server_app
        return app.federation if isinstance(app, FederationServerApp) else None


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and can start.

    Attributes:
        subject: what is run.
        known: the options before anybody changed some.
        options: complete ones.
        notes: what a person should know of the options, in sentences.
    """

    subject: Subject
    known: Mapping[str, Any]
    options: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def federation(self) -> Federation | None:
        """The subject's."""
        return self.subject.federation

    @property
    def changes(self) -> dict[str, Any]:
        """The options that are others than the app's own."""
        return {name: v for name, v in self.options.items() if self.known.get(name) != v}

    @property
    def group_size(self) -> int:
        """How many nodes the app would train as one computation."""
        if self.federation is None:
            return 1
        trainer = self.federation.trainer_for(self.options)
        return trainer.group_size(self.options) if isinstance(trainer, SizesGroups) else 1

    def config(self, engine: str, **more: Any) -> dict[str, Any]:
        """What is written down of a new run: the `config.json` of its directory."""
        subject = self.subject
        return {
            "app": subject.name,
            "app_path": None if subject.path is None else str(subject.path),
            "app_hash": subject.digest,
            "options": self.options,
            "changes": self.changes,
            "engine": engine,
            **more,
            "versions": versions(),
            "machine": machine(),
            "command": sys.argv,
        }


def prepare(subject: Subject, changes: Options, began: Options | None = None) -> Prepared:
    """Check what is to be run, before there is a directory, a process or a message.

    Args:
        subject: what is run.
        changes: to the app's options.
        began: the options that a run which goes on began with; they go before the app's defaults.

    Raises:
        ConfigError: an unknown option, or a value that cannot be used.
        StackError: layers that do not fit together.
    """
    PrivacyOptions.check_given(changes)
    notes = tuple(renaming_notes({**subject.options, **changes}))
    federation = subject.federation
    if federation is None:
        known = dict(subject.options)
        return Prepared(subject, known, override(known, changes))
    known = federation.complete(subject.options)
    start = known if began is None else {**known, **renamed(began)}
    options = federation.override(start, changes)
    federation.check_options(options)
    return Prepared(subject, known, options, notes)


def execute(
    prepared: Prepared, grid: Grid, directory: RunDirectory, shown: Progress, spoken: Progress
) -> Session:
    """Run a prepared app over an engine's grid; its session, which is still to be finished.

    Args:
        prepared: the run.
        grid: the engine; one that takes notes for an app that keeps its own rounds.
        directory: where the run is written down.
        shown: where the rounds are shown.
        spoken: where sentences are.
    """
    devices = str(prepared.options.get("devices", NONE))
    if prepared.federation is not None and devices != NONE and not simulates(grid):
        raise ConfigError(
            f"devices={devices} simulates how long virtual nodes take, and the nodes of this "
            "engine are real; leave it out, or run the app on one machine: umbel run"
        )
    server = prepared.subject.server_app
    context = Context(grid.run.run_id, 1, {}, RecordDict(), dict(prepared.options))
    with session(directory, shown) as opened:
        if isinstance(grid, RoundRecorder):
            opened.result |= own_rounds(server, grid, context, directory, spoken)
        else:
            server(grid, context)
    return opened


def own_rounds(
    app: ServerApp, grid: Any, context: Context, directory: RunDirectory, progress: Progress
) -> dict[str, Any]:
    """Run an app that keeps its own rounds; what its result says of them.

    What was seen of a run that is stopped or fails is written down all the same.

    Args:
        app: the app.
        grid: a `Grid` that is a `RoundRecorder` too.
        context: of the app.
        directory: where the run is written down.
        progress: where a person watches.
    """
    try:
        with watching_strategies(grid.model):
            app(grid, context)
    except BaseException as problem:
        seen = grid.finish(directory)
        if isinstance(problem, KeyboardInterrupt):
            progress.note(f"stopped after {seen['rounds']} rounds; {CANNOT_GO_ON}")
        progress.note(seen["model"])
        raise
    result: dict[str, Any] = grid.finish(directory)
    progress.note(result["model"])
    grid.check_trained()
    return result


def log_to(path: Path, *, quiet: bool) -> None:
    """Flower's log goes to the run's log.txt; for apps that speak through it, to stderr too."""
    logger = logging.getLogger("flwr")
    for handler in list(logger.handlers):
        if quiet or isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
