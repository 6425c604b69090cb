"""The pool without workers: groups run in the engine's thread, when they are submitted."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

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
        return _There(self._loaded.run_here(group))

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()


class _There(Future[Results]):
    """What is there before anybody asks: it needs no lock, whose making is a tenth of a message."""

    def __init__(self, results: Results) -> None:  # without the lock of Future's own
        self._there = results

    def result(self, timeout: float | None = None) -> Results:  # noqa: ARG002
        return self._there

    def exception(self, timeout: float | None = None) -> None:  # noqa: ARG002
        return None

    def cancel(self) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def add_done_callback(self, fn: Callable[[Future[Results]], Any]) -> None:
        fn(self)
