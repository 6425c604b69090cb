"""`umbel run`: an app on the embedded engine, with a run directory and a report."""

import logging
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from umbel.clients.trainers.base import SizesGroups
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.core.options import Options, override
from umbel.federation import Federation, FederationServerApp
from umbel.notebook import notebook_progress
from umbel.result import Result
from umbel.server.embedded.grid import EmbeddedGrid, ObservedGrid
from umbel.server.kept_model import watching_strategies
from umbel.server.link.grid import ObservedLinkGrid
from umbel.server.output import progress as showing
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory, machine, versions
from umbel.server.output.session import session
from umbel.server.pools.base import Pool
from umbel.server.pools.choose import DEFAULT, PoolLike, make_pool
from umbel.server.pools.processes import ForkServer
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.secure.options import SecureOptions

CANNOT_GO_ON = (
    "this app keeps its own rounds, so a run of it cannot go on later: started again, it begins "
    "at round 1 (apps made with Federation go on where they were)"
)
NODES = 10
"""Virtual nodes of an app that does not say how many it wants."""
EXAMPLES = Path(__file__).parent / "examples"
Observed = ObservedGrid | ObservedLinkGrid


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; it can go on from its directory `run`, where there is one."""

    def __init__(self, run: Path | None) -> None:
        super().__init__("" if run is None else str(run))
        self.run = run


def run(
    app: Federation | Path | str | None = None,
    *,
    options: Options | None = None,
    nodes: int | None = None,
    workers: int | None = None,
    pool: PoolLike | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    unprotected: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run an app on this machine.

    Args:
        app: the app's folder, or a `Federation` object, which is trained in this process; the
            bundled example if None.
        options: change those of the app's `[tool.flwr.app.config]`.
        nodes: virtual nodes; as many as the app says, else 10, if None.
        workers: worker processes; one a core if None; 0 runs the nodes in this process, as it is
            with a `Federation` object, whose functions other processes could not import.
        pool: where the nodes run, in place of this machine's processes: the name of a pool, a
            `Pool`, or any `concurrent.futures.Executor`; what the app says if None.
        out: the run directory; a new one under `runs/` if None.
        resume: a run directory to continue, in place of `app`.
        unprotected: release models without noise about people to whom privacy was promised
            before; their ledger says so from then on.
        progress: where to show what happens; a notebook's cell or standard error if None.

    Returns:
        What `umbel run --json` prints, with the model, the rounds and the plots.

    Raises:
        ConfigError: a value that cannot be used.
        RunError: the run could not go on.
        Interrupted: by Ctrl-C; the run directory can be resumed.

    >>> run("my-app", options={"rounds": 5})["metrics"]  # doctest: +SKIP
    """
    if isinstance(app, Federation) and pool is None:
        if workers:
            raise ConfigError(
                f"workers is {workers}, but a Federation object is trained in this process; leave "
                "workers out, or make an app folder of it: umbel new NAME"
            )
        workers = 0
    early = workers != 0 and pool in (None, DEFAULT)  # it takes a second, and the app another
    nursery = ForkServer(preload=["umbel.federation"]) if early else None
    try:
        shown = progress or notebook_progress() or showing.choose(sys.stderr)
        plan = _plan(app, options or {}, nodes, resume, pool)
        place = make_pool(
            plan.pool,
            plan.options,
            workers=workers,
            processors=_processors(),
            fork_server=nursery,
        )
        try:
            directory = _directory(plan, place, out, resume, shown)
        except BaseException:
            place.close()
            raise
        if unprotected:
            directory.write_config({**directory.config(), "unprotected": True})
        found = _execute(plan, place, directory, shown)
        return Result(found, app if isinstance(app, Federation) else None)
    finally:
        if nursery is not None:
            nursery.close()


