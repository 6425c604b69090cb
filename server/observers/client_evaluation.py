"""Evaluation on the nodes' own test data, where nothing forbids to ask them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from umbel.server.checkpoint import Position
from umbel.server.drive import stream
from umbel.server.evaluation import FederatedEvaluation, gather
from umbel.server.observers.base import RoundDone, Watcher
from umbel.server.output.rundir import RunDirectory
from umbel.server.roster import NodeRef
from umbel.server.training_spec import TrainingSpec


class ClientEvaluation(Watcher):
    """Asks nodes every few rounds, and at the end.

    Args:
        job: what is trained.
        grid: the engine.
        run: the run directory.
        nodes: those that may be asked now.
        requests: the messages for these nodes, of a position.

    Attributes:
        means: of the latest evaluation, over the nodes' examples.
    """

    def __init__(
        self,
        job: TrainingSpec,
        grid: Grid,
        run: RunDirectory,
        nodes: Callable[[], Sequence[NodeRef]],
        requests: Callable[[Position, Sequence[NodeRef]], list[Message]],
    ) -> None:
        self._job, self._grid, self._run = job, grid, run
        self._nodes, self._requests = nodes, requests
        self._early = False
        self.means: Mapping[str, float] = {}

    def resume(self, position: Position, lines: Sequence[Mapping[str, Any]]) -> Position:
        for line in lines:
            self.means = _means_of(line.get("federated")) or self.means
        return position

    def round_done(self, done: RoundDone, position: Position) -> Position:
        with done.phases("federated"):
            done.federated = self._evaluate(position) if self._is_due(done.number) else None
        return position

    def stopped(self, position: Position) -> None:  # noqa: ARG002
        self._early = True

    def end(self, position: Position) -> None:
        """Of a run that ends early; otherwise the last round has done it."""
        wanted = self._job.options.client_eval_every >= 0 and not self._job.quiet
        if self._early and wanted and position.round:
            self._evaluate(position)

    def _is_due(self, number: int) -> bool:
        every = self._job.options.client_eval_every
        return (
            not self._job.quiet
            and every >= 0
            and (number == self._job.options.rounds or (every > 0 and number % every == 0))
        )

    def _evaluate(self, position: Position) -> FederatedEvaluation:
        everyone = self._nodes()
        nodes = everyone[: self._job.options.client_eval_nodes or len(everyone)]
        requests = self._requests(position, nodes)
        timeout = self._job.options.round_timeout or None
        evaluation = gather(stream(self._grid, requests, timeout), nodes)
        if evaluation.rows:
            self._run.write_nodes(evaluation.rows)
            self.means = evaluation.means()
        return evaluation


def _means_of(federated: Mapping[str, Any] | None) -> dict[str, float]:
    """The nodes' means, from the line of a round."""
    return {name: float(values["mean"]) for name, values in (federated or {}).items()}
