"""The one object from which both apps of a federation come.

    task.py         federation = Federation(trainer=TorchTrainer(Net), data=Partitioned(...))
    server_app.py   app = federation.server_app()
    client_app.py   app = federation.client_app()

The two halves cannot disagree about the model, the options or the layers, because there is
nothing to agree about: they hold the same object.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from umbel.clients.data.examples import Node, Split
from umbel.clients.data.inputs import Inputs
from umbel.clients.given import check_functions, check_trainer, trainer_of, understood, use_of
from umbel.clients.handler import ClientHandler, FederationClientApp
from umbel.clients.pooling import Questions, can_pool, questions_of
from umbel.clients.statistics import statistics_of
from umbel.clients.trainers.base import (
    ChecksOptions,
    Trainer,
    Weights,
    check_honours,
    promising,
)
from umbel.core.contents import take_record
from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.core.names import UPDATE
from umbel.core.options import Options, Value, checked, override, renamed
from umbel.core.records import Tree, from_array
from umbel.server.output.report import NOT_ASKED, write_report
from umbel.server.output.session import Session, current
from umbel.server.private.population import place_of
from umbel.server.provenance import record_start
from umbel.server.roster import roster
from umbel.server.rounds import Rounds
from umbel.server.shortfall import Shortfall
from umbel.server.training_spec import Evaluate, Outcome, TrainingSpec
from umbel.strategies import groups
from umbel.strategies.async_options import AsyncOptions
from umbel.strategies.composition import Asked, compose
from umbel.strategies.compression.options import CompressionOptions
from umbel.strategies.contract import Contract
from umbel.strategies.device_options import DeviceOptions
from umbel.strategies.exchange import Advises, ComparesWithOwn, Feeds, PlainExchange, compares
from umbel.strategies.layout import shows_statistics
from umbel.strategies.methods.fine_tuning import FineTuning
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.parts import check_given, default_names, part_for, required_part
from umbel.strategies.protection import hides, quiet
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import ByLosses
from umbel.strategies.schedules import checked_rate
from umbel.strategies.stack import Stack

if TYPE_CHECKING:
    from umbel.server.private.run import PrivateRun
    from umbel.strategies.private.private_mean import PrivateMean

LOST = 1e-3
"""Of the longest update, the rounding error from which a user is told."""
EXAMPLE_LEVEL = "example-"
"""How the options begin that ask for privacy of single examples, which a trainer gives."""
MISSPELT = 0.85
"""So alike are an option that nobody knows and one that somebody does, if it was misspelt."""
LOCAL_STATISTICS = "running_mean"
"""How the running statistics of batch normalisation are called in torch."""


@runtime_checkable
class TestsCentrally(Protocol):
    """A `data` function that has held-out examples for the coordinator."""

    def central_test(self, options: Options) -> Any:
        """The examples."""
        ...


@dataclass(frozen=True)
class Federation:
    """A federated task: who trains what on which data, under which stack.

    Attributes:
        trainer: knows the model; see `umbel.TorchTrainer`, `KerasTrainer`, `JaxTrainer`,
            `SklearnTrainer`, `FunctionTrainer`. Or a function of the options that gives one of
            several.
        data: a node's own examples; see `umbel.Partitioned`.
        test: held-out examples for central evaluation; left out, `data.central_test` is used
            where it exists.
        stack: the layers and the collect, or a function of the options that makes them.
        options: defaults of this app, over those of Umbel and of the trainer.
        derived_options: from the options to those that they imply and that nobody gave, e.g. of a
            recipe.
        questions: private means that are asked before, between and after rounds, or a function
            of the options that makes them; see `umbel.PrivateMean`.
        summary: adds to the result of a run, e.g. a comparison with other ways to train.
        name: as it is shown; the app's own name if left out.
        inputs: how what people have becomes what the model takes, for those who use it later;
            left out, it is what `data` says of its data set.
        labels: the names of the classes, likewise.
        optimizer: makes the next model of the average update; see `umbel.ServerOptimizer`. This
            and the following parts are values, functions of the options, or names; a name that the
            options say (`optimizer`, `cohort`, `aggregator`, `method`) goes before them.
        sampler: who takes part in a round; see `umbel.Sampler`.
        aggregator: makes one result of the updates, in place of the bottom of the stack.
        root: a few examples of the coordinator's own, from the options, for aggregator=fltrust.
        objective: changes the nodes' training, above the layers of the stack.
        tuned: the former name of `derived_options`.
    """

    trainer: Trainer | Callable[[Options], Trainer]
    data: Callable[[Node, Options], Split | Any]
    test: Callable[[Options], Any] | None = None
    stack: Stack | Callable[[Options], Stack] = field(default_factory=Stack)
    options: Mapping[str, Value] = field(default_factory=dict)
    derived_options: Callable[[Options], Mapping[str, Value]] | None = None
    questions: Questions = ()
    summary: Callable[[Outcome, Options], Mapping[str, Any]] | None = None
    name: str = ""
    inputs: Inputs | None = None
    labels: tuple[str, ...] = ()
    optimizer: Any = None
    sampler: Any = None
    aggregator: Any = None
    objective: Any = None
    root: Callable[[Options], Any] | None = None
    tuned: InitVar[Callable[[Options], Mapping[str, Value]] | None] = None

    def __post_init__(self, tuned: Callable[[Options], Mapping[str, Value]] | None) -> None:
        if tuned is not None:
            object.__setattr__(self, "derived_options", tuned)
        check_trainer(self.trainer)
        check_functions(self, "data", "test", "derived_options", "summary", "root")
        for kind, part in self._parts.items():
            check_given(kind, part)

    @property
    def _parts(self) -> dict[str, Any]:
        """What the app brings, by kind of part."""
        return {
            "optimizer": self.optimizer,
            "sampler": self.sampler,
            "aggregator": self.aggregator,
            "objective": self.objective,
        }

    def trainer_for(self, options: Options) -> Trainer:
        """The trainer of these options (complete ones, but for those of the trainer itself).

        Raises:
            ConfigError: the app's function gives none.
        """
        return trainer_of(self.trainer, options)

    def known_options(self, given: Options | None = None) -> dict[str, Value]:
        """Every option that this federation understands, with its default.

        Args:
            given: what a run says, where that decides who trains.
        """
        own = renamed(self.options)
        known = {
            **groups.defaults(),
            **default_names(self._parts),
        }
        trainer = self.trainer_for({**known, **own, **renamed(given or {})})
        return {**known, **understood(trainer), **own}

    def _derived(self, options: Options) -> dict[str, Value]:
        return renamed(self.derived_options(options)) if self.derived_options else {}

    def complete(self, given: Options) -> dict[str, Value]:
        """The given options over the defaults, types checked.

        What `derived_options` implies stands where nothing is given, or 0 for an option whose
        default is another: so an app can name `rounds` in its pyproject, for engines that change
        only options named there, and leave it to them.

        Raises:
            ConfigError: an option of the wrong type, or one that is probably misspelt.
        """
        given = renamed(given)
        known = self.known_options(given)
        for name in given:
            meant = [] if name in known else difflib.get_close_matches(name, known, 1, MISSPELT)
            if meant and meant[0] not in given:
                raise ConfigError(
                    f"there is no option {name!r}; did you mean {meant[0]}? (if it is the app's "
                    "own, name it in Federation(options={...}) too)"
                )
        complete = known | {
            name: checked(name, value, known[name]) if name in known else value
            for name, value in given.items()
        }
        for name, value in self._derived(complete).items():
            if name not in given or (given[name] == 0 and known[name] != 0):
                complete[name] = checked(name, value, known[name])
        checked_rate(complete)
        return complete

    def override(self, known: Options, changes: Options) -> dict[str, Value]:
        """`known` with what somebody changed, and with what those choices imply.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type.
        """
        known, changes = renamed(known), renamed(changes)
        known = self._of_trainer(known, {**known, **changes})
        chosen = override(known, changes)
        if self.derived_options is None:
            return chosen
        before, after = self._derived(known), self._derived(chosen)
        # What was implied follows the choice; what the app's own file says otherwise stands.
        implied = {n: v for n, v in after.items() if known.get(n) == before.get(n, known.get(n))}
        return override(chosen, {**implied, **changes})

    def _of_trainer(self, known: Options, chosen: Options) -> dict[str, Value]:
        """`known` with the defaults of the trainer that `chosen` gives in place of its own's."""
        before, after = self.known_options(known), self.known_options(chosen)
        untouched = {name for name, value in before.items() if known.get(name) == value}
        kept = {n: v for n, v in known.items() if n in after or n not in untouched}
        return {**kept, **{n: v for n, v in after.items() if n in untouched or n not in known}}

    def check_options(self, options: Options) -> None:
        """Refuse options that cannot be used, before there is a directory, a process or a message.

        Args:
            options: complete ones.

        Raises:
            ConfigError: a value of any group, of the trainer's or of the layers that they ask for
                cannot be used.
            StackError: layers that do not fit together.
        """
        asked = Asked.read(options)
        DeviceOptions.read(options)
        trainer = self.trainer_for(options)
        if isinstance(trainer, ChecksOptions):
            trainer.check_options(options)
        MethodOptions.read(options).check_for(str(options["method"]))
        required_part("optimizer", self.optimizer, options)
        sampler = required_part("sampler", self.sampler, options)
        stack = self.stack_for(options, asked)
        promised = promising(trainer, options) is not None
        AsyncOptions.read(options).check(asked.run, stack, promised)
        why = self._quiet(trainer, stack, options)
        if why and isinstance(sampler, ByLosses) and sampler.by_losses:
            raise ConfigError(
                f"cohort={sampler.name} chooses nodes by the losses that they measure, and who is "
                f"asked would show those, which nobody may see because {why}; take cohort=fixed or "
                "poisson"
            )
        self._check_judged(trainer, stack, asked.run, options)

    def _check_judged(
        self, trainer: Trainer, stack: Stack, run: RunOptions, options: Options
    ) -> None:
        """Raises:
        ConfigError: models are to be tuned for a test on the nodes, and there is none.
        """
        epochs = MethodOptions.read(options).fine_tune_epochs
        never = "client-eval-every is -1" if run.client_eval_every < 0 else ""
        why = never or self._quiet(trainer, stack, options)
        if "local-epochs" not in understood(trainer):
            why = f"{type(trainer).__name__} has no local-epochs, so that nothing says how"
        if epochs and why:
            raise ConfigError(
                f"fine-tune-epochs is {epochs}, for models that nodes judge on their own test "
                f"examples, and none is tuned, because {why}; leave fine-tune-epochs out"
            )

    def stack_for(self, options: Options, asked: Asked | None = None) -> Stack:
        """The stack of these options (complete ones), which holds what they ask for.

        Args:
            options: complete ones.
            asked: what has been read of them already.

        Raises:
            ConfigError: they ask for what this app's stack or trainer does not do.
            StackError: layers that do not fit together.
        """
        for name in options:
            if name.startswith(EXAMPLE_LEVEL) and name not in self.known_options(options):
                raise ConfigError(
                    f"{name} asks for privacy of each example, but this app's trainer does not "
                    "know it, so nothing would be private; wrap the trainer in PrivateSgd, or "
                    f"leave {name} out"
                )
        stack = self.stack if isinstance(self.stack, Stack) else self.stack(options)
        aggregator = part_for("aggregator", self.aggregator, options)
        objective = part_for("objective", self.objective, options, lambda: self._first(options))
        if aggregator is not None:
            stack = replace(stack, collect=aggregator)
        if compares(stack.collect) and self.root is None:
            raise ConfigError(
                f"{stack.collect.name} compares updates with one of the coordinator's own, and "
                "this app has no examples to make it of; give Federation(root=...), a function of "
                "the options, or take another aggregator"
            )
        compression = CompressionOptions.read(options)
        stack = compression.around(stack, int(options["seed"]), bool(options["secure"]))
        tuning = MethodOptions.read(options).fine_tune_epochs
        own = FineTuning(tuning) if tuning else None
        first = [layer for layer in (own, objective) if layer is not None]
        stack = replace(stack, layers=(*first, *stack.layers))
        stack = compose(stack, asked or options, lambda: self._size(options))
        check_honours(self.trainer_for(options), stack)
        return stack

    def _first(self, options: Options) -> tuple[Tree, Tree]:
        """Parameters and buffers of the first model."""
        first = self.trainer_for(options).initial(options, int(options["seed"]))
        return first.parameters, first.buffers

    def _size(self, options: Options) -> int:
        """Coordinates of an update before any layer."""
        return sum(tensor.numel() for tensor in self._first(options)[0].values())

    def client_app(self) -> FederationClientApp:
        """The nodes' app; assign it to `app` at the top level of `client_app.py`."""
        return FederationClientApp(
            ClientHandler(
                self.trainer,
                self.data,
                options=self.complete,
                stack=self.stack_for,
                questions=self.questions,
            )
        )

    def server_app(self) -> "FederationServerApp":
        """The coordinator's app; assign it to `app` at the top level of `server_app.py`."""
        return FederationServerApp(self)

    def job(self, options: Options, nodes: int = 0) -> TrainingSpec:
        """What the coordinator trains under these options (complete ones) with so many nodes."""
        asked = Asked.read(options)
        stack = self.stack_for(options, asked)
        trainer = self.trainer_for(options)
        first = trainer.initial(options, asked.run.seed)
        questions = self._questions(options, asked.privacy.seed)
        if questions and (hides(stack) or promising(trainer, options) is not None):
            raise ConfigError(
                f"the private mean {questions[0].name!r} takes its noise at the coordinator, which "
                f"would see every node's exact answer; under {stack} nodes give none, so leave "
                "the private means out, or train with central privacy (epsilon alone)"
            )
        how = AsyncOptions.read(options)
        how.check(asked.run, stack, promising(trainer, options) is not None)
        pooled = not how.on and can_pool(trainer, self.data, nodes, stack, options, questions)
        return TrainingSpec(
            asynchronous=how,
            parameters=first.parameters,
            buffers=first.buffers,
            options=asked.run,
            privacy=asked.privacy,
            stack=self._with_root(stack, options),
            evaluate=None if stack.keeps_parts else self._central_evaluation(trainer, options),
            learning_rate=checked_rate(options),
            questions=questions,
            statistics=statistics_of(trainer, stack, options),
            pooled=pooled,
            quiet=self._quiet(trainer, stack, options),
            sampler=required_part("sampler", self.sampler, options),
            optimizer=required_part("optimizer", self.optimizer, options),
        )

    def _with_root(self, stack: Stack, options: Options) -> Stack:
        """The stack with the coordinator's own examples, where its rule compares with them."""
        collect = stack.collect
        if self.root is None or not isinstance(collect, Feeds):
            return stack
        rule = collect.aggregator
        if not isinstance(rule, ComparesWithOwn):
            return stack
        own = Split(self.root(options))
        handler = ClientHandler(
            self.trainer, lambda *_: own, options=self.complete, stack=self.stack_for
        )

        def reference(request: Message) -> Tensor:
            """What a node with these examples would send."""
            place: dict[str, Value] = {"partition-id": 0, "num-partitions": 1}
            try:
                reply = handler.train(request, Context(0, 0, place, RecordDict(), dict(options)))
            except Exception as error:
                raise RunError(
                    "the coordinator cannot train on its own root examples, which "
                    f"{stack.collect.name} needs: {described(error)}; give examples of the kind "
                    "that nodes train on"
                ) from error
            record = take_record(reply.content, UPDATE, ArrayRecord)
            return from_array(record[UPDATE])

        return replace(stack, collect=PlainExchange(rule.compared_with(reference)))

    def _quiet(self, trainer: Trainer, stack: Stack, options: Options) -> str:
        """Why nodes are not asked what they measure, or how they answer private means."""
        promise = promising(trainer, options)
        if promise is not None:
            return "single records are protected"
        if hides(stack):
            return "updates are hidden from the coordinator"
        return "the run is private" if quiet(stack) else ""

    def _questions(self, options: Options, seed: int | None) -> tuple["PrivateMean", ...]:
        found = questions_of(self.questions, options)
        return found if seed is None else tuple(replace(q, insecure_seed=seed) for q in found)

    def _central_evaluation(self, trainer: Trainer, options: Options) -> Evaluate | None:
        held_out = self.test
        if held_out is None and isinstance(self.data, TestsCentrally):
            held_out = self.data.central_test
        if held_out is None:
            return None
        examples = held_out(options)

        def evaluate(parameters: dict[str, Any], buffers: dict[str, Any]) -> Mapping[str, float]:
            weights = Weights(parameters, buffers)
            try:
                return trainer.evaluate(weights, examples, options).metrics
            except UmbelError:
                raise
            except Exception as error:
                raise RunError(
                    f"the model cannot be evaluated on the held-out examples: {described(error)}; "
                    "compare their shapes and labels with the model's"
                ) from error

        return evaluate


