"""The runs that a coordinator which stays (`umbel server --serve`) is asked for.

They wait in the coordinator's database, one after another, each with a number. What becomes of one
is kept there too: a job that cannot be run ends itself, and never the coordinator.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.server.link.enrolment import Enrolment

State = Literal["waiting", "running", "done", "failed", "cancelled"]
_ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
_FACT = "jobs"


@dataclass(frozen=True)
class Job:
    """A run that somebody asked for.

    Attributes:
        number: from 1, in the order of asking.
        changes: to the app's options.
        asked: when, in UTC, as ISO 8601.
        state: what has become of it.
        run: its run directory; empty before it began.
        why: why it failed, in a sentence.
    """

    number: int
    changes: dict[str, Any]
    asked: str
    state: State = "waiting"
    run: str = ""
    why: str = ""

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> "Job":
        """A job as it was kept.

        Raises:
            ConfigError: another release has kept it in another form.
        """
        try:
            job = cls(**kept)
        except TypeError as error:
            raise ConfigError(
                f"a job in the coordinator's database is of no known form: {error}"
            ) from error
        if job.state not in get_args(State):
            raise ConfigError(
                f"job {job.number} is {job.state!r} in the coordinator's database, which this "
                "release does not know; use the release that wrote it"
            )
        return job


class Jobs:
    """The jobs of a coordinator; several processes may hold them at once.

    Attributes:
        enrolment: the coordinator's database, which holds them.
    """

    def __init__(self, enrolment: Enrolment) -> None:
        self.enrolment = enrolment

    def all(self) -> list[Job]:
        """Every job, the first one first."""
        return [Job.read(kept) for kept in self.enrolment.fact(_FACT) or []]

    def of(self, number: int) -> Job:
        """One job.

        Raises:
            ConfigError: there is none of this number.
        """
        for job in self.all():
            if job.number == number:
                return job
        raise ConfigError(f"there is no job {number}; see: umbel jobs --state DIR")

    def add(self, changes: Options) -> Job:
        """Ask for a run."""
        with self._changed() as jobs:
            last = jobs[-1].number if jobs else 0
            job = Job(last + 1, dict(changes), datetime.now(UTC).isoformat(timespec="seconds"))
            jobs.append(job)
        return job

    def begin(self) -> Job | None:
        """The next one that waits, which is running from now on; None where none waits."""
        with self._changed() as jobs:
            for place, job in enumerate(jobs):
                if job.state == "waiting":
                    jobs[place] = replace(job, state="running")
                    return jobs[place]
        return None

    def note(self, number: int, **what: Any) -> None:
        """Keep what has become of a job; one that has ended stays as it is."""
        with self._changed() as jobs:
            for place, job in enumerate(jobs):
                if job.number == number and job.state not in _ENDED:
                    jobs[place] = replace(job, **what)

    def cancel(self, number: int) -> Job:
        """Let a job end: one that waits at once, one that runs at its next safe place.

        Raises:
            ConfigError: there is none of this number, or it has ended.
        """
        job = self.of(number)
        if job.state in _ENDED:
            raise ConfigError(f"job {number} has ended before ({job.state})")
        self.note(number, state="cancelled")
        return job

    @contextmanager
    def _changed(self) -> Iterator[list[Job]]:
        """All jobs, which are kept again as the caller leaves them, in one transaction."""
        with self.enrolment.changed(_FACT) as fact:
            jobs = [Job.read(kept) for kept in fact.value or []]
            yield jobs
            fact.value = [asdict(job) for job in jobs]


@contextmanager
def jobs_in(state: Path) -> Iterator[Jobs]:
    """The jobs in a coordinator's state folder.

    Raises:
        ConfigError: it is none.
    """
    if not (state / "umbel.sqlite").exists():
        raise ConfigError(f"{state} is no coordinator's state; start one with: umbel server")
    with closing(Enrolment(state)) as enrolment:
        yield Jobs(enrolment)


def unfinished_job(enrolment: Enrolment, *, fresh: bool) -> Job | None:
    """The job in which a coordinator died, with which the next one goes on.

    Jobs that had begun, and have no unfinished run, wait again. The unfinished run of a job that
    was cancelled in between is left as it is.

    Args:
        enrolment: the coordinator's database.
        fresh: go on with nothing.
    """
    jobs = Jobs(enrolment)
    for changes in enrolment.fact("submissions") or []:  # as an earlier release kept them
        jobs.add(changes)
    enrolment.keep("submissions", [])
    run = enrolment.fact("run") or {}
    number = None if fresh or run.get("done", True) else run.get("job")
    found: Job | None = None
    for job in jobs.all():
        if job.number == number and job.state == "running":
            found = job
        elif job.number == number:
            enrolment.keep("run", run | {"done": True})
        elif job.state == "running":
            jobs.note(job.number, state="waiting")
    return found
