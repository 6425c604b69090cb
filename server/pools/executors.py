"""Pools over `concurrent.futures`: threads of this process, or an executor that a user brings."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor

from umbel.core.errors import ConfigError
from umbel.server.pools.base import Group, Pool, Results, Work
from umbel.server.pools.work import load, run_group, unload


class ExecutorPool(Pool):
    """Runs groups on any `concurrent.futures.Executor`, which stays its owner's.

    Args:
        executor: where functions run. Of processes that are forked, it must not be one: a process
            that has used tensor operations hangs when it is forked; take the context `spawn`.
        workers: how many groups it runs at the same time.

    Raises:
        ConfigError: `workers` is below 1.
    """

    def __init__(self, executor: Executor, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers is {workers}; an executor needs at least 1")
        self._executor, self._workers = executor, workers
        self.in_process = isinstance(executor, ThreadPoolExecutor)
        self._work: Work | None = None

    @property
    def workers(self) -> int:
        return self._workers

    def start(self, work: Work) -> None:
        self._work = work
        if self.in_process:
            load(work)
        else:
            self._executor.submit(load, work).result()

    def submit(self, group: Group) -> Future[Results]:
        assert self._work is not None
        return self._executor.submit(run_group, self._work, group)

    def close(self) -> None:
        if self._work is not None and self.in_process:
            unload(self._work)


class Threads(ExecutorPool):
    """Threads of this process.

    Nodes take turns, because the random generators that they draw from belong to the process; what
    is gained is that the coordinator works meanwhile, and that no process is started.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers is {workers}, but threads need at least 1")
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="umbel-node")
        super().__init__(self._threads, workers)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()