class FederationServerApp(ServerApp):
    """The `ServerApp` of a federation."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.federation = federation
        self.app_digest = ""
        self.main()(self._run)

    def installed(self, digest: str, _: Options) -> None:
        """Where the app comes from: the SHA-256 of its files in hex."""
        self.app_digest = digest

    def _run(self, grid: Grid, context: Context) -> None:
        federation = self.federation
        options = federation.complete(context.run_config)
        session = current(federation.name, dict(options))
        nodes = roster(grid)
        job = federation.job(options, len(nodes))
        contract = Contract.of(options, job.stack, job.parameters, job.buffers, self.app_digest)
        job = replace(job, contract=contract)
        start = record_start(session.run, job)
        privacy, asked = job.privacy, job.options
        private = None
        if job.stack.private:
            from umbel.server.private.run import PrivateRun

            private = PrivateRun(job, privacy, nodes, session, federation.data, start)
            self._say_who_comes(job.options, private, session)
            job = private.job
        elif job.questions or place_of(privacy, session.run, federation.data).path.exists():
            from umbel.server.private.unprotected import unprotected

            job = unprotected(job, privacy, nodes, session, federation.data, start)
        rounds = Rounds(job, grid, nodes, session.run, session.progress)
        job = rounds.job  # without the first model, which only the rounds need from here on
        if private is not None:
            private.job = job
        use = use_of(federation.trainer_for(options))
        session.describe(rounds.manifest.size, rounds.manifest.dtype.itemsize, use)
        name = federation.name or session.run.config().get("app", "federation")
        session.progress.start(
            f"{name} ({rounds.manifest.size:,} parameters)",
            job.options.rounds,
            len(nodes),
        )
        self._advise(job, rounds, session)
        self._say_what_is_not_asked(job, asked, session)
        outcome = rounds.fit()
        missed = Shortfall.of(session.run.rounds()).sentences()
        if missed:
            session.result["warnings"] = [*session.result.get("warnings", ()), *missed]
        session.result |= {
            "rounds": outcome.rounds,
            "metrics": dict(outcome.metrics),
            "epsilon": job.guard.epsilon(),
            "measured": outcome.measured,
            "stopped": outcome.stopped,
        }
        if private is not None:
            session.result |= private.finish(outcome)
        elif rounds.parts.statements.about_records:
            from umbel.server.private.records import certify_records

            session.result |= certify_records(session.run, outcome, privacy, federation.data)
        if federation.summary is not None:
            session.result["summary"] = dict(federation.summary(outcome, options))
        if session.own:
            session.finish()
            write_report(session.run.path)

    def _say_what_is_not_asked(
        self, job: TrainingSpec, asked: RunOptions, session: Session
    ) -> None:
        """Say why the table of the nodes' own measurements will be empty; reports say it too."""
        if job.quiet and asked.client_eval_every >= 0:
            reason = (
                f"nodes are not asked to evaluate the model, because {job.quiet}: their losses, "
                "accuracies and numbers of examples would tell about them what that hides"
            )
            session.progress.note(reason)
            session.run.write_config({**session.run.config(), NOT_ASKED: reason})

    def _say_who_comes(self, asked: RunOptions, private: "PrivateRun", session: Session) -> None:
        """Write down how a private run draws its cohorts, where its options said another way."""
        drawn, expected = private.drawn
        now = drawn if drawn == "all" else f"{drawn}, {expected:g}"
        session.run.write_config({**session.run.config(), "cohorts": now})
        if asked.cohort not in ("all", private.job.options.cohort):
            session.progress.note(
                f"cohort={asked.cohort} is what a run without privacy would draw; this one draws "
                f"{drawn} cohorts, as its accounting assumes (option sampling)"
            )

    def _say_what_is_lost(self, job: TrainingSpec, rounds: Rounds, session: Session) -> None:
        """Say which updates the rounding that exact sums need takes a part of."""
        states = job.stack.init(rounds.facts.size)
        facts = job.stack.check(rounds.facts.replace(round=1), states)
        if facts.grid is None or facts.l2_bound is None or job.stack.private:
            return  # noise is far above the rounding
        error = facts.grid * math.sqrt(facts.size / 3)  # of remainders spread evenly
        if error > LOST * facts.l2_bound:
            session.progress.note(
                f"updates are rounded to multiples of {facts.grid:.2g} so that their sum is exact; "
                f"one shorter than {100 * error:.2g} loses more than 1 % of itself, so clip to a "
                f"norm nearer to that of updates than {facts.l2_bound:.3g}, or quantise finer "
                "(secure-levels)"
            )

    def _advise(self, job: TrainingSpec, rounds: Rounds, session: Session) -> None:
        """Say what a user would otherwise find out from a bad curve."""
        if isinstance(job.stack.collect, Advises):
            expected = rounds.facts.expected_replies
            for line in job.stack.collect.advice(expected, job.stack.private):
                session.progress.note(line)
        self._say_what_is_lost(job, rounds, session)
        normed = any(LOCAL_STATISTICS in name for name in job.buffers)
        if job.statistics and normed:
            session.progress.note(
                "each node keeps running statistics of its own; the delivered model has those of "
                "all nodes together (buffers=local)"
            )
        elif normed and job.options.buffers != "mean":
            open_to_all = not job.stack.private and shows_statistics(job.stack, "local")
            cure = "buffers=local or mean" if open_to_all else "group normalisation"
            warning = (
                "the model's running statistics stay on the nodes, so the delivered model has "
                f"those of the first model and is not right without a node's own; use {cure}"
            )
            session.progress.note(warning)
            session.result["warnings"] = [*session.result.get("warnings", ()), warning]
