"""The node's half of a round: a Flower `ClientApp` around a trainer and a node's own data.

    server -> node   train      model (flat), what the layers publish, the learning rate
    node -> server   update     trained minus received, through the stack's layers; metrics
    server -> node   evaluate   model
    node -> server   metrics    on the node's own test examples
    server -> node   query.umbel_hello     on engines that do not know their nodes' names
    node -> server   its partition
    server -> node   query.umbel_ask, query.umbel_pool     see `umbel.clients.pooling`

Weights arrive and leave as one flat vector whose layout both sides derive from the trainer; a
digest of the layout travels with it, so a node with another model says so.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from umbel.clients.data.examples import Node, Split
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
from umbel.clients.trainer import CohortTrainer, Job, Options, Trained, Trainer, Tree, Weights
from umbel.strategies.collect import BUFFERS, EXAMPLES, METRICS, UPDATE, Seals
from umbel.strategies.contents import find_record, take_record
from umbel.strategies.errors import ConfigError
from umbel.strategies.layout import (
    CONFIG,
    HELLO,
    MODEL,
    PARAMETERS,
    averaged_buffers,
    local_buffers,
)
from umbel.strategies.private.pooled import ASK, POOL
from umbel.strategies.records import Manifest, from_array, record_of, to_array
from umbel.strategies.stack import Stack

LOCAL = "umbel.buffers"
"""The node's own record of the buffers that stay on it."""

OptionsKey = tuple[tuple[tuple[str, Any], ...], tuple[type, ...]]
"""A run's options as something to look up by; the types tell 1 from True."""


@dataclass(frozen=True)
class NodeHalf:
    """What a node does with messages; the same object serves every virtual node of a process.

    Attributes:
        trainer: knows the model.
        data: the node's own examples.
        options: completes the run's configuration with defaults.
        stack: the layers, from the options.
        questions: the private means that may be asked.
        warm: how many nodes' data are kept between messages.
    """

    trainer: Trainer
    data: Callable[[Node, Options], Split | Any]
    options: Callable[[Options], Options]
    stack: Callable[[Options], Stack]
    questions: Questions = ()
    warm: int = 4
    _splits: OrderedDict[tuple[int, OptionsKey], Split] = field(
        default_factory=OrderedDict, repr=False
    )
    _plans: dict[OptionsKey, "_Plan"] = field(default_factory=dict, repr=False)

    def train(self, message: Message, context: Context) -> Message:
        """Answer a request to train."""
        plan = self._plan(context)
        task = plan.receive(message, context, self._split(plan, context))
        return plan.reply(task, self.trainer.train(task.weights, task.split.train, task.job))

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """Answer several requests to train as one batched computation.

        None where the trainer cannot do that, or does not find it worth while.
        """
        if isinstance(self.trainer, CohortTrainer) and len(messages) > 1:
            plan = self._plan(contexts[0])
            tasks = [
                plan.receive(message, context, self._split(plan, context))
                for message, context in zip(messages, contexts, strict=True)
            ]
            trained = self.trainer.train_cohort(
                [task.weights for task in tasks],
                [task.split.train for task in tasks],
                [task.job for task in tasks],
            )
            if trained is not None:
                return [plan.reply(*pair) for pair in zip(tasks, trained, strict=True)]
        return None

    def evaluate(self, message: Message, context: Context) -> Message:
        """Answer a request to evaluate; a node without test examples reports none."""
        plan = self._plan(context)
        split = self._split(plan, context)
        metrics: dict[str, float] = {}
        examples = 0
        if split.test is not None and len(split.test) > 0:
            task = plan.receive(message, context, split)
            result = self.trainer.evaluate(task.weights, split.test, plan.options)
            metrics, examples = result.metrics, result.examples
        record = MetricRecord({EXAMPLES: examples, **metrics})
        return Message(RecordDict({METRICS: record}), reply_to=message)

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
        answers = self._plan(context).stack.collect.answers()
        if action not in answers:
            raise ConfigError(f"no query is registered under {action!r}")
        return answers[action](message, context)

    def _ask(self, message: Message, context: Context) -> Message:
        plan = self._plan(context)
        question = asked(message, questions_of(self.questions, plan.options))
        if question is None:
            raise ConfigError("a node was asked for a private mean without its name")
        train = self._split(plan, context).train
        return answer_question(message, question, train, context.state)

    def _pool(self, message: Message, context: Context) -> Message:
        plan, count = self._plan(context), node_of(context).partitions
        question = asked(message, questions_of(self.questions, plan.options))
        examples = pooled_examples(self.data, members_of(message), count, plan.options)
        if question is not None:
            found = question_bundles(question, examples, public_of(message))
            return answer_pool(message, found, question.stack, question.size)
        task = plan.receive(message, context, Split(None))
        bundles = training_bundles(self.trainer, task.weights, examples, task.job)
        return answer_pool(message, bundles, plan.stack, plan.manifest.size)

    def _plan(self, context: Context) -> "_Plan":
        key = _options_key(context)
        if key not in self._plans:
            options = self.options(context.run_config)
            self._plans.clear()
            self._plans[key] = _Plan(
                options, self.stack(options), self.trainer.initial(options, int(options["seed"]))
            )
        return self._plans[key]

    def _split(self, plan: "_Plan", context: Context) -> Split:
        key = (context.node_id, _options_key(context))
        if key in self._splits:
            self._splits.move_to_end(key)
            return self._splits[key]
        found = self.data(node_of(context), plan.options)
        split = found if isinstance(found, Split) else Split(found)
        self._splits[key] = split
        while len(self._splits) > self.warm:
            self._splits.popitem(last=False)
        return split


