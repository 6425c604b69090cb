"""`umbel server`: an app on the link engine, over runs, restarts and signals."""

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError, UmbelError, described
from umbel.core.options import Options
from umbel.jobs import Job, Jobs, jobs_in, unfinished_job
from umbel.opening import check_changes
from umbel.runner import CANNOT_GO_ON, Prepared, Subject, execute, log_to, prepare
from umbel.server.link.grid import LinkGrid, ObservedLinkGrid, StoppedError
from umbel.server.link.room import MARGIN
from umbel.server.link.service import ServerSettings, Service, WatchedProgress
from umbel.server.output import progress as showing
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.round_recorder import RoundRecorder

log = logging.getLogger("umbel.server")
_FIRST_MODEL = 1 << 30
"""Bytes that a reply may have where an app asks a node for the first model."""


@dataclass(frozen=True)
class RunSettings:
    """What a server process runs.

    Attributes:
        app: the app's folder.
        changes: to the app's options.
        nodes: how many nodes to wait for before a run; 0 is all that are enrolled.
        enough: share of a round's training replies that is waited for.
        stay: take further runs after the first.
        fresh: begin a new run even if an unfinished one is there.
        out: the run directory; one in the state folder if None.
        largest_reply: bytes of the largest reply that is taken; 0 goes by what was asked.
        unprotected: release models without noise about nodes that have a privacy budget.
    """

    app: Path
    changes: Options = field(default_factory=dict)
    nodes: int = 0
    enough: float = 1.0
    stay: bool = False
    fresh: bool = False
    out: Path | None = None
    largest_reply: int = 0
    unprotected: bool = False


