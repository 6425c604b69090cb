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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from umbel.clients.chosen_trainer import use_of
from umbel.clients.data.examples import Node, Split
from umbel.clients.data.inputs import Inputs
from umbel.clients.given import check_functions, check_trainer
from umbel.clients.handler import ClientHandler, FederationClientApp
from umbel.clients.pooling import Questions, can_pool, questions_of
from umbel.clients.statistics import statistics_of
from umbel.clients.trainers.base import ChecksOptions, Trainer, Weights, promising
from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.core.options import Options, Value, checked, override
from umbel.server.output.report import write_report
from umbel.server.output.session import Session, current
from umbel.server.private.population import place_of
from umbel.server.provenance import record_start
from umbel.server.roster import roster
from umbel.server.rounds import Rounds
from umbel.server.shortfall import Shortfall
from umbel.server.training_spec import Evaluate, Outcome, TrainingSpec
from umbel.strategies.composition import compose
from umbel.strategies.contract import Contract
from umbel.strategies.layout import shows_statistics
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.protection import hides, quiet
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import make_sampler
from umbel.strategies.schedules import checked_rate
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack

if TYPE_CHECKING:
    from umbel.strategies.private.private_mean import PrivateMean

LOST = 1e-3
"""Of the longest update, the rounding error from which a user is told."""
EXAMPLE_LEVEL = "example-"
"""How the options begin that ask for privacy of single examples, which a trainer gives."""
MISSPELT = 0.85
"""So alike are an option that nobody knows and one that somebody does, if it was misspelt."""
LOCAL_STATISTICS = "running_mean"
"""How the running statistics of batch normalisation are called in torch."""