@dataclass(frozen=True)
class _Plan:
    """A run that has been checked and can start."""

    subject: "_Subject"
    options: dict[str, Any]
    nodes: int
    pool: PoolLike

    @property
    def federation(self) -> Federation | None:
        return self.subject.federation

    @property
    def group_size(self) -> int:
        """How many nodes the app would train as one computation."""
        if self.federation is None:
            return 1
        trainer = self.federation.trainer_for(self.options)
        return trainer.group_size(self.options) if isinstance(trainer, SizesGroups) else 1


@dataclass(frozen=True)
class _Subject:
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

    @property
    def federation(self) -> Federation | None:
        app = self.server_app
        return app.federation if isinstance(app, FederationServerApp) else None


def _subject(app: Federation | Path | str | None) -> _Subject:
    if isinstance(app, Federation):
        name = app.name or "federation"
        return _Subject(name, None, None, {}, None, None, app.server_app(), app.client_app())
    folder = open_app(Path(app) if app is not None else example())
    server = folder.server_app()
    return _Subject(
        folder.name,
        folder.path,
        folder.digest(),
        folder.options,
        folder.nodes,
        folder.pool,
        server,
        folder.path,
    )


def _plan(
    app: Federation | Path | str | None,
    changes: Options,
    nodes: int | None,
    resume: Path | str | None,
    pool: PoolLike | None,
) -> _Plan:
    began: Mapping[str, Any] = {}
    if resume is not None:
        before = _before(Path(resume))
        nodes, began = before["nodes"], before["options"]
        pool = before.get("pool") if pool is None else pool
        if not isinstance(app, Federation):
            app = before["app_path"]
            if app is None:
                raise ConfigError(
                    f"{resume} is a run of a Federation object; continue it where that object is: "
                    "umbel.run(federation, resume=...)"
                )
        changes = {**before["changes"], **changes}
    subject = _subject(app)
    federation = subject.federation
    known: Mapping[str, Any] = subject.options
    if federation is not None:
        # a run goes on with what it began with, whatever the app's own defaults are by now
        known = {**federation.complete(subject.options), **began}
    elif resume is not None:
        raise ConfigError(
            f"{subject.name} keeps its own rounds, so Umbel cannot continue it; only apps made "
            "with Federation can be resumed"
        )
    PrivacyOptions.check_given(changes)
    if resume is not None:
        check_promise_stays(began, changes)
    options = (federation.override if federation else override)(known, changes)
    if federation is not None:
        federation.check_options(options)
    pool = pool or subject.pool or DEFAULT
    return _Plan(subject, options, nodes or subject.nodes or NODES, pool)


def _before(resume: Path) -> dict[str, Any]:
    """The configuration of a run that is to go on."""
    before = RunDirectory.open(resume).config()
    if not {"app_path", "nodes", "options", "changes"} <= before.keys():
        engine = before.get("engine", "unknown")
        raise ConfigError(
            f"{resume} is a run of the engine {engine!r}, which cannot go on here; only runs "
            "that `umbel run` began can"
        )
    return before


def example(name: str = "fashion") -> Path:
    """A bundled example: beside this file in a wheel, in `examples/` in a checkout."""
    if (EXAMPLES / name).is_dir():
        return EXAMPLES / name
    return Path(__file__).resolve().parent.parent / "examples" / name


def check_promise_stays(began: Options, changes: Options) -> None:
    """Refuse to go on with a run under options that name its ledger or shape what it promises.

    Raises:
        ConfigError: which of them, and what they were.
    """
    shaping = {
        *PrivacyOptions.defaults(),
        *SecureOptions.defaults(),
        *("cohort", "cohort-size", "cohort-cap", "buffers"),
    }
    other = [
        f"{name}={value} (it was {began[name]})"
        for name, value in changes.items()
        if (name in shaping or name.startswith("example-"))
        and name in began
        and began[name] != value
    ]
    if other:
        raise ConfigError(
            f"a run that goes on keeps what its promise is made of, so {', '.join(other)} cannot "
            "change; leave it out, or begin a new run"
        )


