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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from umbel.clients.data.examples import Node, Split
from umbel.clients.gate import guarded
from umbel.clients.given import trainer_of
from umbel.clients.holding import Holder
from umbel.clients.ledger.charging import (
    Charging,
    answered,
    charging_layers,
    leaves,
    promise_of,
    releases_of,
)
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
from umbel.clients.statistics import TRAINED, answer_statistics, statistics_of
from umbel.clients.trainers.base import (
    CohortTrainer,
    Job,
    Options,
    Trained,
    Trainer,
    Tree,
    Weights,
    own_promise,
    promising,
)
from umbel.core.contents import find_record, take_record
from umbel.core.errors import ConfigError
from umbel.core.names import ASK, POOL
from umbel.core.records import (
    Manifest,
    from_array,
    from_kept,
    kept_array,
    record_of,
    same_bits,
    to_array,
)
from umbel.strategies.collect import (
    BUFFERS,
    COUNTED,
    EXAMPLES,
    METRICS,
    UPDATE,
    Considers,
    Sealing,
    Seals,
)
from umbel.strategies.contexts import SENT, NodeContext
from umbel.strategies.contract import Contract
from umbel.strategies.layout import (
    CONFIG,
    HELLO,
    MODEL,
    PARAMETERS,
    STATISTICS,
    averaged_buffers,
    local_buffers,
)
from umbel.strategies.protection import Outlook, hides, quiet
from umbel.strategies.release import Promise
from umbel.strategies.run_options import RunOptions
from umbel.strategies.schedules import checked_rate
from umbel.strategies.secure.wire import action_of
from umbel.strategies.stack import Stack, own_context

LOCAL = "umbel.buffers"
"""The node's own record of the buffers that stay on it."""

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
    _plans: dict[OptionsKey, "Plan"] = field(default_factory=dict, repr=False)

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
        trained = plan.trainer.train(task.weights, task.split.train, task.job)
        self._train_again(plan, task)
        return plan.reply(task, trained)

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """Answer several requests to train as one batched computation.

        None where the trainer cannot do that, or does not find it worth while.
        """
        plan = self.plan(contexts[0])
        if isinstance(plan.trainer, CohortTrainer) and len(messages) > 1:
            tasks: list[_Received] = []
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
            result = plan.trainer.evaluate(task.weights, split.test, plan.options)
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

    def plan(self, context: Context) -> "Plan":
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
                _without_values(trainer.initial(options, int(options["seed"]))),
                promising(trainer, options),
                self.app_digest,
            )
        return self._plans[key]

    def _begin(self, plan: "Plan", task: "_Received") -> "_Received":
        """The task with what the layers ask for before training."""
        if "start-loss" in plan.stack.needs:
            found = plan.trainer.evaluate(task.weights, task.split.train, plan.options)
            task = replace(task, start_loss=found.metrics.get("loss"))
        return plan.begin(task)

    def _train_again(self, plan: "Plan", task: "_Received") -> None:
        """Train the models that stay on the node, for layers that have such."""
        for layer in plan.stack.twice:
            ctx = own_context(plan.told(task), layer.name, task.context.state)
            start, correction = layer.second(task.vector, ctx)
            weights = Weights(plan.manifest.unflatten(start), task.weights.buffers)
            job = replace(task.job, seed=task.job.seed ^ 1, correction=correction)
            trained = plan.trainer.train(weights, task.split.train, job)
            layer.keep(plan.manifest.flatten(trained.weights.parameters), ctx)

    def _split(self, plan: "Plan", context: Context) -> Split:
        key, node = (context.node_id, _options_key(context)), node_of(context)
        return self._holder.split(
            key,
            node,
            plan.options,
            lambda: job_seed(int(plan.options["seed"]), 0, node.partition),
            context.state,
        )


@dataclass(frozen=True)
class _Received:
    """One request, unpacked; `sent` is the model as it came."""

    message: Message
    context: Context
    split: Split
    weights: Weights
    vector: Tensor
    job: Job
    account: Charging
    sent: bytes
    start_loss: float | None = None