@dataclass(frozen=True)
class Federation:
    """A federated task: who trains what on which data, under which stack.

    Attributes:
        trainer: knows the model; see `umbel.TorchTrainer`, `SklearnTrainer`, `FunctionTrainer`.
        data: a node's own examples; see `umbel.Partitioned`.
        test: held-out examples for central evaluation; left out, `data.central_test` is used
            where it exists.
        stack: the layers and the collect, or a function of the options that makes them.
        options: defaults of this app, over those of Umbel and of the trainer.
        tuned: from the options to those that they imply and that nobody gave, e.g. of a recipe.
        questions: private means that are asked before, between and after rounds, or a function
            of the options that makes them; see `umbel.PrivateMean`.
        summary: adds to the result of a run, e.g. a comparison with other ways to train.
        name: as it is shown; the app's own name if left out.
        inputs: how what people have becomes what the model takes, for those who use it later;
            left out, it is what `data` says of its data set.
        labels: the names of the classes, likewise.
    """

    trainer: Trainer
    data: Callable[[Node, Options], Split | Any]
    test: Callable[[Options], Any] | None = None
    stack: Stack | Callable[[Options], Stack] = field(default_factory=Stack)
    options: Mapping[str, Value] = field(default_factory=dict)
    tuned: Callable[[Options], Mapping[str, Value]] | None = None
    questions: Questions = ()
    summary: Callable[[Outcome, Options], Mapping[str, Any]] | None = None
    name: str = ""
    inputs: Inputs | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_trainer(self.trainer)
        check_functions(self, "data", "test", "tuned", "summary")

    def known_options(self) -> dict[str, Value]:
        """Every option that this federation understands, with its default."""
        trainers: Mapping[str, Value] = getattr(self.trainer, "OPTIONS", {})
        return {
            **RunOptions.defaults(),
            **PrivacyOptions.defaults(),
            **SecureOptions.defaults(),
            **trainers,
            **self.options,
        }

    def complete(self, given: Options) -> dict[str, Value]:
        """The given options over the defaults, types checked.

        What `tuned` implies stands where nothing is given, or 0 for an option whose default is
        another: so an app can name `rounds` in its pyproject, for engines that change only
        options named there, and leave it to `tuned`.

        Raises:
            ConfigError: an option of the wrong type, or one that is probably misspelt.
        """
        known = self.known_options()
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
        for name, value in (self.tuned(complete) if self.tuned else {}).items():
            if name not in given or (given[name] == 0 and known[name] != 0):
                complete[name] = checked(name, value, known[name])
        checked_rate(complete)
        return complete

    def override(self, known: Options, changes: Options) -> dict[str, Value]:
        """`known` with what somebody changed, and with what those choices imply.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type.
        """
        chosen = override(known, changes)
        if self.tuned is None:
            return chosen
        before, after = self.tuned(known), self.tuned(chosen)
        # What was implied follows the choice; what the app's own file says otherwise stands.
        implied = {n: v for n, v in after.items() if known.get(n) == before.get(n, known.get(n))}
        return override(chosen, {**implied, **changes})

    def check_options(self, options: Options) -> None:
        """Refuse options that cannot be used, before there is a directory, a process or a message.

        Args:
            options: complete ones.

        Raises:
            ConfigError: a value of any group, of the trainer's or of the layers that they ask for
                cannot be used.
            StackError: layers that do not fit together.
        """
        RunOptions.read(options)
        PrivacyOptions.read(options)
        SecureOptions.read(options)
        if isinstance(self.trainer, ChecksOptions):
            self.trainer.check_options(options)
        self.stack_for(options)

    def stack_for(self, options: Options) -> Stack:
        """The stack of these options (complete ones), which holds what they ask for.

        Raises:
            ConfigError: they ask for what this app's stack or trainer does not do.
            StackError: layers that do not fit together.
        """
        for name in options:
            if name.startswith(EXAMPLE_LEVEL) and name not in self.known_options():
                raise ConfigError(
                    f"{name} asks for privacy of each example, but this app's trainer does not "
                    "know it, so nothing would be private; wrap the trainer in PrivateSgd, or "
                    f"leave {name} out"
                )
        stack = self.stack if isinstance(self.stack, Stack) else self.stack(options)
        return compose(stack, options, lambda: self._size(options))

    def _size(self, options: Options) -> int:
        """Coordinates of an update before any layer."""
        first = self.trainer.initial(options, RunOptions.read(options).seed)
        return sum(tensor.numel() for tensor in first.parameters.values())

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
        stack = self.stack_for(options)
        run_options = RunOptions.read(options)
        first = self.trainer.initial(options, run_options.seed)
        questions = self._questions(options)
        if questions and (hides(stack) or promising(self.trainer, options) is not None):
            raise ConfigError(
                f"the private mean {questions[0].name!r} takes its noise at the coordinator, which "
                f"would see every node's exact answer; under {stack} nodes give none, so leave "
                "the private means out, or train with central privacy (epsilon alone)"
            )
        pooled = can_pool(self.trainer, self.data, nodes, stack, options, questions)
        return TrainingSpec(
            parameters=first.parameters,
            buffers=first.buffers,
            options=run_options,
            stack=stack,
            evaluate=self._central_evaluation(options),
            learning_rate=checked_rate(options),
            questions=questions,
            statistics=statistics_of(self.trainer, stack, options),
            pooled=pooled,
            quiet=self._quiet(stack, options),
        )

    def _quiet(self, stack: Stack, options: Options) -> str:
        """Why nodes are not asked what they measure, or how they answer private means."""
        promise = promising(self.trainer, options)
        if promise is not None:
            return "single records are protected"
        if hides(stack):
            return "updates are hidden from the coordinator"
        return "the run is private" if quiet(stack) else ""

    def _questions(self, options: Options) -> tuple["PrivateMean", ...]:
        found = questions_of(self.questions, options)
        seed = PrivacyOptions.read(options).seed
        return found if seed is None else tuple(replace(q, insecure_seed=seed) for q in found)

    def _central_evaluation(self, options: Options) -> Evaluate | None:
        held_out = self.test or getattr(self.data, "central_test", None)
        if held_out is None:
            return None
        examples = held_out(options)

        def evaluate(parameters: dict[str, Any], buffers: dict[str, Any]) -> Mapping[str, float]:
            weights = Weights(parameters, buffers)
            try:
                return self.trainer.evaluate(weights, examples, options).metrics
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
        session = current(federation.name or "federation", dict(options))
        nodes = roster(grid)
        job = federation.job(options, len(nodes))
        contract = Contract.of(options, job.stack, job.parameters, job.buffers, self.app_digest)
        job = replace(job, contract=contract)
        start = record_start(session.run, job)
        privacy = PrivacyOptions.read(options)
        private = None
        if job.stack.private:
            from umbel.server.private.run import PrivateRun

            private = PrivateRun(job, privacy, nodes, session, federation.data, start)
            self._say_who_comes(job.options, private.job.options, session)
            job = private.job
        elif job.questions or place_of(privacy, session.run, federation.data).path.exists():
            from umbel.server.private.unprotected import unprotected

            job = unprotected(job, privacy, nodes, session, federation.data, start)
        rounds = Rounds(job, grid, nodes, session.run, session.progress)
        job = rounds.job  # without the first model, which only the rounds need from here on
        if private is not None:
            private.job = job
        use = use_of(federation.trainer, options)
        session.describe(rounds.manifest.size, rounds.manifest.dtype.itemsize, use)
        name = federation.name or session.run.config().get("app", "federation")
        session.progress.start(
            f"{name} ({rounds.manifest.size:,} parameters)",
            job.options.rounds,
            len(nodes),
        )
        self._advise(job, rounds, session, len(nodes))
        self._say_what_is_not_asked(job, RunOptions.read(options), session)
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
        elif rounds.statements.about_records:
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
        """Say why the table of the nodes' own measurements will be empty."""
        if job.quiet and asked.federated_every >= 0:
            session.progress.note(
                f"nodes are not asked to evaluate the model, because {job.quiet}: their losses, "
                "accuracies and numbers of examples would tell about them what that hides"
            )

    def _say_who_comes(self, asked: RunOptions, drawn: RunOptions, session: Session) -> None:
        """Write down how a private run draws its cohorts, where its options said another way."""
        now = drawn.cohort if drawn.cohort == "all" else f"{drawn.cohort}, {drawn.cohort_size:g}"
        session.run.write_config({**session.run.config(), "cohorts": now})
        if asked.cohort not in ("all", drawn.cohort):
            session.progress.note(
                f"cohort={asked.cohort} is what a run without privacy would draw; this one draws "
                f"{drawn.cohort} cohorts, as its accounting assumes (option sampling)"
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

    def _advise(self, job: TrainingSpec, rounds: Rounds, session: Session, nodes: int) -> None:
        """Say what a user would otherwise find out from a bad curve."""
        advice = getattr(job.stack.collect, "advice", None)
        if advice is not None:
            cohort = make_sampler(job.options.cohort, job.options.cohort_size)
            for line in advice(cohort.expected(nodes), job.stack.private):
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