def _directory(
    plan: _Plan, pool: Pool, out: Path | str | None, resume: Path | str | None, progress: Progress
) -> RunDirectory:
    subject = plan.subject
    known: Mapping[str, Any] = subject.options
    if plan.federation is not None:
        known = plan.federation.complete(subject.options)
    changes = {k: v for k, v in plan.options.items() if known.get(k) != v}
    if resume is not None:
        directory = RunDirectory.open(Path(resume))
        before = directory.config()
        differs = _differences(before, plan)
        for name, (was, now) in differs.items():
            progress.note(f"{name} changed from {was} to {now}; the run's config.json keeps both")
        if differs:
            told = [
                *before.get("changed", []),
                *({"what": name, "from": was, "to": now} for name, (was, now) in differs.items()),
            ]
            more = {"options": plan.options, "changes": changes, "app_hash": subject.digest}
            directory.write_config({**before, **more, "changed": told})
        return directory
    config = {
        "app": subject.name,
        "app_path": None if subject.path is None else str(subject.path),
        "app_hash": subject.digest,
        "options": plan.options,
        "changes": changes,
        "nodes": plan.nodes,
        "engine": "embedded",
        "run_id": secrets.randbits(62) + 1,
        "workers": 0 if pool.in_process else pool.workers,
        "pool": plan.pool if isinstance(plan.pool, str) else None,
        "versions": versions(),
        "machine": machine(),
        "command": sys.argv,
    }
    return RunDirectory.create(None, subject.name, config, out=Path(out) if out else None)


def _differences(before: Mapping[str, Any], plan: _Plan) -> dict[str, tuple[Any, Any]]:
    """What is no longer as a run began: options by name, and the app's files."""
    began = before["options"]
    found = {
        name: (began.get(name), plan.options.get(name))
        for name in sorted({*began, *plan.options})
        if began.get(name) != plan.options.get(name)
    }
    was, now = before.get("app_hash"), plan.subject.digest
    if was is None or now is None or was == now:
        return found
    return found | {"the app": (was[:12], now[:12])}


def _execute(
    plan: _Plan, pool: Pool, directory: RunDirectory, progress: Progress
) -> dict[str, Any]:
    log_to(directory.log_path, quiet=plan.federation is not None)
    show_fetching(progress)
    kind = EmbeddedGrid if plan.federation is not None else ObservedGrid
    grid = kind(
        plan.subject.client,
        plan.nodes,
        pool=pool,
        run_config=plan.options,
        run_id=directory.config().get("run_id", 1),  # runs of earlier releases had no other
        group_size=plan.group_size,
        log=directory.log_path,
        mapped=plan.federation is not None,
    )
    server = plan.subject.server_app
    context = Context(grid.run.run_id, 1, {}, RecordDict(), dict(plan.options))
    try:
        with grid, session(directory, progress) as current:
            if isinstance(grid, ObservedGrid):
                current.result |= own_rounds(server, grid, context, directory, progress)
            else:
                server(grid, context)
    except KeyboardInterrupt:
        raise Interrupted(directory.path if plan.federation is not None else None) from None
    finally:
        progress.finish("")
    return current.finish()


def own_rounds(
    app: ServerApp, grid: Observed, context: Context, directory: RunDirectory, progress: Progress
) -> dict[str, Any]:
    """Run an app that keeps its own rounds; what its result says of them.

    What was seen of a run that is stopped or fails is written down all the same.
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
    result = grid.finish(directory)
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


class _Notes(logging.Handler):
    """Shows log records where the progress is shown."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said != self._last:  # a fetch says the same until something else happens
            self._progress.note(said)
        self._last = said


def show_fetching(progress: Progress) -> None:
    """Say so when a data set has to be fetched first."""
    logger = logging.getLogger("umbel.clients.data.datasets")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Notes(progress)]


def _processors() -> int:
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
