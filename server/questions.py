"""The private means of a run: asked when their time has come, as far as the budget goes."""

from umbel.server.checkpoint import Position
from umbel.server.parts import RunParts
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.queries import QueryRunner


class Questions:
    """Asks the job's questions before, between and after rounds.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts

    def ask(self, position: Position) -> tuple[Position, bool]:
        """Ask those that are due; the position with their answers, saved after each.

        Args:
            position: between two rounds.

        Returns:
            The position, and whether a question does not fit the budget.

        Raises:
            RunError: no node could answer.
        """
        parts = self._parts
        job, guard = parts.job, parts.job.guard
        asker = QueryRunner(
            parts.grid,
            parts.population.nodes,
            guard,
            parts.processes,
            job.options.round_timeout or None,
        )
        for question in job.questions:
            due = question.due(position.round, job.options.rounds)
            if not due or question.name in position.answered:
                continue
            if not guard.affords(question.claims()):
                return position, True
            parts.progress.note(f"asking all nodes for the private mean {question.name!r}")
            try:
                answer = asker.ask(question, position.public, position.round, parts.manifest.digest)
            except BudgetSpentError:
                return position, True
            position = position.replace(
                public={**position.public, **answer},
                answered=(*position.answered, question.name),
            )
            parts.checkpoints.save(position)
        return position, False
