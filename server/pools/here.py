"""The pool without workers: groups run in the engine's thread, when they are submitted."""

from concurrent.futures import Future

from umbel.server.pools.base import Group, Pool, Results, Work
from umbel.server.pools.work import Loaded


class Here(Pool):
    """Runs groups at once, in this process."""

    in_process = True
    _loaded: Loaded | None = None

    @property
    def workers(self) -> int:
        return 1

    def start(self, work: Work) -> None:
        self._loaded = Loaded(work)

    def submit(self, group: Group) -> Future[Results]:
        assert self._loaded is not None
        future: Future[Results] = Future()
        future.set_result(self._loaded.run_here(group))
        return future

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
