"""Requests that arrive while a prediction runs are predicted together, next.

Nobody waits for a batch to fill: a request that comes alone is predicted at once. A model whose
batches take next to no time is asked where the requests are read; another one in a thread beside,
so that new requests are read meanwhile.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
QUICK_S = 0.002
"""A batch that takes less than this is not worth the way to another thread and back."""


class OverloadedError(Exception):
    """More rows wait than may."""


@dataclass
class _Waiting:
    x: Array
    done: "asyncio.Future[Array]"


class Batcher:
    """Predicts for many at once; belongs to one event loop.

    Attributes:
        size: rows of a batch, at most, unless one request has more.
        room: rows that may wait.
        batches: how many were predicted.
    """

    def __init__(
        self,
        predict: Callable[[Array], Array],
        *,
        size: int = 256,
        room: int = 8192,
        took: float = 0.0,
    ) -> None:
        """Make one.

        Args:
            predict: inputs of shape (n, ...) to outputs of shape (n, size).
            size: rows of a batch.
            room: rows that may wait.
            took: seconds of the processor that a prediction takes.
        """
        self._predict = predict
        self.size, self.room = size, room
        self.batches = 0
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._running: asyncio.Task[None] | None = None
        self._took = took  # of the last batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")

    async def __call__(self, x: Array) -> Array:
        """Outputs for inputs of shape (n, ...).

        Raises:
            OverloadedError: too many wait already.
            Exception: whatever the model raises.
        """
        if self._rows + len(x) > self.room:
            raise OverloadedError(
                f"{self._rows} inputs wait already, and no more than {self.room} may"
            )
        loop = asyncio.get_running_loop()
        waiting = _Waiting(x, loop.create_future())
        self._queue.append(waiting)
        self._rows += len(x)
        if self._running is None:
            self._running = loop.create_task(self._run())
        return await waiting.done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                batch = self._next()
                if not batch:
                    continue
                x = batch[0].x if len(batch) == 1 else np.concatenate([one.x for one in batch])
                self.batches += 1
                try:
                    if self._took < QUICK_S:
                        outputs = self._timed(x)
                        await asyncio.sleep(0)  # others have their turn between two batches
                    else:
                        outputs = await loop.run_in_executor(self._thread, self._timed, x)
                except Exception as error:
                    for one in batch:
                        if not one.done.done():
                            one.done.set_exception(error)
                    continue
                start = 0
                for one in batch:
                    if not one.done.done():
                        one.done.set_result(outputs[start : start + len(one.x)])
                    start += len(one.x)
        finally:
            self._running = None

    def _timed(self, x: Array) -> Array:
        began = time.thread_time()
        outputs = self._predict(x)
        self._took = time.thread_time() - began
        return outputs

    def _next(self) -> list[_Waiting]:
        """The next requests of one batch; those that nobody waits for any more are left out."""
        batch: list[_Waiting] = []
        rows = 0
        while self._queue and (not batch or rows + len(self._queue[0].x) <= self.size):
            one = self._queue.popleft()
            self._rows -= len(one.x)
            if one.done.done():  # its request ran out of time
                continue
            batch.append(one)
            rows += len(one.x)
        return batch

    async def drain(self) -> None:
        """Wait until everything that was accepted is answered, then end the thread."""
        while self._running is not None:
            await asyncio.shield(self._running)
        self._thread.shutdown(wait=False)
