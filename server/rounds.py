"""The rounds of a federation, read from top to bottom.

    choose a cohort -> send the model -> gather one sum -> charge -> decode -> optimise ->
    what observes: evaluation, the run's lines, progress, checkpoints

One loop for every engine: all it needs is a Flower `Grid`. How a round collects is its collector's:
a cohort that is waited for, or a buffer that fills (`umbel.server.buffered`).
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch
from flwr.serverapp import Grid

from umbel.server import buffered
from umbel.server.beginning import Beginning
from umbel.server.checkpoint import Position
from umbel.server.collecting import Collector
from umbel.server.drive import Phases, told
from umbel.server.ending import outcome
from umbel.server.observers.base import RoundDone
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.parts import RunParts
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.questions import Questions
from umbel.server.roster import NodeRef
from umbel.server.training_spec import Outcome, TrainingSpec
from umbel.strategies.composition import check_rounds
from umbel.strategies.transform import Facts


class Rounds:
    """Runs a job over a grid.

    Args:
        job: what is trained.
        grid: the engine.
        nodes: the population, in a fixed order.
        run: where the run is written down.
        progress: where a person watches.
    """

    def __init__(
        self,
        job: TrainingSpec,
        grid: Grid,
        nodes: Sequence[NodeRef],
        run: RunDirectory,
        progress: Progress,
    ) -> None:
        waits = not job.asynchronous.on
        whole = job if waits else buffered.counting_on_a_buffer(job, len(nodes))
        self.parts = parts = RunParts.of(whole, grid, nodes, run, progress)
        self.job, self.manifest = parts.job, parts.manifest
        check_rounds(self.job.stack, self.facts)
        self._beginning = Beginning(parts, job.parameters)
        self._collector = Collector(parts) if waits else buffered.BufferedCollector(parts)
        self._questions = Questions(parts)

    @property
    def facts(self) -> Facts:
        """Of an update before the stack."""
        return self.parts.population.facts

    def fit(self) -> Outcome:
        """Train until a reason to stop; a run directory with a checkpoint is continued.

        Raises:
            RunError: no node could train.
        """
        with closing(self._collector):
            position, stopped = self._train(self._beginning.position())
            observers = self.parts.observers
            if stopped != "rounds":
                for observer in observers:
                    observer.stopped(position)
            position, _ = self._questions.ask(position)
            for observer in observers:
                observer.end(position)
            return outcome(self.parts, position, stopped)

    def _train(self, position: Position) -> tuple[Position, str]:
        """Rounds until a reason to stop, and that reason; "rounds" where none is left."""
        while position.round < self.job.options.rounds:
            position, refused = self._questions.ask(position)
            reason = "budget" if refused else self._stop(position)
            if reason is not None:
                return position, reason
            if self.parts.population.welcome():
                check_rounds(self.job.stack, self.facts)
            try:
                position = self._round(position, position.round + 1)
            except BudgetSpentError:  # by another run about the same people, since it was asked
                return position, "budget"
        return position, "rounds"

    def _stop(self, position: Position) -> str | None:
        """Why the next round must not run."""
        asked = (observer.stop(position) for observer in self.parts.observers)
        return self.job.guard.stop(position.round + 1) or next(filter(None, asked), None)

    def _round(self, position: Position, number: int) -> Position:
        parts, guard, phases = self.parts, self.job.guard, Phases()
        before = self.facts.replace(round=number)
        found = self._collector.collect(position, number, before, phases)
        cohort, facts, sum_ = found.cohort, found.facts, found.sum_
        bytes_down, more = found.bytes_down, found.said
        del found
        position = parts.population.remember(position, number, cohort)
        if not guard.seeded:
            everyone = len(parts.population.nodes)
            position = parts.release.count_failures(position, number, sum_, everyone)
        if sum_.revealed:
            guard.charge(number, facts, sum_.replies)
        model = position.parameters
        with phases("aggregate"):
            least = parts.population.least(len(cohort))
            position, said = parts.release.apply(position, number, before, facts, sum_, least)
        done = RoundDone(
            number=number,
            phases=phases,
            cohort=cohort,
            sum_=replace(sum_, total=torch.empty(0), buffers=None),  # they are in the model now
            bytes_down=bytes_down,
            used=position.parameters is not model,
            train={**said, **more},
            learning_rate=parts.requests.learning_rate(number),
            epsilon=guard.epsilon(),
            told=told(parts.grid),
        )
        del sum_, model
        for observer in parts.observers:
            position = observer.round_done(done, position)
        return position
