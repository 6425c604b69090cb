"""A line of the run directory for each round, and what a person is told of it."""

from typing import Any

from umbel.server.checkpoint import Position
from umbel.server.failures import Failures
from umbel.server.observers.base import RoundDone, Watcher
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.statements import Statements


class RunLines(Watcher):
    """Writes the line, then shows it.

    Args:
        run: the run directory.
        failures: what nodes failed of.
        statements: what nodes say of the privacy of their records.
        progress: where a person watches.
    """

    def __init__(
        self,
        run: RunDirectory,
        failures: Failures,
        statements: Statements,
        progress: Progress,
    ) -> None:
        self._run, self._failures = run, failures
        self._statements, self._progress = statements, progress

    def round_done(self, done: RoundDone, position: Position) -> Position:
        line = self._line(done)
        self._statements.write()
        self._run.append_round(line)
        self._failures.tell(done.number, line["failed"])
        self._progress.round_done(line)
        done.line = line
        return position

    def _line(self, done: RoundDone) -> dict[str, Any]:
        sum_, federated = done.sum_, done.federated
        return {
            "round": done.number,
            "seconds": done.phases.total(),
            "phases": done.phases.seconds,
            "bytes_down": done.bytes_down,
            "bytes_up": sum_.bytes_up,
            "clients": sum_.replies,
            "used": done.used,
            "failed": self._failures.of([*sum_.rejected, *(federated.failed if federated else ())]),
            "metrics": done.metrics,
            "train": done.train,
            "federated": federated.summary() if federated else None,
            "epsilon": done.epsilon,
            "learning_rate": done.learning_rate,
            **({"secure": dict(sum_.about)} if sum_.about else {}),
            **done.told,
            **({} if sum_.revealed else {"aborted": sum_.aborted}),
            **self._failures.limited(done.number, sum_.limited),
            **self._failures.judged(sum_.judged),
        }
