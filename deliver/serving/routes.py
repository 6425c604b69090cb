"""Which model answers a request: the one in use, or for some requests a second one beside it.

Rolling over to another model replaces the one in use between two batches: what was accepted by the
old one is answered by the old one, and no request is dropped.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.core.errors import ConfigError
from umbel.deliver.made_up import example_of
from umbel.deliver.predictor import Predictor
from umbel.deliver.serving.batching import Batcher

Array = np.ndarray[Any, Any]


@dataclass
class Line:
    """A model in use, and what waits for it."""

    predictor: Predictor
    batcher: Batcher

    @classmethod
    def of(cls, predictor: Predictor, room: int) -> "Line":
        """A line for a model that has been tried once.

        Raises:
            ConfigError: it does not predict what its signature says.
        """
        outputs = predictor.predict(example_of(predictor.signature.inputs))
        began = time.thread_time()
        predictor.predict(example_of(predictor.signature.inputs))
        took = time.thread_time() - began
        size = int(np.prod(outputs.shape[1:], dtype=np.int64))
        if size != predictor.signature.size:
            raise ConfigError(
                f"{predictor.path} gives {size} numbers for an input, but its signature says "
                f"{predictor.signature.size}; export it again"
            )
        return cls(predictor, Batcher(predictor.predict, room=room, took=took))


class Routes:
    """The model in use (A), and perhaps a second one (B) that gets a share of the requests.

    Attributes:
        share: of the requests that B answers.
        rolled: how often A was replaced.
    """

    def __init__(
        self, first: Predictor, second: Predictor | None, *, share: float = 0.5, room: int = 8192
    ) -> None:
        """Open the lines.

        Args:
            first: A.
            second: B, which has to take and give the same.
            share: of the requests that B answers, from 0 to 1.
            room: inputs that may wait for each.

        Raises:
            ConfigError: the two models are not of one kind.
        """
        self._room = room
        self._line = Line.of(first, room)
        self._second = None if second is None else Line.of(second, room)
        if second is not None:
            check_alike(first, second)
        self.share = share if second is not None else 0.0
        self.rolled = 0
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def first(self) -> Predictor:
        """A, as it is now."""
        return self._line.predictor

    @property
    def second(self) -> Predictor | None:
        """B."""
        return None if self._second is None else self._second.predictor

    def choose(self, user: str | None) -> Line:
        """Who answers: of a user always the same one, of others by chance."""
        if self._second is None:
            return self._line
        if user is None:
            draw = random.random()
        else:
            digest = hashlib.sha256(user.encode()).digest()
            draw = int.from_bytes(digest[:8], "big") / 2**64
        return self._second if draw < self.share else self._line

    async def roll(self, load: Callable[[], Predictor]) -> Predictor:
        """Replace A by what `load` opens, in a thread, while A goes on answering.

        Raises:
            ConfigError: the new model cannot be opened, or is not of A's kind; A stays.
        """
        line = await asyncio.get_running_loop().run_in_executor(
            None, lambda: Line.of(load(), self._room)
        )
        check_alike(self.first, line.predictor)
        old, self._line = self._line, line
        self.rolled += 1
        task = asyncio.create_task(old.batcher.drain())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
        return line.predictor

    async def drain(self) -> None:
        """Wait until all that was accepted is answered."""
        for line in (self._line, self._second):
            if line is not None:
                await line.batcher.drain()
        await asyncio.gather(*self._draining)


def check_alike(one: Predictor, other: Predictor) -> None:
    """Refuse to put a model in the place of one that takes or gives something else.

    Raises:
        ConfigError: what differs.
    """
    mine, theirs = one.signature, other.signature
    for what, is_, was in (
        ("preprocessing", theirs.inputs, mine.inputs),
        ("outputs", (theirs.output, theirs.size), (mine.output, mine.size)),
        ("labels", theirs.labels, mine.labels),
    ):
        if is_ != was:
            raise ConfigError(
                f"{other.path} has other {what} than the model that is served, so its clients "
                "could not tell; serve it at an address of its own"
            )