def serve(
    settings: ServerSettings,
    run: RunSettings,
    *,
    version: str,
    progress: Progress | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a coordinator until its run has ended, or for ever with `run.stay`.

    Returns:
        What `umbel server --json` prints, of the last run.

    Raises:
        ConfigError: a value that cannot be used.
        RunError: the run could not go on.
        StoppedError: by a signal; started again on the same state, the run goes on.
    """
    folder = open_app(run.app)
    subject = Subject.of(folder)
    shown = progress or showing.choose(sys.stderr)
    service = Service(settings, version=version, app_digest=folder.digest())
    ended = False
    with _signals(service) as current:
        try:
            service.start()
            shown.note(f"listening on {service.status()['address']}")
            jobs = Jobs(service.enrolment)
            current.job, fresh = unfinished_job(service.enrolment, fresh=run.fresh), run.fresh
            while True:
                result = None if fresh else _ended_before(service, shown)
                if result is None and current.job is None:
                    result = _prepared_run(
                        service, subject, run.changes, run, shown, current, fresh
                    )
                elif result is None:
                    result = _job_run(service, subject, jobs, run, shown, current, fresh)
                if result is not None:
                    if current.job is not None:
                        jobs.note(current.job.number, state="done")
                    on_result(result)
                if not run.stay:
                    ended = True
                    return result or {}
                current.idle = True
                current.job, fresh = _next_job(service, jobs, shown, current), True
                current.idle = False
        except StoppedError as stop:
            stop.number, stop.idle = current.number, current.idle
            raise
        finally:
            service.stop(for_good=ended)


def _prepared_run(
    service: Service,
    subject: Subject,
    changes: Options,
    run: RunSettings,
    shown: Progress,
    current: "_Current",
    fresh: bool,
) -> dict[str, Any]:
    """Check a run, plan it and let it run; its result."""
    prepared = prepare(subject, changes)
    for note in prepared.notes:
        shown.note(note)
    plan = _plan(service, prepared, run, changes, fresh=fresh, job=current.job)
    if current.job is not None:
        Jobs(service.enrolment).note(current.job.number, run=str(plan.directory.path.absolute()))
    return _execute(service, plan, run, shown, current)


def _job_run(
    service: Service,
    subject: Subject,
    jobs: Jobs,
    run: RunSettings,
    shown: Progress,
    current: "_Current",
    fresh: bool,
) -> dict[str, Any] | None:
    """A job to its end; its result, or None where it has none. It never ends the coordinator.

    Raises:
        StoppedError: the coordinator was told to stop; started again, the job goes on.
    """
    job = current.job
    assert job is not None
    why = ""
    try:
        with _watching(service, jobs, current):
            return _prepared_run(service, subject, job.changes, run, shown, current, fresh)
    except StoppedError:
        if current.number or not current.cancelled:
            raise
        why = "it was cancelled"
    except UmbelError as error:
        why = str(error)
    except Exception as error:
        log.exception("job %d", job.number)
        why = described(error)
    shown.note(f"job {job.number} has ended without a result: {why}")
    jobs.note(job.number, state="failed", why=why)
    before = service.enrolment.fact("run")
    if before is not None and before.get("job") == job.number:
        service.enrolment.keep("run", before | {"done": True})
    return None


@contextlib.contextmanager
def _watching(service: Service, jobs: Jobs, current: "_Current") -> Iterator[None]:
    """Stop the run at its next safe place once its job is cancelled."""
    over, job = threading.Event(), current.job

    def watch() -> None:
        seen = None
        while job is not None and not over.wait(0.5):
            version = service.enrolment.version()
            if version != seen and jobs.of(job.number).state == "cancelled":
                current.cancelled = True
                service.changed.set()
            seen = version
            if current.cancelled and current.grid is not None:
                current.grid.stopping = True

    watcher = threading.Thread(target=watch, name="umbel-cancel", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def submit(state: Path, changes: Options) -> Job:
    """Ask a server that stays (`--serve`) for another run, with these options.

    Raises:
        ConfigError: no state of a coordinator, or options that its app cannot have.
    """
    with jobs_in(state) as jobs:
        _check_submission(jobs.enrolment.fact("run"), changes)
        return jobs.add(changes)


def _check_submission(last: Mapping[str, Any] | None, changes: Options) -> None:
    """Refuse here what the server would refuse, as far as its app is known by its last run.

    Raises:
        ConfigError: a value that no run of the app can have.
    """
    if last is None or not Path(last["path"]).is_dir():
        return
    app = RunDirectory(Path(last["path"])).config().get("app_path")
    if app is not None and Path(app).is_dir():
        check_changes(open_app(Path(app)), changes)


@dataclass(frozen=True)
class _Plan:
    prepared: Prepared
    directory: RunDirectory
    run_id: int
    again: bool = False
    """Whether an earlier process of this server has begun with it."""


@dataclass
class _Current:
    """What a signal must reach."""

    grid: LinkGrid | None = None
    number: int = 0
    idle: bool = False
    job: Job | None = None
    cancelled: bool = False

    def check(self) -> None:
        if self.number or self.cancelled:
            raise StoppedError


def _ended_before(service: Service, shown: Progress) -> dict[str, Any] | None:
    """The result of a run that the database holds for unfinished, and that has ended.

    A copy of the database from the middle of the run was put back, or the server was killed
    between the run's result and the note of it.
    """
    before = service.enrolment.fact("run")
    if before is None or before["done"] or not Path(before["path"]).is_dir():
        return None
    result = RunDirectory(Path(before["path"])).result()
    if not result:
        return None
    shown.note(
        f"{before['path']} has ended, which the database did not know yet (is it a copy from "
        "before its end?); here is its result, and the next start begins a new run"
    )
    service.enrolment.keep("run", before | {"done": True})
    return result


def _plan(
    service: Service,
    prepared: Prepared,
    run: RunSettings,
    changes: Mapping[str, Any],
    *,
    fresh: bool,
    job: Job | None,
) -> _Plan:
    """The unfinished run of this state, or a new one."""
    digest = prepared.subject.digest
    before = None if fresh else service.enrolment.fact("run")
    if before is not None and not before["done"]:
        if before["changes"] != dict(changes) or before["app_digest"] != digest:
            raise ConfigError(
                f"{before['path']} is unfinished, and was started with another app or other "
                "options; use those again, or begin anew with --fresh"
            )
        directory = RunDirectory.open(Path(before["path"]))
        if run.unprotected:
            directory.write_config({**directory.config(), "unprotected": True})
        run_id = before["run_id"]
        if prepared.federation is None:  # its nodes shall begin anew with it
            run_id = secrets.randbits(62) + 1
            service.enrolment.keep("run", {**before, "run_id": run_id})
        return _Plan(prepared, directory, run_id, again=True)
    run_id = secrets.randbits(62) + 1
    config = prepared.config(
        "link",
        nodes=run.nodes or None,
        populations=str((service.settings.state / "populations").absolute()),
        enough=run.enough,
        **({"unprotected": True} if run.unprotected else {}),
    )
    out = run.out if not fresh or run.fresh else None
    name = prepared.subject.name
    directory = RunDirectory.create(service.settings.state / "runs", name, config, out=out)
    position = {
        "path": str(directory.path.absolute()),
        "run_id": run_id,
        "changes": dict(changes),
        "app_digest": digest,
        "job": None if job is None else job.number,
        "done": False,
    }
    service.enrolment.keep("run", position)
    return _Plan(prepared, directory, run_id)


def _execute(
    service: Service, plan: _Plan, run: RunSettings, shown: Progress, current: _Current
) -> dict[str, Any]:
    keeps_rounds = plan.prepared.federation is None
    log_to(plan.directory.log_path, quiet=not keeps_rounds)
    if plan.again and keeps_rounds:
        shown.note(f"{plan.directory.path} was stopped before its end; {CANNOT_GO_ON}")
        plan.directory.truncate_rounds(-1)
    service.position |= {"run": str(plan.directory.path.absolute()), "phase": "waiting"}
    last = max((line["round"] for line in plan.directory.rounds()), default=0)
    service.position |= {"round": last, "metrics": {}, "epsilon": None, "round_seconds": None}
    service.wait_for_nodes(run.nodes, shown.note, current.check)
    kind = ObservedLinkGrid if keeps_rounds else LinkGrid
    grid = kind(
        service.hub,
        run_id=plan.run_id,
        run_config=plan.prepared.options,
        enough=run.enough,
        largest=run.largest_reply,
        margin=_FIRST_MODEL if keeps_rounds else MARGIN,
    )
    if isinstance(grid, RoundRecorder):
        grid.on_note = service.stand
    current.grid = grid
    current.check()
    service.position["phase"] = "training"
    try:
        watched = WatchedProgress(shown, service)
        opened = execute(plan.prepared, grid, plan.directory, watched, shown)
    except BaseException as problem:
        stopped = isinstance(problem, KeyboardInterrupt)
        again = "" if keeps_rounds else "stopped; started again, the run goes on"
        shown.finish(again if stopped else "")
        raise
    finally:
        current.grid = None
    result = opened.finish()
    service.enrolment.keep("run", (service.enrolment.fact("run") or {}) | {"done": True})
    service.position["phase"] = "finished"
    return result


def _next_job(service: Service, jobs: Jobs, shown: Progress, current: _Current) -> Job:
    shown.note("waiting for another run: umbel submit --state DIR")
    current.cancelled = False
    while True:
        current.check()
        job = jobs.begin()
        if job is not None:
            return job
        service.changed.wait(timeout=0.5)
        service.changed.clear()


@contextlib.contextmanager
def _signals(service: Service) -> Iterator[_Current]:
    """SIGTERM and Ctrl-C end the run at the next safe place; a second one ends it at once.

    At once is as good as kill -9, which loses nothing: no order is left to keep, and an exception
    in the middle of the first signal's order would only be a traceback.
    """
    current = _Current()

    def stop(number: int, _: Any) -> None:
        if current.number:
            os.write(2, b"umbel: a second signal; ended at once, which loses nothing\n")
            os._exit(128 + number)
        current.number = number
        log.info("stopping on signal %d", number)
        service.changed.set()
        if current.grid is not None:
            current.grid.stopping = True

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller stops us
        before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield current
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


__all__ = ["RunSettings", "ServerSettings", "serve", "submit"]