@dataclass(frozen=True)
class _Received:
    """One request, unpacked."""

    message: Message
    context: Context
    split: Split
    weights: Weights
    vector: Tensor
    job: Job


@dataclass(frozen=True)
class _Plan:
    """What depends on the options alone, made once a process."""

    options: Options
    stack: Stack
    first: Weights

    @functools.cached_property
    def seals(self) -> Seals | None:
        """The collect, if it seals; to ask that of every message takes longer than most answers."""
        collect = self.stack.collect
        return collect if isinstance(collect, Seals) else None

    @functools.cached_property
    def manifest(self) -> Manifest:
        return Manifest.of(self.first.parameters)

    @functools.cached_property
    def travelling(self) -> Manifest:
        """The buffers that are averaged."""
        return Manifest.of(averaged_buffers(self.first.buffers, str(self.options["buffers"])))

    def receive(self, message: Message, context: Context, split: Split) -> _Received:
        config = take_record(message.content, CONFIG, ConfigRecord)
        if config["manifest"] != self.manifest.digest:
            raise ConfigError(
                f"this node's model has {self.manifest.size} parameters in another layout than "
                "the server's; start both with the same app and options"
            )
        model = take_record(message.content, MODEL, ArrayRecord)
        vector = from_array(model[PARAMETERS])
        buffers = dict(self.first.buffers) | self._kept(context)
        if BUFFERS in model:
            buffers |= self.travelling.unflatten(from_array(model[BUFFERS]))
        buffers |= public_of(message)
        number = int(config["round"])  # type: ignore[arg-type]
        rate = config.get("learning-rate")
        job = Job(
            round=number,
            seed=job_seed(int(self.options["seed"]), number, node_of(context).partition),
            options=self.options,
            learning_rate=None if rate is None else float(rate),  # type: ignore[arg-type]
            node=context.node_config,
            memory=context.state,
        )
        weights = Weights(self.manifest.unflatten(vector), buffers)
        return _Received(message, context, split, weights, vector, job)

    def reply(self, task: _Received, trained: Trained) -> Message:
        update = self.manifest.flatten(trained.weights.parameters).sub_(task.vector)
        config = dict(take_record(task.message.content, CONFIG, ConfigRecord))
        measured = {EXAMPLES: trained.examples, **trained.metrics}
        buffers = trained.weights.buffers
        del trained  # a model; from here on only its difference is needed
        encoded, said = self.stack.encode(update, config, task.context.state, measured)
        del update
        record = record_of({UPDATE: to_array(encoded)})
        del encoded
        if self.travelling.size:
            sent = averaged_buffers(buffers, str(self.options["buffers"]))
            record[BUFFERS] = to_array(self.travelling.flatten(sent))
        public = public_of(task.message)
        own = {k: v for k, v in buffers.items() if k not in public}
        self._keep(task.context, own)
        metrics = MetricRecord({**said})
        content = RecordDict({UPDATE: record, METRICS: metrics})
        if self.seals is not None:
            content = self.seals.seal(content, task.message, task.context)
        return Message(content, reply_to=task.message)

    def _keep(self, context: Context, buffers: Tree) -> None:
        local = local_buffers(buffers, str(self.options["buffers"]))
        changed = {
            name: tensor
            for name, tensor in local.items()
            if not torch.equal(tensor, self.first.buffers[name])
        }
        if changed:
            context.state[LOCAL] = record_of({k: to_array(v) for k, v in changed.items()})

    def _kept(self, context: Context) -> Tree:
        record = find_record(context.state, LOCAL, ArrayRecord)
        return {} if record is None else {name: from_array(record[name]) for name in record}


class FederationClientApp(ClientApp):
    """The `ClientApp` of a federation; embedded engines may call `train_many`.

    Attributes:
        takes_mapped: arrays that it gets need not hold bytes; mapped memory will do.
    """

    takes_mapped = True

    def __init__(self, half: NodeHalf) -> None:
        super().__init__()
        self.half = half
        self.train()(half.train)
        self.evaluate()(half.evaluate)
        self.query(HELLO)(half.hello)

    def __call__(self, message: Message, context: Context) -> Message:
        category, _, action = message.metadata.message_type.partition(".")
        if category == "query" and action not in ("", HELLO):
            return self.half.answer(action, message, context)
        return super().__call__(message, context)

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """See `NodeHalf.train_many`."""
        return self.half.train_many(messages, contexts)


def _options_key(context: Context) -> OptionsKey:
    config = context.run_config
    return tuple(config.items()), tuple(map(type, config.values()))


def node_of(context: Context) -> Node:
    """Who a context belongs to; a node without a partition has all of its own data."""
    config = context.node_config
    return Node(int(config.get("partition-id", 0)), int(config.get("num-partitions", 1)), config)


def job_seed(seed: int, number: int, partition: int) -> int:
    """The seed of one node's work in one round, the same on every engine."""
    words = np.random.SeedSequence([seed, number, partition]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
