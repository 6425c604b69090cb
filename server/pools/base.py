"""What a pool is: a place where groups of tasks run, on this machine or on others.

    engine -> pool      start: the app, the options, how many nodes
    engine -> pool      submit: a group of tasks; a future of what came of them
    engine <- pool      the future is done, in whatever thread

The engine keeps the queue, the groups, the nodes' states and the deadlines; a pool only runs what
it is given. So results do not depend on the pool: a task says which seed its random numbers begin
with, and groups are made before a pool sees them.
"""

from __future__ import annotations

import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from flwr.clientapp import ClientApp

from umbel.core.errors import RunError
from umbel.server.embedded.executor import Done, Task

Group: TypeAlias = Sequence[Task]
"""Tasks that are run one after the other, or as one, in one place."""

Results: TypeAlias = "Sequence[Done] | None"
"""What came of a group, task by task; None where the app does not run it as one, so that each of
its tasks should be given by itself."""


class WorkerLostError(RunError):
    """A worker died under a group, and the pool has not run it elsewhere; other groups go on."""


@dataclass(frozen=True)
class Work:
    """What every place that runs tasks of a run must know.

    Attributes:
        app: the app's folder, or an app of this process.
        run_config: the run's options.
        nodes: how many virtual nodes there are.
        threads: of a node's tensor operations.
        log: where the app's own output goes, on this machine.
        token: of this run of this engine, so that a worker loads the app once.
    """

    app: Path | ClientApp
    run_config: Mapping[str, Any]
    nodes: int
    threads: int = 1
    log: Path | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


class Pool(ABC):
    """Runs groups of tasks. A pool of your own has `workers`, `start`, `submit` and `close`.

    Attributes:
        in_process: tasks run in the engine's own process, which has the app already.
        maps_files: tasks may hold memory that is mapped from files of this machine.
    """

    in_process = False
    maps_files = False

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many groups run at the same time, at this moment; 0 where nobody is there yet."""

    @property
    def slots(self) -> int:
        """How many groups are handed over at the same time; more than run hide the way there."""
        return max(1, self.workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, as far as they use this machine's processors."""
        return []

    @abstractmethod
    def start(self, work: Work) -> None:
        """Get ready; called once, before the first group.

        Raises:
            ConfigError: this pool cannot run that, with the cure.
        """

    @abstractmethod
    def submit(self, group: Group) -> Future[Results]:
        """Begin with a group, and return at once.

        The future gets what `umbel.server.pools.work.run_group` gave. An error in it ends the run,
        except a `WorkerLostError`, which costs the nodes of its group their replies.
        """

    def abandon(self, future: Future[Results]) -> None:
        """Nobody waits for this group any longer; what cannot be stopped is forgotten."""
        future.cancel()

    def wait(self, news: threading.Event, timeout: float | None) -> None:
        """Return when `news` is set, or after `timeout` seconds; the engine's thread is here.

        A pool that needs a thread to listen to its workers can do that in this one.
        """
        news.wait(timeout)

    def wake(self) -> None:
        """End a `wait` in another thread whose `news` has just been set."""
        return

    def rest(self) -> None:
        """Nothing is to be done for now: what is held for further groups can be let go."""
        return

    @abstractmethod
    def close(self) -> None:
        """End; what is under way is lost."""
