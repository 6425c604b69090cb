"""The rounds of a federation, read from top to bottom.

    choose a cohort -> send the model -> gather one sum -> charge -> decode -> optimise ->
    evaluate -> write down -> checkpoint

One loop for every engine: all it needs is a Flower `Grid`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.server import checkpoint
from umbel.server.asking import Asker, pool_requests, processes_of, public_arrays, trips
from umbel.server.checkpoint import Best, Position
from umbel.server.drive import ROUND_TTL, Phases, drive, stream
from umbel.server.evaluation import FederatedEvaluation, direction, gather
from umbel.server.failures import Failures
from umbel.server.job import Evaluate as Evaluate
from umbel.server.job import Job as Job
from umbel.server.job import Outcome as Outcome
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.roster import NodeRef, newcomers
from umbel.strategies.cohort import cohort_named
from umbel.strategies.collect import BUFFERS, NO_REPLY, Gathering, Sum
from umbel.strategies.errors import ConfigError, RunError
from umbel.strategies.layer import Facts, Round
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS, averaged_buffers
from umbel.strategies.optimizers import ServerOptimizer, optimizer_named
from umbel.strategies.records import Manifest, Tree, from_array, record_of, to_array

CHECKPOINT_EVERY_S = 1.0
"""Rounds that are shorter than this share a checkpoint; a resumed run repeats them."""
PATIENCE_WITHOUT_REPLIES = 3
"""Rounds in a row without enough replies after which a run gives up."""


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
        job: Job,
        grid: Grid,
        nodes: Sequence[NodeRef],
        run: RunDirectory,
        progress: Progress,
    ) -> None:
        self.job, self.grid, self.nodes, self.run, self.progress = job, grid, nodes, run, progress
        options = job.options
        self.manifest = Manifest.of(job.parameters)
        self.travelling = Manifest.of(averaged_buffers(job.buffers, options.buffers))
        self.cohort = cohort_named(options.cohort, options.cohort_size, options.cohort_cap)
        self.optimizer: ServerOptimizer = optimizer_named(
            options.optimizer,
            learning_rate=options.server_learning_rate,
            momentum=options.server_momentum,
            beta_1=options.beta_1,
            beta_2=options.beta_2,
            tau=options.tau,
        )
        self.facts = self._population(nodes)
        self.job.stack.check(self.facts, self.job.stack.init(self.manifest.size))
        self.processes = processes_of(grid) if job.pooled else 0
        self.failures = Failures({node.node_id: node.name for node in nodes}, progress)
        self._next_time: set[int] = set()
        self._sent: tuple[Tensor, Array] | None = None
        """The last model that was sent, as a vector over the memory of what was sent."""
        self._saved_at = 0.0
        self._metrics: Mapping[str, float] = {}

    def _population(self, nodes: Sequence[NodeRef]) -> Facts:
        """Take these for everyone; the facts of an update that follow from how many they are."""
        self.nodes = nodes
        self.expected = self.cohort.expected(len(nodes))
        return Facts(
            size=self.manifest.size,
            expected_replies=self.expected,
            max_replies=self.cohort.most(len(nodes)),
        )

    def _welcome(self) -> None:
        """Let nodes take part that have come since the run began.

        Not in a private run: what it promises was worked out for the nodes that were there.
        """
        new = newcomers(self.grid, self.nodes)
        if not new:
            return
        if self.job.stack.private:
            for node in new:
                if node.node_id not in self._next_time:
                    self.progress.note(
                        f"node {node.name} has come after this run began; it takes part from the "
                        f"next run on, because the privacy of this one counts on {len(self.nodes)} "
                        "nodes"
                    )
            self._next_time |= {node.node_id for node in new}
            return
        everyone = sorted([*self.nodes, *new], key=lambda node: (node.partition, node.name))
        self.facts = self._population(everyone)
        self.failures.names.update({node.node_id: node.name for node in new})
        names = ", ".join(node.name for node in new)
        self.progress.note(f"joined the run: {names}; there are {len(everyone)} nodes now")

    def fit(self) -> Outcome:
        """Train until a reason to stop; a run directory with a checkpoint is continued.

        Raises:
            RunError: no node could train.
        """
        position = self._begin()
        stopped = "rounds"
        while position.round < self.job.options.rounds:
            position, refused = self._ask(position)
            number = position.round + 1
            reason = "budget" if refused else self.job.guard.stop(number)
            if reason is None and self._patience_is_over(position):
                reason = "early-stop"
            if reason is not None:
                stopped = reason
                break
            self._welcome()
            position = self._sendable(position)
            position = self._round(position, number)
        position, _ = self._ask(position)
        if stopped != "rounds" and self.job.options.federated_every >= 0 and position.round:
            self._federated(position)  # the last round would have done it
        return self._end(position, stopped)

    def _ask(self, position: Position) -> tuple[Position, bool]:
        """Ask the private means whose time has come; whether one does not fit the budget."""
        timeout = self.job.options.round_timeout or None
        asker = Asker(self.grid, self.nodes, self.job.guard, self.processes, timeout)
        for question in self.job.questions:
            due = question.due(position.round, self.job.options.rounds)
            if not due or question.name in position.answered:
                continue
            if not self.job.guard.affords(question.claims()):
                return position, True
            self.progress.note(f"asking all nodes for the private mean {question.name!r}")
            answer = asker.ask(question, position.public, position.round, self.manifest.digest)
            position = position.but(
                public={**position.public, **answer},
                answered=(*position.answered, question.name),
            )
            self._save(position, last=True)
        return position, False

    # ---- one round

    def _round(self, position: Position, number: int) -> Position:
        phases = Phases()
        with phases("sample"):
            cohort = self._choose(number)
            requests = self._requests(position, number, cohort)
            bytes_down = self._bytes(requests)
        facts = self.job.stack.check(self.facts.but(round=number), position.layers)
        with phases("train"):
            sum_ = drive(
                trips(self.job.stack, requests, self._gathering(number, facts)),
                lambda messages: self._replies(messages, phases),
            )
        del requests  # the model that was sent takes room
        if sum_.revealed:
            self.job.guard.charge(number, facts, sum_.replies)
        with phases("aggregate"):
            position, train_metrics = self._apply(position, number, facts, sum_)
        with phases("evaluate"):
            position, metrics = self._evaluate(position)
        with phases("federated"):
            federated = self._federated(position) if self._federated_is_due(number) else None
        line: dict[str, Any] = {
            "round": number,
            "seconds": phases.total(),
            "phases": phases.seconds,
            "bytes_down": bytes_down,
            "bytes_up": sum_.bytes_up,
            "clients": sum_.replies,
            "failed": self.failures.of([*sum_.rejected, *(federated.failed if federated else ())]),
            "metrics": metrics,
            "train": train_metrics,
            "federated": federated.summary() if federated else None,
            "epsilon": self.job.guard.epsilon(),
            "learning_rate": self._rate(number),
            **({"secure": dict(sum_.about)} if sum_.about else {}),
            **({} if sum_.revealed else {"aborted": sum_.aborted}),
        }
        self.run.append_round(line)
        self.failures.tell(number, line["failed"])
        self.progress.round_done(line)
        self._save(position, last=number == self.job.options.rounds)
        return position

    def _choose(self, number: int) -> list[NodeRef]:
        entropy = [self.job.options.seed, number, 1] if self.job.guard.seeded else None
        nodes = self.job.guard.eligible(number, self.nodes)
        cohort = [nodes[i] for i in self.cohort.draw(len(nodes), entropy)] if nodes else []
        self.job.guard.open(number, cohort)
        return cohort

    def _requests(
        self, position: Position, number: int, cohort: Sequence[NodeRef], kind: str = "train"
    ) -> list[Message]:
        config = ConfigRecord({"round": number, "manifest": self.manifest.digest})
        rate = self._rate(number)
        if rate is not None:
            config["learning-rate"] = rate
        if kind == "train":
            facts = self.facts.but(round=number)
            for name, value in self.job.stack.publish(position.layers, facts).items():
                config[name] = value
        parameters = self._sendable(position).parameters
        assert self._sent is not None and self._sent[0] is parameters
        model = {PARAMETERS: self._sent[1]} | public_arrays(position.public)
        if self.travelling.size:
            model[BUFFERS] = to_array(position.buffers)
        if self.processes and kind == "train":
            return pool_requests(model, config, cohort, self.processes)
        content = RecordDict({MODEL: record_of(model), CONFIG: config})
        group = str(number)
        return [
            Message(content, node.node_id, kind, ttl=ROUND_TTL, group_id=group) for node in cohort
        ]

    def _sendable(self, position: Position) -> Position:
        """The position with its model where it is sent from, so that there is no second copy."""
        if self._sent is None or self._sent[0] is not position.parameters:
            lay: Callable[[Tensor], Array] = getattr(self.grid, "array", to_array)
            array = lay(position.parameters)
            self._sent = from_array(array), array
        return position.but(parameters=self._sent[0])

    def _rate(self, number: int) -> float | None:
        rate = self.job.learning_rate
        return None if rate is None else rate * self.job.options.learning_rate_factor(number)

    def _gathering(self, number: int, facts: Facts) -> Gathering:
        return Gathering(
            number=number,
            size=facts.size,
            dtype=self.manifest.dtype,
            cohort=self.expected,
            facts=facts,
            buffers=self.travelling.size,
            run_id=self.grid.run.run_id,
        )

    def _replies(self, messages: Sequence[Message], phases: "Phases") -> Iterator[Message]:
        """The grid's replies; the time that the collect spends between them is aggregation."""
        timeout = self.job.options.round_timeout or None
        done = 0
        for reply in stream(self.grid, messages, timeout):  # `enumerate` would hold each reply
            done += 1  # noqa: SIM113
            self.progress.message_done(done, len(messages))
            with phases("aggregate", within="train"):
                yield reply
            del reply  # while the next is awaited, this one must not take room

    def _apply(
        self, position: Position, number: int, facts: Facts, sum_: Sum
    ) -> tuple[Position, dict[str, float]]:
        """The next model: decode the sum, step the optimiser, mix in the buffers."""
        too_few = sum_.replies < self.job.options.min_replies and self.job.guard.seeded
        if too_few or sum_.aborted:
            return self._abandon(position, number, sum_), {}
        rnd = Round(
            number=number,
            cohort=self.expected,
            replies=sum_.replies,
            weight=sum_.weight,
            facts=facts,
            generator=torch.Generator().manual_seed(self.job.options.seed * 1_000_003 + number),
        )
        average, layers, metrics = self.job.stack.decode(
            sum_, position.layers, rnd, self.facts.but(round=number)
        )
        after = position.but(round=number, layers=layers, abandoned=0)
        if average is None:
            return after, metrics
        parameters, slots = self.optimizer.step(position.parameters, average, position.slots)
        # A sum that is finite has no term that is not; it costs a tenth of looking at each.
        if not (math.isfinite(parameters.sum()) or bool(torch.isfinite(parameters).all())):
            raise RunError(
                f"the model stopped being finite in round {number}; lower learning-rate or "
                "server-learning-rate"
            )
        after = after.but(parameters=parameters, slots=slots)
        if sum_.buffers is not None:
            after = after.but(buffers=sum_.buffers.to(position.buffers.dtype))
        return self._averaged(after), metrics

    def _abandon(self, position: Position, number: int, sum_: Sum) -> Position:
        """A round without enough replies leaves the model as it was."""
        if not sum_.replies and not sum_.rejected and not sum_.aborted:
            self.progress.note(f"round {number}: the draw chose no node; the model stays as it was")
            return position.but(round=number)
        first = self.failures.first(sum_.rejected)
        after = position.but(round=number, abandoned=position.abandoned + 1)
        need = self.job.options.min_replies
        said = f"round {number}: {sum_.replies} of {need} needed replies could be used{first}"
        if sum_.aborted:
            said = f"round {number}: {sum_.aborted}{first}"
        answered = any(item.reason != NO_REPLY for item in sum_.rejected)
        nobody = answered and not sum_.aborted and not sum_.replies and position.round == 0
        if nobody or after.abandoned >= PATIENCE_WITHOUT_REPLIES:
            raise RunError(f"{said}; the run ends; the nodes' errors are in {self.run.log_path}")
        self.progress.note(f"{said}; the model stays as it was")
        return after

    def _averaged(self, position: Position) -> Position:
        start = self.job.options.average_from
        if not start or position.round < start:
            return position
        count = position.averaged + 1
        before = position.average if position.average is not None else position.parameters
        return position.but(average=before.lerp(position.parameters, 1 / count), averaged=count)

    # ---- evaluation

    def _model(self, position: Position) -> tuple[Tree, Tree]:
        """What the run would end with now."""
        vector, buffers = position.parameters, position.buffers
        if position.average is not None:
            vector = position.average
        return self._tree(vector, buffers, position.public)

    def _tree(
        self, vector: Tensor, buffers: Tensor, public: Mapping[str, Tensor]
    ) -> tuple[Tree, Tree]:
        own = {name: value for name, value in public.items() if name in self.job.buffers}
        mixed = {**self.job.buffers, **own}
        if self.travelling.size:
            mixed |= self.travelling.unflatten(buffers)
        return self.manifest.unflatten(vector), mixed

    def _evaluate(self, position: Position) -> tuple[Position, Mapping[str, float]]:
        options = self.job.options
        due = position.round % options.evaluate_every == 0 or position.round == options.rounds
        if self.job.evaluate is None or not due:
            return position, {}
        metrics = self.job.evaluate(*self._model(position))
        self._metrics = metrics
        return self._remember_best(position, metrics), metrics

    def _remember_best(self, position: Position, metrics: Mapping[str, float]) -> Position:
        options, name = self.job.options, self.job.options.early_stop_metric
        if options.keep == "last" and not options.early_stop_patience:
            return position
        if name not in metrics:
            raise ConfigError(
                f"early-stop-metric is {name!r}, which the evaluation does not give; choose one "
                f"of {', '.join(metrics)}"
            )
        value = -metrics[name] if direction(name) < 0 else metrics[name]
        if math.isnan(value):  # nothing is better than NaN, so it would stay the best for ever
            value = -math.inf
        if position.best is not None and not value > position.best.value:
            return position.but(stale=position.stale + 1)
        vector = position.parameters if position.average is None else position.average
        best = Best(value, position.round, vector, position.buffers)
        return position.but(best=best, stale=0)

    def _patience_is_over(self, position: Position) -> bool:
        patience = self.job.options.early_stop_patience
        return patience > 0 and position.stale >= patience

    def _federated_is_due(self, number: int) -> bool:
        every = self.job.options.federated_every
        return every >= 0 and (
            number == self.job.options.rounds or (every > 0 and number % every == 0)
        )

    def _federated(self, position: Position) -> FederatedEvaluation:
        count = self.job.options.federated_nodes or len(self.nodes)
        nodes = self.nodes[:count]
        requests = self._requests(position, position.round, nodes, "evaluate")
        timeout = self.job.options.round_timeout or None
        evaluation = gather(stream(self.grid, requests, timeout), nodes)
        if evaluation.rows:
            self.run.write_nodes(evaluation.rows)
        return evaluation

    # ---- begin, save, end

    def _begin(self) -> Position:
        position = checkpoint.load(self.run.checkpoint_path)
        if position is not None:
            restore = getattr(self.grid, "restore_states", None)
            if restore is not None:
                restore(checkpoint.load_nodes(self.run.checkpoint_path, position.round))
            self.run.truncate_rounds(position.round)
            for line in self.run.rounds():
                self._metrics = line.get("metrics") or self._metrics
            return position
        self.run.truncate_rounds(-1)
        parameters = self.manifest.flatten(self.job.parameters)
        buffers = checkpoint.no_buffers()
        if self.travelling.size:
            buffers = self.travelling.flatten(
                averaged_buffers(self.job.buffers, self.job.options.buffers)
            )
        position = Position(
            round=0,
            parameters=parameters,
            buffers=buffers,
            slots=self.optimizer.init(parameters),
            layers=self.job.stack.init(self.manifest.size),
        )
        position, metrics = self._evaluate(position)
        if metrics:
            self.run.append_round({"round": 0, "metrics": metrics})
        return position

    def _save(self, position: Position, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._saved_at >= CHECKPOINT_EVERY_S:
            states = getattr(self.grid, "pickled_states", dict)
            checkpoint.save(self.run.checkpoint_path, position, states())
            self._saved_at = now

    def _end(self, position: Position, stopped: str) -> Outcome:
        parameters, buffers = self._model(position)
        metrics = self._metrics
        if self.job.options.keep == "best" and position.best is not None:
            parameters, buffers = self._tree(
                position.best.parameters, position.best.buffers, position.public
            )
            if self.job.evaluate is not None:
                metrics = self.job.evaluate(parameters, buffers)
        self.run.write_model({**parameters, **buffers}, {"round": str(position.round)})
        return Outcome(position.round, stopped, dict(metrics), parameters, buffers, position.public)

    def _bytes(self, requests: Sequence[Message]) -> int:
        size = self.manifest.size * self.manifest.dtype.itemsize
        return len(requests) * (size + self.travelling.size * 4)
