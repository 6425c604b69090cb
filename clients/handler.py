"""The node's half of a round: a Flower `ClientApp` around a trainer and a node's own data.

    server -> node   train      model (flat), the round, what the layers publish
    node -> server   update     trained minus received, through the stack's layers; metrics
    server -> node   evaluate   model
    node -> server   metrics    on the node's own test examples; nothing where updates are protected
    server -> node   query.umbel_hello     on engines that do not know their nodes' names
    node -> server   its partition
    server -> node   query.umbel_ask, query.umbel_pool     see `umbel.clients.pooling`

Weights arrive and leave as one flat vector whose layout both sides derive from the trainer; a
digest of the layout travels with it, so a node with another model says so. Every message passes
the node's gate first (`umbel.clients.gate`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from umbel.clients.data.examples import ChecksNodes, Node, Split
from umbel.clients.gate import guarded
from umbel.clients.given import trainer_of
from umbel.clients.holding import Holder
from umbel.clients.ledger.charging import answered, leaves
from umbel.clients.phases import train_in_phases, tuned
from umbel.clients.plan import Plan, without_values
from umbel.clients.pooling import (
    Questions,
    answer_pool,
    answer_question,
    asked,
    members_of,
    pooled_examples,
    public_of,
    question_bundles,
    questions_of,
    training_bundles,
)
from umbel.clients.received import Received, job_seed, node_of
from umbel.clients.statistics import answer_statistics, statistics_of
from umbel.clients.trainers.base import CohortTrainer, Options, Trainer, Weights, promising
from umbel.core.errors import ConfigError
from umbel.core.names import ASK, POOL
from umbel.strategies.collect import COUNTED, EXAMPLES, METRICS
from umbel.strategies.layout import CONFIG, HELLO, STATISTICS
from umbel.strategies.secure.wire import action_of
from umbel.strategies.stack import Stack, own_context

OptionsKey = tuple[tuple[tuple[str, Any], ...], tuple[type, ...]]
"""A run's options as something to look up by; the types tell 1 from True."""


@dataclass(frozen=True)
class ClientHandler:
    """What a node does with messages; the same object serves every virtual node of a process.

    Attributes:
        trainer: knows the model; or a function of the options that gives one of several.
        data: the node's own examples.
        options: completes the run's configuration with defaults.
        stack: the layers, from the options.
        questions: the private means that may be asked.
        app_digest: SHA-256 of the app's files in hex; empty where the engine has none.
    """

    trainer: Trainer | Callable[[Options], Trainer]
    data: Callable[[Node, Options], Split | Any]
    options: Callable[[Options], Options]
    stack: Callable[[Options], Stack]
    questions: Questions = ()
    app_digest: str = ""
    _plans: dict[OptionsKey, Plan] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def _holder(self) -> Holder:
        return Holder(self.data)

    def train(self, message: Message, context: Context) -> Message:
        """Answer a request to train."""
        plan = self.plan(context)
        refused = plan.consider(message, context)
        if refused is not None:
            return Message(refused, reply_to=message)
        task = self._begin(plan, plan.receive(message, context, self._split(plan, context)))
        trained = train_in_phases(plan, task)
        self._train_again(plan, task)
        return plan.reply(task, trained)

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """Answer several requests to train as one batched computation.

        None where the trainer cannot do that, or does not find it worth while.
        """
        plan = self.plan(contexts[0])
        if plan.stack.phases:
            return None
        if isinstance(plan.trainer, CohortTrainer) and len(messages) > 1:
            tasks: list[Received] = []
            before = None
            for message, context in zip(messages, contexts, strict=True):
                before = plan.receive(message, context, self._split(plan, context), before)
                tasks.append(self._begin(plan, before))
            trained = plan.trainer.train_cohort(
                [task.weights for task in tasks],
                [task.split.train for task in tasks],
                [task.job for task in tasks],
            )
            if trained is not None:
                for task in tasks:
                    self._train_again(plan, task)
                return [plan.reply(*pair) for pair in zip(tasks, trained, strict=True)]
        return None

    def evaluate(self, message: Message, context: Context) -> Message:
        """Answer a request to evaluate; a node without test examples reports none.

        Where the run's updates are protected, a loss or a number of examples beside them would
        tell what they hide, so that nothing is answered.
        """
        plan = self.plan(context)
        if plan.quiet:
            return Message(RecordDict({METRICS: MetricRecord()}), reply_to=message)
        split = self._split(plan, context)
        metrics: dict[str, float] = {}
        counted: dict[str, int] = {}
        examples = 0
        if split.test is not None and len(split.test) > 0:
            task = plan.with_own_model(plan.receive(message, context, split))
            result = plan.trainer.evaluate(tuned(plan, task), split.test, plan.options)
            metrics, examples, counted = result.metrics, result.examples, result.counted
        content = RecordDict({METRICS: MetricRecord({**metrics, EXAMPLES: examples})})
        if counted:
            content[COUNTED] = MetricRecord({**counted})
        return Message(content, reply_to=message)

    def hello(self, message: Message, context: Context) -> Message:
        """Say which partition this node holds."""
        node = node_of(context)
        record = ConfigRecord({"partition": node.partition, "partitions": node.partitions})
        return Message(RecordDict({CONFIG: record}), reply_to=message)

    def answer(self, action: str, message: Message, context: Context) -> Message:
        """Answer a private mean, a pool of virtual nodes, or an extra trip of the collect."""
        if action == ASK:
            return self._ask(message, context)
        if action == POOL:
            return self._pool(message, context)
        if action == STATISTICS:
            return self._statistics(message, context)
        answers = self.plan(context).stack.collect.answers()
        if action not in answers:
            raise ConfigError(f"no query is registered under {action!r}")
        if action == action_of("mask"):
            leaves(context)
        return answers[action](message, context)

    def _statistics(self, message: Message, context: Context) -> Message:
        plan = self.plan(context)
        if plan.quiet:
            raise ConfigError(
                "running statistics would travel in the clear beside protected updates; "
                "use buffers=never, or a model with group normalisation"
            )
        names = statistics_of(plan.trainer, plan.stack, plan.options)
        return answer_statistics(message, names, plan.kept(context), context.state)

    def _ask(self, message: Message, context: Context) -> Message:
        plan = self.plan(context)
        plan.check_askable()
        question = asked(message, questions_of(self.questions, plan.options))
        if question is None:
            raise ConfigError("a node was asked for a private mean without its name")
        train = self._split(plan, context).train
        return answer_question(message, question, train, context.state)

    def _pool(self, message: Message, context: Context) -> Message:
        plan, count = self.plan(context), node_of(context).partitions
        plan.check_askable()
        question = asked(message, questions_of(self.questions, plan.options))
        examples = pooled_examples(self.data, members_of(message), count, plan.options)
        if question is not None:
            found = question_bundles(question, examples, public_of(message))
            return answer_pool(message, found, question.stack, question.size)
        task = plan.receive(message, context, Split(None))
        bundles = training_bundles(plan.trainer, task.weights, examples, task.job)
        return answer_pool(message, bundles, plan.stack, plan.manifest.size)

    def plan(self, context: Context) -> Plan:
        """What messages under the options of a context are answered with.

        Raises:
            ConfigError: options that the app does not have, or that do not go together.
        """
        key = _options_key(context)
        if key not in self._plans:
            options = self.options(context.run_config)
            trainer = trainer_of(self.trainer, options)
            self._plans.clear()
            self._plans[key] = Plan(
                options,
                self.stack(options),
                trainer,
                without_values(trainer.initial(options, int(options["seed"]))),
                promising(trainer, options),
                self.app_digest,
            )
        return self._plans[key]

    def _begin(self, plan: Plan, task: Received) -> Received:
        """The task with what the layers ask for before training."""
        if "start-loss" in plan.stack.needs:
            found = plan.trainer.evaluate(task.weights, task.split.train, plan.options)
            task = replace(task, start_loss=found.metrics.get("loss"))
        return plan.begin(task)

    def _train_again(self, plan: Plan, task: Received) -> None:
        """Train the models that stay on the node, for layers that have such."""
        for layer in plan.stack.twice:
            ctx = own_context(plan.told(task), layer.name, task.context.state)
            start, correction = layer.second(task.vector, ctx)
            weights = Weights(plan.manifest.unflatten(start), task.weights.buffers)
            job = replace(task.job, seed=task.job.seed ^ 1, correction=correction)
            trained = plan.trainer.train(weights, task.split.train, job)
            layer.keep(plan.manifest.flatten(trained.weights.parameters), ctx)

    def _split(self, plan: Plan, context: Context) -> Split:
        key, node = (context.node_id, _options_key(context)), node_of(context)
        return self._holder.split(
            key,
            node,
            plan.options,
            lambda: job_seed(int(plan.options["seed"]), 0, node.partition),
            context.state,
        )


