"""The rounds of a federation, read from top to bottom.

    choose a cohort -> send the model -> gather one sum -> charge -> decode -> optimise ->
    what observes: evaluation, the run's lines, progress, checkpoints

One loop for every engine: all it needs is a Flower `Grid`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from umbel.core.errors import RunError
from umbel.core.records import Manifest, Tree
from umbel.server import checkpoint
from umbel.server.checkpoint import Position
from umbel.server.delivered import DeliveredModel
from umbel.server.drive import Phases, drive, sharing, stream
from umbel.server.observers.base import Observer, RoundDone
from umbel.server.observers.checkpoints import Checkpoints
from umbel.server.observers.client_evaluation import ClientEvaluation
from umbel.server.observers.evaluation import CentralEvaluation
from umbel.server.observers.run_lines import RunLines
from umbel.server.observers.statistics import RunningStatistics
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.population import Population
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.private.statements import Statements
from umbel.server.queries import QueryRunner
from umbel.server.release import Release
from umbel.server.requests import Requests
from umbel.server.roster import NodeRef
from umbel.server.shortfall import Shortfall
from umbel.server.training_spec import Outcome, TrainingSpec
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.composition import check_rounds
from umbel.strategies.layout import averaged_buffers
from umbel.strategies.optimizers import ServerOptimizer
from umbel.strategies.samplers import Sampler
from umbel.strategies.transform import Facts


@dataclass
class Collected:
    """What came of the messages of a round.

    Attributes:
        cohort: the nodes whose replies the round counts on.
        facts: at the bottom of the stack.
        sum_: of the replies.
        bytes_down: size of what was sent.
        said: what is to be written down of the round, by name.
    """

    cohort: Sequence[NodeRef]
    facts: Facts
    sum_: Aggregate
    bytes_down: int
    said: Mapping[str, float] = field(default_factory=dict)


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
        self.grid, self.run, self.progress = grid, run, progress
        options = job.options
        self._first: Tree = job.parameters
        self.job = job = replace(job, parameters={})  # the position holds the model from now on
        self.manifest = Manifest.of(self._first)
        self.synced_buffers = Manifest.of(averaged_buffers(job.buffers, options.buffers))
        statistics = Manifest.of({name: job.buffers[name] for name in job.statistics})
        self.optimizer: ServerOptimizer = job.optimizer or options.part("optimizer")
        sampler: Sampler = job.sampler or options.part("sampler")
        self.population = Population(job, grid, nodes, sampler, self.manifest.size, progress)
        check_rounds(job.stack, self.facts)
        self._processes = sharing(grid) if job.pooled else 0
        self._timeout = options.round_timeout or None
        failures = self.population.failures
        self.statements = Statements(run, failures.names)
        self._requests = Requests(job, grid, self.manifest, self.synced_buffers, self._processes)
        self._model = DeliveredModel(job, self.manifest, self.synced_buffers, statistics)
        self._release = Release(
            job, self.optimizer, self._requests.share, failures, progress, run.log_path
        )
        self._checkpoints = Checkpoints(run, grid, job.stack.collect, options.rounds, progress)
        self._central = CentralEvaluation(job, self._model, run)
        self._clients = ClientEvaluation(
            job, grid, run, lambda: self.population.present, self._requests.to_evaluate
        )
        self.observers: Sequence[Observer] = (
            RunningStatistics(job, grid, statistics),
            self._central,
            self._clients,
            RunLines(run, failures, self.statements, progress),
            self._checkpoints,  # last: a line that is written may be repeated, but never lost
        )

    @property
    def facts(self) -> Facts:
        """Of an update before the stack."""
        return self.population.facts

    def fit(self) -> Outcome:
        """Train until a reason to stop; a run directory with a checkpoint is continued.

        Raises:
            RunError: no node could train.
        """
        position = self._begin()
        stopped = "rounds"
        while position.round < self.job.options.rounds:
            position, refused = self._ask(position)
            reason = "budget" if refused else self._stop(position)
            if reason is not None:
                stopped = reason
                break
            if self.population.welcome():
                check_rounds(self.job.stack, self.facts)
            try:
                position = self._round(position, position.round + 1)
            except BudgetSpentError:  # by another run about the same people, since it was asked
                stopped = "budget"
                break
        if stopped != "rounds":
            for observer in self.observers:
                observer.stopped(position)
        position, _ = self._ask(position)
        for observer in self.observers:
            observer.end(position)
        missed = Shortfall.of(self.run.rounds())
        if stopped == "rounds" and missed.nothing:
            raise RunError(
                f"none of the {missed.rounds} rounds changed the model: "
                f"{missed.reason or 'no node could train'}; the nodes' errors are in "
                f"{self.run.log_path}"
            )
        return self._outcome(position, stopped)

    def _stop(self, position: Position) -> str | None:
        """Why the next round must not run."""
        asked = (observer.stop(position) for observer in self.observers)
        return self.job.guard.stop(position.round + 1) or next(filter(None, asked), None)

    def _ask(self, position: Position) -> tuple[Position, bool]:
        """Ask the private means whose time has come; whether one does not fit the budget."""
        nodes, guard = self.population.nodes, self.job.guard
        asker = QueryRunner(self.grid, nodes, guard, self._processes, self._timeout)
        for question in self.job.questions:
            due = question.due(position.round, self.job.options.rounds)
            if not due or question.name in position.answered:
                continue
            if not guard.affords(question.claims()):
                return position, True
            self.progress.note(f"asking all nodes for the private mean {question.name!r}")
            try:
                answer = asker.ask(question, position.public, position.round, self.manifest.digest)
            except BudgetSpentError:
                return position, True
            position = position.replace(
                public={**position.public, **answer},
                answered=(*position.answered, question.name),
            )
            self._checkpoints.save(position)
        return position, False

    # ---- one round

    def _round(self, position: Position, number: int) -> Position:
        phases = Phases()
        guard = self.job.guard
        before = self.facts.replace(round=number)
        found = self._collect(position, number, before, phases)
        cohort, facts, sum_ = found.cohort, found.facts, found.sum_
        bytes_down, more = found.bytes_down, found.said
        del found
        position = self.population.remember(position, number, cohort)
        if not guard.seeded:
            everyone = len(self.population.nodes)
            position = self._release.count_failures(position, number, sum_, everyone)
        if sum_.revealed:
            guard.charge(number, facts, sum_.replies)
        model = position.parameters
        with phases("aggregate"):
            least = self.population.least(len(cohort))
            rate = self._requests.learning_rate(number)
            position, said = self._release.apply(position, number, before, facts, sum_, least)
        done = RoundDone(
            number=number,
            phases=phases,
            cohort=cohort,
            sum_=replace(sum_, total=torch.empty(0), buffers=None),  # they are in the model now
            bytes_down=bytes_down,
            used=position.parameters is not model,
            train={**said, **more},
            learning_rate=rate,
            epsilon=guard.epsilon(),
        )
        del sum_, model
        for observer in self.observers:
            position = observer.round_done(done, position)
        return position

    def _collect(
        self, position: Position, number: int, before: Facts, phases: Phases
    ) -> "Collected":
        """Ask a cohort, and wait for its replies.

        Args:
            position: before the round.
            number: the round.
            before: facts of an update before the stack.
            phases: the clock of the round.
        """
        stack = self.job.stack
        with phases("sample"):
            self._checkpoints.begin_round(number)
            cohort = self.population.choose(position, number)
            requests = self._requests.to_train(position, number, cohort, before)
            bytes_down = self._requests.size_of(requests)
        facts = stack.check(before, position.layers)
        gathering = stack.collect.gather(requests, self._spec(number, facts))
        del requests  # with them goes the model that was sent, once all have answered
        with phases("train"):
            sum_ = drive(gathering, lambda messages: self._replies(messages, phases))
        return Collected(cohort, facts, sum_, bytes_down)

    def _spec(self, number: int, facts: Facts) -> RoundSpec:
        return RoundSpec(
            number=number,
            size=facts.size,
            dtype=self.manifest.dtype,
            cohort=self.facts.expected_replies,
            facts=facts,
            buffers=self.synced_buffers.size,
            run_id=self.grid.run.run_id,
            contract=self.job.contract,
        )

    def _replies(self, messages: Sequence[Message], phases: Phases) -> Iterator[Message]:
        """The grid's replies; the time that the collect spends between them is aggregation."""
        done = 0
        for reply in stream(self.grid, messages, self._timeout):  # `enumerate` would hold each
            done += 1  # noqa: SIM113
            self.progress.message_done(done, len(messages))
            self.statements.hear(reply)
            self.population.hear(reply)
            with phases("aggregate", within="train"):
                yield reply
            del reply  # while the next is awaited, this one must not take room

    # ---- begin and end

    def _begin(self) -> Position:
        position = self._checkpoints.load()
        if position is not None:
            lines = self.run.rounds()
            for observer in self.observers:
                position = observer.resume(position, lines)
            return self._after_a_stop(position)
        parameters = self._requests.share(self.manifest.flatten(self._first))
        self._first = {}
        buffers = checkpoint.no_buffers()
        if self.synced_buffers.size:
            synced = averaged_buffers(self.job.buffers, self.job.options.buffers)
            buffers = self.synced_buffers.flatten(synced)
        position = Position(
            round=0,
            parameters=parameters,
            buffers=buffers,
            slots=self.optimizer.init(parameters),
            layers=self.job.stack.init(self.manifest.size),
        )
        for observer in self.observers:
            position = observer.begin(position)
        return self._after_a_stop(position)

    def _after_a_stop(self, position: Position) -> Position:
        """Go on with a round that no node has begun: those give no second update for one."""
        begun = self._checkpoints.begun()
        if begun <= position.round:
            return position
        facts = self.job.stack.check(self.facts.replace(round=begun), position.layers)
        self.job.guard.forfeit(begun, facts)
        self.progress.note(
            f"round {begun} was under way when the coordinator stopped, and nodes give their "
            "masked updates of a round once only; the rounds after the checkpoint of round "
            f"{position.round} are given up, and the run goes on with round {begun + 1}"
        )
        return position.replace(round=begun)

    def _outcome(self, position: Position, stopped: str) -> Outcome:
        """Write the model that the run ends with, and say how it did."""
        parameters, buffers = self._model.of(position)
        metrics: Mapping[str, float] = self._central.metrics
        if self.job.options.keep_model == "best" and position.best is not None:
            parameters, buffers = self._model.best(position)
            if self.job.evaluate is not None:
                metrics = self.job.evaluate(parameters, buffers)
        self.run.write_model({**parameters, **buffers}, {"round": str(position.round)})
        measured = "central" if metrics else ""
        if self.job.evaluate is None and self._clients.means:
            metrics, measured = self._clients.means, "nodes"
        return Outcome(
            rounds=position.round,
            stopped=stopped,
            metrics=dict(metrics),
            parameters=parameters,
            buffers=buffers,
            public=position.public,
            measured=measured,
        )
