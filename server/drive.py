"""The loop that runs an exchange's protocol over a grid, and the clock that watches it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from umbel.server.base_grid import BaseGrid
from umbel.server.mailbox import GridMailbox, Mailbox
from umbel.server.node_states import NodeStates
from umbel.strategies.aggregator import Aggregate
from umbel.strategies.exchange import Gather

ROUND_TTL = 365 * 86400.0
"""Seconds that a message of a round is good for: what ends it is the option `round-timeout`, and
not the twelve hours after which Flower lets a message expire that says nothing."""


def mailbox(grid: Grid, timeout: float | None) -> Mailbox:
    """A way to talk to the nodes of any grid; its replies end after `timeout` seconds."""
    return grid.open(timeout) if isinstance(grid, BaseGrid) else GridMailbox(grid, timeout)


def stream(grid: Grid, messages: Sequence[Message], timeout: float | None) -> Iterator[Message]:
    """Replies in order of arrival, on Umbel's own grids; else as one batch.

    A plain grid waits for a batch better than one that asks it again and again.
    """
    if not messages:
        return iter(())
    if isinstance(grid, BaseGrid):
        return grid.stream(messages, timeout)
    return iter(grid.send_and_receive(messages, timeout=timeout))


def states_of(grid: Grid) -> NodeStates | None:
    """What lasts of the nodes that the grid keeps; None where nodes keep it themselves."""
    return grid.states if isinstance(grid, BaseGrid) else None


def sharing(grid: Grid) -> int:
    """How many places of work share this grid's virtual nodes; 0 where nodes are their own."""
    return grid.sharing if isinstance(grid, BaseGrid) else 0


def told(grid: Grid) -> Mapping[str, float]:
    """What the engine itself says of a round that is over."""
    return grid.told() if isinstance(grid, BaseGrid) else {}


def go_on(grid: Grid, lines: Sequence[Mapping[str, Any]]) -> None:
    """Let the engine go on where a run stands that wrote these lines."""
    if isinstance(grid, BaseGrid) and lines:
        grid.go_on(lines[-1])


def simulates(grid: Grid) -> bool:
    """Whether the engine's time is that of simulated devices."""
    return isinstance(grid, BaseGrid) and grid.simulates


def drive(gathering: Gather, send: Callable[[Sequence[Message]], Iterator[Message]]) -> Aggregate:
    """Run an exchange's protocol over a way to send: requests out, replies in, until the end."""
    try:
        requests = next(gathering)
        while True:
            requests = gathering.send(send(requests))
    except StopIteration as end:
        result: Aggregate = end.value
        return result


class Phases:
    """Seconds by phase; a phase may be taken out of the one it happens in."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str, within: str | None = None) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            if within is not None:
                self.seconds[within] = self.seconds.get(within, 0.0) - took

    def total(self) -> float:
        """Since the round began."""
        return time.perf_counter() - self._began