class FederationClientApp(ClientApp):
    """The `ClientApp` of a federation; embedded engines may call `train_many`.

    Attributes:
        half: answers messages.
    """

    def __init__(self, half: ClientHandler) -> None:
        super().__init__()
        self.half = half
        self._own: Options | None = None
        self.train()(lambda message, context: self.half.train(message, context))
        self.evaluate()(lambda message, context: self.half.evaluate(message, context))
        self.query(HELLO)(lambda message, context: self.half.hello(message, context))

    @property
    def app_digest(self) -> str:
        """SHA-256 of the app's files in hex; empty where nobody has told."""
        return self.half.app_digest

    def installed(self, digest: str, options: Options) -> None:
        """Where the app comes from: the SHA-256 of its files, and the options in them."""
        if digest != self.half.app_digest:
            self.half = replace(self.half, app_digest=digest, _plans={})
        self._own = options

    @property
    def app_options(self) -> Options | None:
        """What options are in the app's own files, complete; None where nobody has told."""
        return None if self._own is None else self.half.options(self._own)

    def check_data(self, run_config: Options, nodes: int) -> None:
        """Look for what is wrong with virtual nodes' data, before any is asked.

        Raises:
            ConfigError: they cannot be had, or not by so many nodes.
        """
        if isinstance(self.half.data, ChecksNodes):
            self.half.data.check(nodes, self.half.options(run_config))

    def known(self, context: Context) -> Plan:
        """What the gate asks about."""
        return self.half.plan(context)

    def __call__(self, message: Message, context: Context) -> Message:
        return guarded(self, message, context)

    def unguarded(self, message: Message, context: Context) -> Message:
        """The answer behind the gate."""
        again = answered(message, context)
        if again is not None:
            return again
        category, _, action = message.metadata.message_type.partition(".")
        if category == "query" and action not in ("", HELLO):
            return self.half.answer(action, message, context)
        return super().__call__(message, context)

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """See `ClientHandler.train_many`."""
        return self.half.train_many(messages, contexts)


def _options_key(context: Context) -> OptionsKey:
    config = context.run_config
    return tuple(config.items()), tuple(map(type, config.values()))