@dataclass(frozen=True)
class Plan:
    """What depends on the options alone, made once a process.

    Attributes:
        options: complete ones.
        stack: as they build it.
        trainer: of these options.
        first: the first model, its parameters without values.
        promise: the trainer, where it promises privacy for single records.
        app_digest: of the app's files.
    """

    options: Options
    stack: Stack
    trainer: Trainer
    first: Weights
    promise: Trainer | None = None
    app_digest: str = ""

    @functools.cached_property
    def quiet(self) -> bool:
        """Whether nothing may travel beside an update."""
        return self.promise is not None or quiet(self.stack)

    @property
    def records(self) -> bool:
        """Whether training protects single records, with noise that nobody can repeat."""
        return own_promise(self.promise) and int(self.options.get("insecure-noise-seed", -1)) < 0

    @functools.cached_property
    def contract(self) -> Contract:
        """What this node acts on besides the messages of a round."""
        first = self.first
        return Contract.of(
            self.options, self.stack, first.parameters, first.buffers, self.app_digest
        )

    @functools.cached_property
    def outlook(self) -> Outlook:
        """What protects updates, as far as the stack alone tells."""
        return Outlook(self.stack, self.manifest.size)

    @functools.cached_property
    def _considers(self) -> Considers | None:
        # Kept, as is what follows: to ask for a protocol's methods takes longer than its work.
        return self.stack.collect if isinstance(self.stack.collect, Considers) else None

    @functools.cached_property
    def _seals(self) -> Seals | None:
        return self.stack.collect if isinstance(self.stack.collect, Seals) else None

    def check_askable(self) -> None:
        """Raises:
        ConfigError: the exact answer to a private mean would tell what protected updates hide.
        """
        if self.promise is not None or hides(self.stack):
            raise ConfigError(
                "a private mean takes its noise at the coordinator, which would see this node's "
                f"exact answer; under {self.stack} nothing exact leaves a node, so ask none"
            )

    def consider(self, message: Message, context: Context) -> RecordDict | None:
        """Before training: the refusal of what could not be sent afterwards; None is none.

        Raises:
            ConfigError: running statistics would travel beside a protected update.
        """
        if self.synced_buffers.size and self.quiet:
            raise ConfigError(
                "buffers=mean would send running statistics in the clear beside protected "
                "updates; use buffers=local, or a model with group normalisation"
            )
        if self._considers is None:
            return None
        return self._considers.consider(message, context, self._sealing(message))

    def _sealing(self, message: Message) -> Sealing:
        told: Mapping[str, Any] = find_record(message.content, CONFIG, ConfigRecord) or {}
        return Sealing(self.contract.blob, self.outlook.under(told).shares)

    @functools.cached_property
    def manifest(self) -> Manifest:
        return Manifest.of(self.first.parameters)

    @functools.cached_property
    def _promise(self) -> Promise:
        return promise_of(self.options)

    @functools.cached_property
    def _run(self) -> RunOptions:
        return RunOptions.read(self.options)

    @functools.cached_property
    def _rate(self) -> float | None:
        """The learning rate before the schedule; None where the trainer has none."""
        return checked_rate(self.options)

    @functools.cached_property
    def charging(self) -> tuple[Any, ...]:
        """The layers that the node's ledger is charged for."""
        return charging_layers(self.stack)

    @functools.cached_property
    def synced_buffers(self) -> Manifest:
        """The buffers that are averaged."""
        return Manifest.of(averaged_buffers(self.first.buffers, str(self.options["buffers"])))

    def receive(
        self, message: Message, context: Context, split: Split, before: _Received | None = None
    ) -> _Received:
        """A request, unpacked; it shares the model with the one before if both were sent one."""
        config = take_record(message.content, CONFIG, ConfigRecord)
        if config["manifest"] != self.manifest.digest:
            raise ConfigError(
                f"this node's model has {self.manifest.size} parameters in another layout than "
                "the server's; start both with the same app and options"
            )
        model = take_record(message.content, MODEL, ArrayRecord)
        sent = model[PARAMETERS].data
        if before is not None and before.sent is sent:
            vector, parameters = before.vector, before.weights.parameters
        else:
            vector = from_array(model[PARAMETERS])
            parameters = self.manifest.unflatten(vector)
        buffers = dict(self.first.buffers) | self.kept(context)
        if BUFFERS in model:
            buffers |= self.synced_buffers.unflatten(from_array(model[BUFFERS]))
        buffers |= public_of(message)
        number = int(config["round"])  # type: ignore[arg-type]
        account = Charging(message, context, self.options)
        job = Job(
            round=number,
            seed=job_seed(int(self.options["seed"]), number, node_of(context).partition),
            options=self.options,
            learning_rate=self._run.rate_in(number, self._rate),
            node=context.node_config,
            memory=context.state,
            ledger=account,
        )
        weights = Weights(parameters, buffers)
        return _Received(message, context, split, weights, vector, job, account, sent)

    def begin(self, task: _Received) -> _Received:
        """The task as the layers want it: where training begins, what is added to gradients."""
        if not (self.stack.objectives or self.stack.personal):
            return task
        told, state = self.told(task), task.context.state
        task = self._with_model(task, self.stack.starts(task.vector, told, state))
        correction = self.stack.begin(task.vector, told, state)
        return replace(task, job=replace(task.job, correction=correction))

    def with_own_model(self, task: _Received) -> _Received:
        """The task with the model that this node uses."""
        if not self.stack.personal:
            return task
        own = self.stack.own(task.vector, self.told(task), task.context.state)
        return self._with_model(task, own)

    def _with_model(self, task: _Received, vector: Tensor) -> _Received:
        if vector is task.vector:
            return task
        weights = Weights(self.manifest.unflatten(vector), task.weights.buffers)
        return replace(task, vector=vector, weights=weights)

    def told(self, task: _Received) -> NodeContext:
        """What the layers are told of a round, before training."""
        message, number, rate = task.message, task.job.round, task.job.learning_rate
        model = take_record(message.content, MODEL, ArrayRecord)
        sent = {
            name.removeprefix(SENT): from_array(array)
            for name, array in model.items()
            if name.startswith(SENT)
        }
        config: Mapping[str, Any] = take_record(message.content, CONFIG, ConfigRecord)
        return NodeContext(config=config, sent=sent, round=number, learning_rate=rate or 0.0)

    def reply(self, task: _Received, trained: Trained) -> Message:
        update = self.manifest.flatten(trained.weights.parameters).sub_(task.vector)
        config = dict(take_record(task.message.content, CONFIG, ConfigRecord))
        measured = {**trained.metrics, EXAMPLES: trained.examples}
        buffers, examples = trained.weights.buffers, trained.examples
        told = replace(self.told(task), steps=trained.steps, start_loss=task.start_loss)
        del trained  # a model; from here on only its difference is needed
        encoded, said = self.stack.encode(update, config, task.context.state, measured, told)
        del update
        record, size = record_of({UPDATE: to_array(encoded)}), encoded.numel()
        del encoded
        if self.synced_buffers.size:
            sent = averaged_buffers(buffers, str(self.options["buffers"]))
            record[BUFFERS] = to_array(self.synced_buffers.flatten(sent))
        public = public_of(task.message)
        own = {k: v for k, v in buffers.items() if k not in public}
        self._keep(task.context, own, examples)
        metrics = MetricRecord({**said})
        content = RecordDict({UPDATE: record, METRICS: metrics})
        if self._seals is not None:
            mine = self._sealing(task.message)
            content = self._seals.seal(content, task.message, task.context, mine)
        releases = (
            releases_of(self.stack, self.charging, config, size, self._promise)
            if self.charging
            else []
        )
        content = task.account.finish(content, releases, sealed=self._seals is not None)
        return Message(content, reply_to=task.message)

    def _keep(self, context: Context, buffers: Tree, examples: int) -> None:
        local = local_buffers(buffers, str(self.options["buffers"]))
        changed = {
            name: tensor
            for name, tensor in local.items()
            if not same_bits(tensor, self.first.buffers[name])
        }
        if changed:
            context.state[LOCAL] = record_of({k: kept_array(v) for k, v in changed.items()})
            context.state[TRAINED] = MetricRecord({EXAMPLES: examples})

    def kept(self, context: Context) -> Tree:
        """The buffers that the node has kept of its own trainings."""
        record = find_record(context.state, LOCAL, ArrayRecord)
        if record is None:
            return {}
        return {name: from_kept(record[name], self.first.buffers[name]) for name in record}


class FederationClientApp(ClientApp):
    """The `ClientApp` of a federation; embedded engines may call `train_many`.

    Attributes:
        half: answers messages.
        takes_mapped: arrays that it gets need not hold bytes; mapped memory will do.
    """

    takes_mapped = True

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


def _without_values(first: Weights) -> Weights:
    """The first model's layout: its parameters come with every message, its buffers may not."""
    layout = {name: tensor.to("meta") for name, tensor in first.parameters.items()}
    return Weights(layout, first.buffers)


def _options_key(context: Context) -> OptionsKey:
    config = context.run_config
    return tuple(config.items()), tuple(map(type, config.values()))


def node_of(context: Context) -> Node:
    """Who a context belongs to; a node without a partition has all of its own data."""
    config = context.node_config
    return Node(int(config.get("partition-id", 0)), int(config.get("num-partitions", 1)), config)


def job_seed(seed: int, number: int, partition: int) -> int:
    """The seed of one node's work in one round, the same on every engine."""
    parts = [seed, number, partition]
    words = np.array(parts, np.uint32) if max(parts) < 1 << 32 else parts  # a list takes longer
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
