"""`umbel run`: an app on the embedded engine, with a run directory and a report."""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from umbel.clients.data.examples import ChecksNodes
from umbel.core.errors import ConfigError
from umbel.core.errors import Interrupted as Interrupted
from umbel.core.options import Options, renamed
from umbel.federation import Federation
from umbel.notebook import notebook_progress
from umbel.opening import opened
from umbel.result import Result
from umbel.runner import Prepared, Subject, execute, log_to, prepare
from umbel.server.embedded.grid import EmbeddedGrid, ObservedGrid
from umbel.server.output import progress as showing
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.pools.base import Pool
from umbel.server.pools.choose import DEFAULT, PoolLike, make_pool
from umbel.server.pools.processes import ForkServer
from umbel.server.simulated.devices import Device, devices_of
from umbel.server.simulated.grid import SimulatedGrid
from umbel.strategies.aggregators.named import RobustOptions
from umbel.strategies.compression.options import CompressionOptions
from umbel.strategies.device_options import DeviceOptions
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.secure.options import SecureOptions

NODES = 10
"""Virtual nodes of an app that does not say how many it wants."""


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
        planned = _planned(app, options or {}, nodes, resume, pool)
        for note in planned.prepared.notes:
            shown.note(note)
        place = make_pool(
            planned.pool,
            planned.prepared.options,
            workers=workers,
            processors=_processors(),
            fork_server=nursery,
        )
        try:
            if place.in_process or place.maps_files:  # else the nodes' data are elsewhere
                _check_data(planned)
            directory = _directory(planned, place, out, resume, shown)
        except BaseException:
            place.close()
            raise
        if unprotected:
            directory.write_config({**directory.config(), "unprotected": True})
        found = _executed(planned, place, directory, shown)
        return Result(found, app if isinstance(app, Federation) else None)
    finally:
        if nursery is not None:
            nursery.close()


@dataclass(frozen=True)
class _Planned:
    """A run that has been checked, how many nodes it has, where they run, and what as."""

    prepared: Prepared
    nodes: int
    pool: PoolLike
    devices: Sequence[Device] | None = None


def _planned(
    app: Federation | Path | str | None,
    changes: Options,
    nodes: int | None,
    resume: Path | str | None,
    pool: PoolLike | None,
) -> _Planned:
    began: Options | None = None
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
        check_promise_stays(began, changes)
        check_method_stays(began, changes)
        changes = {**before["changes"], **changes}
    subject = Subject.of(app if isinstance(app, Federation) else opened(app, changes))
    if resume is not None and subject.federation is None:
        raise ConfigError(
            f"{subject.name} keeps its own rounds, so Umbel cannot continue it; only apps made "
            "with Federation can be resumed"
        )
    prepared = prepare(subject, changes, began)
    count = nodes or subject.nodes or NODES
    place = pool or subject.pool or DEFAULT
    return _Planned(prepared, count, place, _devices(prepared, count))


def _devices(prepared: Prepared, nodes: int) -> Sequence[Device] | None:
    """What virtual nodes are like, where their time is simulated."""
    if prepared.federation is None:
        return None
    asked = DeviceOptions.read(prepared.options)
    return devices_of(asked, nodes, int(prepared.options["seed"])) if asked.on else None


def _check_data(planned: _Planned) -> None:
    """Raises:
    ConfigError: the nodes' data cannot be had, or not by so many nodes.
    """
    federation = planned.prepared.federation
    if federation is not None and isinstance(federation.data, ChecksNodes):
        federation.data.check(planned.nodes, planned.prepared.options)


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


def check_method_stays(began: Options, changes: Options) -> None:
    """Refuse to go on with another method than the one whose states and memories there are.

    Raises:
        ConfigError: which option, and what it was.
    """
    kept = {**MethodOptions.defaults(), **CompressionOptions.defaults()}
    for name in ("method", "proximal-mu", *kept):
        before = began.get(name, changes.get(name))
        if name in changes and changes[name] != before:
            raise ConfigError(
                "a run that goes on keeps what its nodes remember something for, so "
                f"{name}={changes[name]} (it was {before}) cannot change; leave it out, or begin a "
                "new run"
            )


def check_promise_stays(began: Options, changes: Options) -> None:
    """Refuse to go on with a run under options that name its ledger or shape what it promises.

    Raises:
        ConfigError: which of them, and what they were.
    """
    shaping = {
        *PrivacyOptions.defaults(),
        *SecureOptions.defaults(),
        *RobustOptions.defaults(),
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
    planned: _Planned,
    pool: Pool,
    out: Path | str | None,
    resume: Path | str | None,
    progress: Progress,
) -> RunDirectory:
    prepared = planned.prepared
    if resume is None:
        config = prepared.config(
            "embedded",
            nodes=planned.nodes,
            run_id=secrets.randbits(62) + 1,
            workers=0 if pool.in_process else pool.workers,
            pool=planned.pool if isinstance(planned.pool, str) else None,
        )
        name = prepared.subject.name
        return RunDirectory.create(None, name, config, out=Path(out) if out else None)
    directory = RunDirectory.open(Path(resume))
    before = directory.config()
    differs = _differences(before, prepared)
    for name, (was, now) in differs.items():
        progress.note(f"{name} changed from {was} to {now}; the run's config.json keeps both")
    if differs:
        told = [
            *before.get("changed", []),
            *({"what": name, "from": was, "to": now} for name, (was, now) in differs.items()),
        ]
        more = {
            "options": prepared.options,
            "changes": prepared.changes,
            "app_hash": prepared.subject.digest,
        }
        directory.write_config({**before, **more, "changed": told})
    return directory


def _differences(before: Mapping[str, Any], prepared: Prepared) -> dict[str, tuple[Any, Any]]:
    """What is no longer as a run began: options by name, and the app's files."""
    began = renamed(before["options"])
    found = {
        name: (began.get(name), prepared.options.get(name))
        for name in sorted({*began, *prepared.options})
        if began.get(name, prepared.options.get(name)) != prepared.options.get(name)
    }
    was, now = before.get("app_hash"), prepared.subject.digest
    if was is None or now is None or was == now:
        return found
    return found | {"the app": (was[:12], now[:12])}


def _executed(
    planned: _Planned, pool: Pool, directory: RunDirectory, progress: Progress
) -> dict[str, Any]:
    prepared = planned.prepared
    whole = prepared.federation is not None
    log_to(directory.log_path, quiet=whole)
    show_fetching(progress)
    kind: Callable[..., EmbeddedGrid] = EmbeddedGrid if whole else ObservedGrid
    if planned.devices is not None:
        kind = partial(SimulatedGrid, devices=planned.devices)
    grid = kind(
        prepared.subject.client,
        planned.nodes,
        pool=pool,
        run_config=prepared.options,
        run_id=directory.config().get("run_id", 1),  # runs of earlier releases had no other
        group_size=prepared.group_size,
        log=directory.log_path,
    )
    try:
        with grid:
            opened = execute(prepared, grid, directory, progress, progress)
    except KeyboardInterrupt:
        raise Interrupted(directory.path if whole else None) from None
    finally:
        progress.finish("")
    return opened.finish()


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
