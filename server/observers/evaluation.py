"""Central evaluation: the model on held-out examples of the coordinator's."""

from collections.abc import Mapping, Sequence
from typing import Any

from umbel.server.checkpoint import Position
from umbel.server.delivered import DeliveredModel
from umbel.server.observers.base import RoundDone, Watcher
from umbel.server.observers.best_model import patience_is_over, remember_best
from umbel.server.output.rundir import RunDirectory
from umbel.server.training_spec import TrainingSpec


class CentralEvaluation(Watcher):
    """Evaluates every few rounds and at the end, keeps the best model, and stops early.

    Args:
        job: what is trained; without held-out data it does nothing.
        model: from positions to models.
        run: the run directory.

    Attributes:
        metrics: of the latest evaluation.
    """

    def __init__(self, job: TrainingSpec, model: DeliveredModel, run: RunDirectory) -> None:
        self._job, self._model, self._run = job, model, run
        self.metrics: Mapping[str, float] = {}

    def begin(self, position: Position) -> Position:
        """The first model is evaluated too; it is round 0 in the run's lines."""
        position, metrics = self._evaluate(position)
        if metrics:
            self._run.append_round({"round": 0, "metrics": metrics})
        return position

    def resume(self, position: Position, lines: Sequence[Mapping[str, Any]]) -> Position:
        for line in lines:
            self.metrics = line.get("metrics") or self.metrics
        return position

    def round_done(self, done: RoundDone, position: Position) -> Position:
        with done.phases("evaluate"):
            position, done.metrics = self._evaluate(position)
        return position

    def stop(self, position: Position) -> str | None:
        return "early-stop" if patience_is_over(self._job.options, position) else None

    def _evaluate(self, position: Position) -> tuple[Position, Mapping[str, float]]:
        options = self._job.options
        due = position.round % options.evaluate_every == 0 or position.round == options.rounds
        if self._job.evaluate is None or not due:
            return position, {}
        self.metrics = self._job.evaluate(*self._model.of(position))
        return remember_best(options, position, self.metrics), self.metrics
