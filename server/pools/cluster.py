"""What pools on clusters share: contents that travel once, and how many workers there are."""

import threading
import time
import weakref
from abc import abstractmethod
from concurrent.futures import Future
from typing import Any

from umbel.server.embedded.packing import Packed
from umbel.server.pools.base import Pool, Results

COUNT_EVERY_S = 1.0
"""How often a cluster is asked how many workers there are."""
AHEAD = 2
"""Groups for each worker that are handed over at the same time, to hide the way there."""


class ClusterPool(Pool):
    """Runs groups on machines that come and go."""

    def __init__(self) -> None:
        self._contents: dict[int, tuple[Packed, Any]] = {}
        self._handed: weakref.WeakKeyDictionary[Future[Results], Any] = weakref.WeakKeyDictionary()
        """What the cluster knows a future by."""
        self._count = 0
        self._counted = 0.0
        self._closed = False
        self._turn = threading.Lock()

    @abstractmethod
    def _workers_now(self) -> int:
        """How many groups run at a time; asks the cluster.

        Raises:
            RunError: it is gone.
        """

    @abstractmethod
    def _put(self, thing: Any) -> Any:
        """The thing where workers get it."""

    @property
    def workers(self) -> int:
        if time.monotonic() - self._counted >= COUNT_EVERY_S:
            self._count = self._workers_now()
            self._counted = time.monotonic()
        return self._count

    @property
    def slots(self) -> int:
        return max(1, AHEAD * self.workers)

    def _content(self, content: Packed) -> Any:
        """The content where workers get it; what is sent no longer is let go."""
        if id(content) not in self._contents:
            self._contents = {id(content): (content, self._put(content))}
        return self._contents[id(content)][1]

    def rest(self) -> None:
        """Let the last contents go."""
        with self._turn:
            self._contents.clear()
