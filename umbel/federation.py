"""The one object from which both apps of a federation come.

    task.py         federation = Federation(trainer=TorchTrainer(Net), data=Partitioned(...))
    server_app.py   app = federation.server_app()
    client_app.py   app = federation.client_app()

The two halves cannot disagree about the model, the options or the layers, because there is
nothing to agree about: they hold the same object.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from umbel.clients.data.examples import Node, Split
from umbel.clients.node import FederationClientApp, NodeHalf
from umbel.clients.pooling import Questions, can_pool, questions_of
from umbel.clients.trainer import ChecksOptions, Trainer, Weights
from umbel.server.output.report import write_report
from umbel.server.output.session import Session, current
from umbel.server.roster import roster
from umbel.server.rounds import Evaluate, Job, Outcome, Rounds
from umbel.strategies.cohort import cohort_named
from umbel.strategies.errors import ConfigError, RunError, UmbelError, place
from umbel.strategies.options import Options, Value, checked, override
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack

if TYPE_CHECKING:
    from umbel.strategies.private.private_mean import PrivateMean

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
        """The stack that these options ask for, the privacy layers among them."""
        stack = self.stack if isinstance(self.stack, Stack) else self.stack(options)
        privacy = PrivacyOptions.read(options)
        secure = SecureOptions.read(options)
        if secure.secure:
            from umbel.strategies.secure.secure_stack import secure_stack

            return secure_stack(stack, secure, privacy)
        if not privacy.on:
            return stack
        from umbel.strategies.private.private_stack import private_stack

        run = RunOptions.read(options)
        momentum = run.server_momentum if run.optimizer == "fedavgm" else 0.0
        return private_stack(stack, privacy, run.rounds, momentum)

    def client_app(self) -> FederationClientApp:
        """The nodes' app; assign it to `app` at the top level of `client_app.py`."""
        return FederationClientApp(
            NodeHalf(
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

    def job(self, options: Options, nodes: int = 0) -> Job:
        """What the coordinator trains under these options (complete ones) with so many nodes."""
        stack = self.stack_for(options)
        run_options = RunOptions.read(options)
        first = self.trainer.initial(options, run_options.seed)
        rate = options.get("learning-rate")
        questions = self._questions(options)
        pooled = can_pool(self.trainer, self.data, nodes, stack, options, questions)
        return Job(
            parameters=first.parameters,
            buffers=first.buffers,
            options=run_options,
            stack=stack,
            evaluate=self._central_evaluation(options),
            learning_rate=float(rate) if isinstance(rate, int | float) else None,
            questions=questions,
            pooled=pooled,
        )

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
                said = " ".join(f"{type(error).__name__}: {error}".split())
                raise RunError(
                    f"the model cannot be evaluated on the held-out examples: {said} "
                    f"({place(error)}); compare their shapes and labels with the model's"
                ) from error

        return evaluate


class FederationServerApp(ServerApp):
    """The `ServerApp` of a federation."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.federation = federation
        self.main()(self._run)

    def _run(self, grid: Grid, context: Context) -> None:
        federation = self.federation
        options = federation.complete(context.run_config)
        session = current(federation.name or "federation", dict(options))
        nodes = roster(grid)
        job = federation.job(options, len(nodes))
        private = None
        if job.stack.private:
            from umbel.server.private.run import PrivateRun

            private = PrivateRun(job, PrivacyOptions.read(options), len(nodes), session)
            job = private.job
        rounds = Rounds(job, grid, nodes, session.run, session.progress)
        job = rounds.job  # without the first model, which only the rounds need from here on
        if private is not None:
            private.job = job
        session.describe(rounds.manifest.size, rounds.manifest.dtype.itemsize)
        name = federation.name or session.run.config().get("app", "federation")
        session.progress.start(
            f"{name} ({rounds.manifest.size:,} parameters)",
            job.options.rounds,
            len(nodes),
        )
        self._advise(job, session, len(nodes))
        outcome = rounds.fit()
        session.result |= {
            "rounds": outcome.rounds,
            "metrics": dict(outcome.metrics),
            "epsilon": job.guard.epsilon(),
            "stopped": outcome.stopped,
        }
        if private is not None:
            session.result |= private.finish(outcome)
        if federation.summary is not None:
            session.result["summary"] = dict(federation.summary(outcome, options))
        if session.own:
            session.finish()
            write_report(session.run.path)

    def _advise(self, job: Job, session: Session, nodes: int) -> None:
        """Say what a user would otherwise find out from a bad curve."""
        advice = getattr(job.stack.collect, "advice", None)
        if advice is not None:
            cohort = cohort_named(job.options.cohort, job.options.cohort_size)
            for line in advice(cohort.expected(nodes), job.stack.private):
                session.progress.note(line)
        statistics = any(LOCAL_STATISTICS in name for name in job.buffers)
        if statistics and job.options.buffers == "local" and job.evaluate is not None:
            session.progress.note(
                "the model's running statistics stay on the nodes, so the central evaluation "
                "sees those of the first model; use buffers=mean, or group normalisation"
            )
