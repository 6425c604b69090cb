"""The rounds of a federation, read from top to bottom.

    choose a cohort -> send the model -> gather one sum -> charge -> decode -> optimise ->
    evaluate -> write down -> checkpoint

One loop for every engine: all it needs is a Flower `Grid`.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.core.errors import ConfigError, RunError
from umbel.core.records import Manifest, Tree, from_array, record_of, to_array
from umbel.server import checkpoint
from umbel.server.base_grid import BaseGrid
from umbel.server.checkpoint import Best, Position
from umbel.server.drive import ROUND_TTL, Phases, drive, stream
from umbel.server.evaluation import FederatedEvaluation, direction, gather
from umbel.server.failures import Failures
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.private.statements import Statements
from umbel.server.queries import QueryRunner, pool_requests, processes_of, public_arrays, trips
from umbel.server.roster import NodeRef, newcomers
from umbel.server.shortfall import Shortfall
from umbel.server.statistics import ask_statistics
from umbel.server.training_spec import Evaluate as Evaluate
from umbel.server.training_spec import Outcome, TrainingSpec
from umbel.strategies.collect import BUFFERS, NO_REPLY, Gathering, Seals, Sum
from umbel.strategies.composition import check_rounds
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS, averaged_buffers
from umbel.strategies.optimizers import ServerOptimizer, optimizer_named
from umbel.strategies.samplers import make_sampler
from umbel.strategies.transform import Facts, Round

CHECKPOINT_EVERY_S = 1.0
"""Rounds that are shorter than this may share a checkpoint; a resumed run repeats them."""
_CHECKPOINT_SHARE = 0.05
"""Where saving is quick, a checkpoint comes as soon as it costs no more than this share."""
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
        job: TrainingSpec,
        grid: Grid,
        nodes: Sequence[NodeRef],
        run: RunDirectory,
        progress: Progress,
    ) -> None:
        self.job, self.grid, self.nodes, self.run, self.progress = job, grid, nodes, run, progress
        options = job.options
        self.manifest = Manifest.of(job.parameters)
        self.synced_buffers = Manifest.of(averaged_buffers(job.buffers, options.buffers))
        self.cohort = make_sampler(options.cohort, options.cohort_size, options.cohort_cap)
        self.optimizer: ServerOptimizer = optimizer_named(
            options.optimizer,
            learning_rate=options.server_learning_rate,
            momentum=options.server_momentum,
            beta_1=options.beta_1,
            beta_2=options.beta_2,
            tau=options.tau,
        )
        self.facts = self._population(nodes)
        check_rounds(self.job.stack, self.facts)
        self.processes = processes_of(grid) if job.pooled else 0
        self._first: Tree = job.parameters
        self.job = replace(job, parameters={})  # the position holds the model from the start on
        self._packed: tuple[Tensor, Array] | None = None
        self._saved_at = self._saving_took = 0.0
        self._next_time: set[int] = set()
        self.statistics = Manifest.of({name: job.buffers[name] for name in job.statistics})
        self._fair: Mapping[str, float] = {}
        names = {node.node_id: node.name for node in nodes}
        self.failures = Failures(names, progress)
        self.statements = Statements(run, names)
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
        check_rounds(self.job.stack, self.facts)
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
            try:
                position = self._round(position, number)
            except BudgetSpentError:  # by another run about the same people, since it was asked
                stopped = "budget"
                break
        if stopped != "rounds":  # what was paid for is kept, whenever this run is looked at again
            self._save(position, last=True)
        position, _ = self._ask(position)
        wanted = self.job.options.federated_every >= 0 and not self.job.quiet
        if stopped != "rounds" and wanted and position.round:
            self._federated(position)  # the last round would have done it
        missed = Shortfall.of(self.run.rounds())
        if stopped == "rounds" and missed.nothing:
            raise RunError(
                f"none of the {missed.rounds} rounds changed the model: "
                f"{missed.reason or 'no node could train'}; the nodes' errors are in "
                f"{self.run.log_path}"
            )
        return self._end(position, stopped)

    def _ask(self, position: Position) -> tuple[Position, bool]:
        """Ask the private means whose time has come; whether one does not fit the budget."""
        timeout = self.job.options.round_timeout or None
        asker = QueryRunner(self.grid, self.nodes, self.job.guard, self.processes, timeout)
        for question in self.job.questions:
            due = question.due(position.round, self.job.options.rounds)
            if not due or question.name in position.answered:
                continue
            if not self.job.guard.affords(question.claims()):
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
            self._save(position, last=True)
        return position, False

    # ---- one round

    def _round(self, position: Position, number: int) -> Position:
        phases = Phases()
        with phases("sample"):
            if self._once:
                checkpoint.begin(self.run.checkpoint_path, number)
            cohort = self._choose(number)
            requests = self._requests(position, number, cohort)
            bytes_down = self._bytes(requests)
        facts = self.job.stack.check(self.facts.replace(round=number), position.layers)
        gathering = trips(self.job.stack, requests, self._gathering(number, facts))
        del requests  # with them goes the model that was sent, once all have answered
        with phases("train"):
            sum_ = drive(gathering, lambda messages: self._replies(messages, phases))
        del gathering
        if not self.job.guard.seeded:
            position = self._count_failures(position, number, sum_)
        if sum_.revealed:
            self.job.guard.charge(number, facts, sum_.replies)
        before = position.parameters
        with phases("aggregate"):
            position, train_metrics = self._apply(position, number, facts, sum_, len(cohort))
        used = position.parameters is not before
        del before  # a model
        sum_ = replace(sum_, total=torch.empty(0), buffers=None)  # it is in the model now
        with phases("evaluate"):
            position = self._with_statistics(position, cohort)
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
            "used": used,
            "failed": self.failures.of([*sum_.rejected, *(federated.failed if federated else ())]),
            "metrics": metrics,
            "train": train_metrics,
            "federated": federated.summary() if federated else None,
            "epsilon": self.job.guard.epsilon(),
            "learning_rate": self._rate(number),
            **({"secure": dict(sum_.about)} if sum_.about else {}),
            **({} if sum_.revealed else {"aborted": sum_.aborted}),
            **self.failures.limited(number, sum_.limited),
        }
        self.statements.write()
        self.run.append_round(line)
        self.failures.tell(number, line["failed"])
        self.progress.round_done(line)
        self._save(position, last=number == self.job.options.rounds)
        return position

    def _choose(self, number: int) -> list[NodeRef]:
        entropy = [self.job.options.seed, number, 1] if self.job.guard.seeded else None
        nodes = self.job.guard.eligible(number, self.nodes)
        cohort = [nodes[i] for i in self.cohort.draw(len(nodes), entropy)] if nodes else []
        cohort = self._present(cohort)
        self.job.guard.open(number, cohort)
        return cohort

    def _present(self, nodes: Sequence[NodeRef]) -> list[NodeRef]:
        """Without those that were shut out since the run began.

        They are drawn all the same: the sampling rate is of the population that was planned for.
        """
        gone = self.grid.gone() if isinstance(self.grid, BaseGrid) else set()
        return [node for node in nodes if node.node_id not in gone]

    def _requests(
        self, position: Position, number: int, cohort: Sequence[NodeRef], kind: str = "train"
    ) -> list[Message]:
        config = ConfigRecord({"round": number, "manifest": self.manifest.digest})
        rate = self._rate(number)
        if rate is not None:
            config["learning-rate"] = rate
        if kind == "train":
            facts = self.facts.replace(round=number)
            for name, value in self.job.stack.publish(position.layers, facts).items():
                config[name] = value
        vector = position.parameters
        if kind == "evaluate" and position.average is not None:
            vector = position.average  # what the run would end with
        model = {PARAMETERS: self._pack(vector)} | public_arrays(position.public)
        if self.synced_buffers.size:
            model[BUFFERS] = to_array(position.buffers)
        if self.processes and kind == "train":
            return pool_requests(model, config, cohort, self.processes)
        content = RecordDict({MODEL: record_of(model), CONFIG: config})
        group = str(number)
        return [
            Message(content, node.node_id, kind, ttl=ROUND_TTL, group_id=group) for node in cohort
        ]

    def _share(self, vector: Tensor) -> Tensor:
        """The vector over the bytes that are sent of it, so that they do not take room twice."""
        array = self._array(vector)
        shared = from_array(array)
        if shared.dtype != vector.dtype:  # it travels as another type
            return vector
        self._packed = (shared, array)
        return shared

    def _pack(self, vector: Tensor) -> Array:
        if self._packed is not None and self._packed[0] is vector:
            return self._packed[1]
        return self._array(vector)

    def _array(self, vector: Tensor) -> Array:
        """The vector as it is sent; an engine of Umbel's may lay it where its nodes can map it."""
        return self.grid.array(vector) if isinstance(self.grid, BaseGrid) else to_array(vector)

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
            buffers=self.synced_buffers.size,
            run_id=self.grid.run.run_id,
            contract=self.job.contract,
        )

    def _replies(self, messages: Sequence[Message], phases: "Phases") -> Iterator[Message]:
        """The grid's replies; the time that the collect spends between them is aggregation."""
        timeout = self.job.options.round_timeout or None
        done = 0
        for reply in stream(self.grid, messages, timeout):  # `enumerate` would hold each reply
            done += 1  # noqa: SIM113
            self.progress.message_done(done, len(messages))
            self.statements.hear(reply)
            with phases("aggregate", within="train"):
                yield reply
            del reply  # while the next is awaited, this one must not take room

    def _apply(
        self, position: Position, number: int, facts: Facts, sum_: Sum, asked: int
    ) -> tuple[Position, dict[str, float]]:
        """The next model: decode the sum, step the optimiser, mix in the buffers."""
        need = self.job.options.min_replies or self._half_of(asked)
        if (sum_.replies < need and self.job.guard.seeded) or sum_.aborted:
            return self._abandon(position, number, sum_, need), {}
        rnd = Round(
            number=number,
            cohort=self.expected,
            replies=sum_.replies,
            weight=sum_.weight,
            facts=facts,
            generator=torch.Generator().manual_seed(self.job.options.seed * 1_000_003 + number),
        )
        average, layers, metrics = self.job.stack.decode(
            sum_, position.layers, rnd, self.facts.replace(round=number)
        )
        failed_rounds = 0 if self.job.guard.seeded else position.failed_rounds
        after = position.replace(round=number, layers=layers, failed_rounds=failed_rounds)
        if average is None:
            return after, metrics
        parameters, slots = self.optimizer.step(position.parameters, average, position.slots)
        del average
        # A sum that is finite has no term that is not; it costs a tenth of looking at each.
        if not (math.isfinite(parameters.sum()) or bool(torch.isfinite(parameters).all())):
            raise RunError(
                f"the model stopped being finite in round {number}; lower learning-rate or "
                "server-learning-rate"
            )
        after = after.replace(parameters=self._share(parameters), slots=slots)
        if sum_.buffers is not None:
            after = after.replace(buffers=sum_.buffers.to(position.buffers.dtype))
        return self._averaged(after), metrics

    def _count_failures(self, position: Position, number: int, sum_: Sum) -> Position:
        """Of a private run: how many rounds in a row all nodes that were asked have failed.

        Such a round releases noise and is paid like any other, since model users must not see
        who was asked. When all fail again and again there is nothing to protect and nothing to
        learn, so the run ends before it has spent its budget on noise.

        Raises:
            RunError: it has happened too often, or in the first round to every node there is.
        """
        if sum_.replies or not sum_.rejected or sum_.aborted:
            return position.replace(failed_rounds=position.failed_rounds if sum_.aborted else 0)
        after = position.replace(failed_rounds=position.failed_rounds + 1)
        everyone = position.round == 0 and len(sum_.rejected) >= len(self.nodes)
        if after.failed_rounds >= PATIENCE_WITHOUT_REPLIES or everyone:
            raise RunError(
                f"round {number}: all {len(sum_.rejected)} nodes that were asked failed"
                f"{self.failures.first(sum_.rejected)}; the run ends before it spends its budget "
                f"on noise; the nodes' errors are in {self.run.log_path}"
            )
        return after

    def _half_of(self, asked: int) -> int:
        """The fewest replies that stand for a round: half of those that are waited for."""
        share = self.grid.enough if isinstance(self.grid, BaseGrid) else 1.0
        return max(1, math.ceil(share * asked / 2))

    def _abandon(self, position: Position, number: int, sum_: Sum, need: int) -> Position:
        """A round without enough replies leaves the model as it was."""
        if not sum_.replies and not sum_.rejected and not sum_.aborted:
            self.progress.note(f"round {number}: the draw chose no node; the model stays as it was")
            return position.replace(round=number)
        first = self.failures.first(sum_.rejected)
        after = position.replace(round=number, failed_rounds=position.failed_rounds + 1)
        said = f"round {number}: {sum_.replies} of {need} needed replies could be used{first}"
        if sum_.aborted:
            said = f"round {number}: {sum_.aborted}{first}"
        answered = any(item.reason != NO_REPLY for item in sum_.rejected)
        nobody = answered and not sum_.aborted and not sum_.replies and position.round == 0
        if nobody or after.failed_rounds >= PATIENCE_WITHOUT_REPLIES:
            raise RunError(f"{said}; the run ends; the nodes' errors are in {self.run.log_path}")
        self.progress.note(f"{said}; the model stays as it was")
        return after

    def _averaged(self, position: Position) -> Position:
        start = self.job.options.average_from
        if not start or position.round < start:
            return position
        count = position.averaged + 1
        before = position.average if position.average is not None else position.parameters
        return position.replace(average=before.lerp(position.parameters, 1 / count), averaged=count)

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
        if self.synced_buffers.size:
            mixed |= self.synced_buffers.unflatten(buffers)
        elif self.statistics.size:
            mixed |= self.statistics.unflatten(buffers)
        return self.manifest.unflatten(vector), mixed

    def _with_statistics(self, position: Position, cohort: Sequence[NodeRef]) -> Position:
        """The model's running statistics, of the nodes that trained; where they are looked at."""
        options = self.job.options
        last = position.round == options.rounds
        judged = self.job.evaluate is not None and position.round % options.evaluate_every == 0
        if not self.statistics.size or not (last or judged):
            return position
        timeout = options.round_timeout or None
        found = ask_statistics(self.grid, cohort, self.statistics, position.round, timeout)
        return (
            position if found is None else position.replace(buffers=self.statistics.flatten(found))
        )

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
            return position.replace(evaluations_since_best=position.evaluations_since_best + 1)
        vector = position.parameters if position.average is None else position.average
        best = Best(value, position.round, vector, position.buffers)
        return position.replace(best=best, evaluations_since_best=0)

    def _patience_is_over(self, position: Position) -> bool:
        patience = self.job.options.early_stop_patience
        return patience > 0 and position.evaluations_since_best >= patience

    def _federated_is_due(self, number: int) -> bool:
        every = self.job.options.federated_every
        return (
            not self.job.quiet
            and every >= 0
            and (number == self.job.options.rounds or (every > 0 and number % every == 0))
        )

    def _federated(self, position: Position) -> FederatedEvaluation:
        count = self.job.options.federated_nodes or len(self.nodes)
        nodes = self._present(self.nodes)[:count]
        requests = self._requests(position, position.round, nodes, "evaluate")
        timeout = self.job.options.round_timeout or None
        evaluation = gather(stream(self.grid, requests, timeout), nodes)
        if evaluation.rows:
            self.run.write_nodes(evaluation.rows)
            self._fair = evaluation.means()
        return evaluation

    # ---- begin, save, end

    def _begin(self) -> Position:
        position = checkpoint.load(self.run.checkpoint_path)
        if position is not None:
            restore = getattr(self.grid, "restore_states", None)
            if restore is not None:
                restore(checkpoint.load_nodes(self.run.checkpoint_path, position.round))
            if not self._once:
                self._tell_what_is_repeated(position.round)
            self.run.truncate_rounds(position.round)
            for line in self.run.rounds():
                self._metrics = line.get("metrics") or self._metrics
                self._fair = _means_of(line.get("federated")) or self._fair
            if self.statistics.size and not position.buffers.numel():  # a run of an older version
                position = position.replace(buffers=self._first_statistics())
            return self._after_a_stop(position)
        self.run.truncate_rounds(-1)
        parameters = self._share(self.manifest.flatten(self._first))
        self._first = {}
        buffers = checkpoint.no_buffers()
        if self.synced_buffers.size:
            buffers = self.synced_buffers.flatten(
                averaged_buffers(self.job.buffers, self.job.options.buffers)
            )
        elif self.statistics.size:
            buffers = self._first_statistics()
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
        return self._after_a_stop(position)

    @property
    def _once(self) -> bool:
        """Whether nodes answer a round once only: in secret sums, where their records stay."""
        goes_back = hasattr(self.grid, "restore_states")
        return isinstance(self.job.stack.collect, Seals) and not goes_back

    def _after_a_stop(self, position: Position) -> Position:
        """Go on with a round that no node has begun: those give no second update for one."""
        begun = checkpoint.begun(self.run.checkpoint_path) if self._once else 0
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

    def _tell_what_is_repeated(self, saved: int) -> None:
        done = max((int(line.get("round", 0)) for line in self.run.rounds()), default=0)
        if done > saved:
            which = f"round {done}" if done == saved + 1 else f"rounds {saved + 1} to {done}"
            self.progress.note(
                f"{which} had ended and not been saved yet; the run goes on before, and repeats it"
            )

    def _first_statistics(self) -> Tensor:
        return self.statistics.flatten(self.job.buffers)

    def _save(self, position: Position, *, last: bool) -> None:
        now = time.monotonic()
        wait = min(CHECKPOINT_EVERY_S, self._saving_took / _CHECKPOINT_SHARE)
        if last or now - self._saved_at >= wait:
            states = getattr(self.grid, "pickled_states", dict)
            checkpoint.save(self.run.checkpoint_path, position, states())
            self._saved_at = time.monotonic()
            self._saving_took = self._saved_at - now

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
        measured = "central" if metrics else ""
        if self.job.evaluate is None and self._fair:
            metrics, measured = self._fair, "nodes"
        return Outcome(
            rounds=position.round,
            stopped=stopped,
            metrics=dict(metrics),
            parameters=parameters,
            buffers=buffers,
            public=position.public,
            measured=measured,
        )

    def _bytes(self, requests: Sequence[Message]) -> int:
        size = self.manifest.size * self.manifest.dtype.itemsize
        return len(requests) * (size + self.synced_buffers.size * 4)


def _means_of(federated: Mapping[str, Any] | None) -> dict[str, float]:
    """The nodes' means, from the line of a round."""
    return {name: float(values["mean"]) for name, values in (federated or {}).items()}
