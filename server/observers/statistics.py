"""The delivered model's running statistics: asked of the nodes that trained, where they matter."""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid

from umbel.core.records import Manifest
from umbel.server.checkpoint import Position
from umbel.server.observers.base import RoundDone, Watcher
from umbel.server.statistics import ask_statistics
from umbel.server.training_spec import TrainingSpec


class RunningStatistics(Watcher):
    """Keeps the statistics in the position's buffers.

    Args:
        job: what is trained.
        grid: the engine.
        statistics: names and shapes of the statistics; without any it does nothing.
    """

    def __init__(self, job: TrainingSpec, grid: Grid, statistics: Manifest) -> None:
        self._job, self._grid, self._statistics = job, grid, statistics

    def begin(self, position: Position) -> Position:
        """With those of the first model."""
        if not self._statistics.size or position.buffers.numel():
            return position
        return position.replace(buffers=self._statistics.flatten(self._job.buffers))

    def resume(self, position: Position, lines: Sequence[Mapping[str, Any]]) -> Position:  # noqa: ARG002
        """A run of an older version kept none."""
        return self.begin(position)

    def round_done(self, done: RoundDone, position: Position) -> Position:
        """Ask, where the model of this round is judged or delivered."""
        options = self._job.options
        last = position.round == options.rounds
        judged = self._job.evaluate is not None and position.round % options.evaluate_every == 0
        if not self._statistics.size or not (last or judged):
            return position
        timeout = options.round_timeout or None
        with done.phases("evaluate"):
            found = ask_statistics(
                self._grid, done.cohort, self._statistics, position.round, timeout
            )
        if found is None:
            return position
        return position.replace(buffers=self._statistics.flatten(found))
