"""What a node does under one set of options: unpacks requests, and makes replies of trainings."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.clients.data.examples import Split
from umbel.clients.ledger.charging import Charging, charging_layers, promise_of, releases_of
from umbel.clients.pooling import public_of
from umbel.clients.received import Received, job_seed, node_of
from umbel.clients.statistics import TRAINED
from umbel.clients.trainers.base import Job, Options, Trained, Trainer, Tree, Weights, own_promise
from umbel.core.contents import find_record, take_record
from umbel.core.errors import ConfigError
from umbel.core.held import buffer_of
from umbel.core.records import (
    Manifest,
    from_array,
    from_kept,
    kept_array,
    record_of,
    same_bits,
    to_array,
)
from umbel.strategies.collect import BUFFERS, EXAMPLES, METRICS, UPDATE, Considers, Sealing, Seals
from umbel.strategies.contexts import SENT, NodeContext
from umbel.strategies.contract import Contract
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS, averaged_buffers, local_buffers
from umbel.strategies.protection import Outlook, hides, quiet
from umbel.strategies.release import Promise
from umbel.strategies.run_options import RunOptions
from umbel.strategies.schedules import checked_rate
from umbel.strategies.stack import Stack

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""

LOCAL = "umbel.buffers"
"""The node's own record of the buffers that stay on it."""


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
        self, message: Message, context: Context, split: Split, before: Received | None = None
    ) -> Received:
        """A request, unpacked; it shares the model with the one before if both were sent one."""
        config: dict[str, Any] = dict(take_record(message.content, CONFIG, ConfigRecord))
        if config["manifest"] != self.manifest.digest:
            raise ConfigError(
                f"this node's model has {self.manifest.size} parameters in another layout than "
                "the server's; start both with the same app and options"
            )
        model = take_record(message.content, MODEL, ArrayRecord)
        sent = buffer_of(model[PARAMETERS])
        if before is not None and before.sent is sent:
            vector, parameters = before.vector, before.weights.parameters
        else:
            vector = from_array(model[PARAMETERS])
            parameters = self.manifest.unflatten(vector)
        buffers = dict(self.first.buffers) | self.kept(context)
        if BUFFERS in model:
            buffers |= self.synced_buffers.unflatten(from_array(model[BUFFERS]))
        public = public_of(message)
        buffers |= public
        number = int(config["round"])
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
        return Received(
            message, context, split, weights, vector, job, account, sent, config, public
        )

    def begin(self, task: Received) -> Received:
        """The task as the layers want it: where training begins, what is added to gradients."""
        if not (self.stack.objectives or self.stack.personal):
            return task
        told, state = self.told(task), task.context.state
        task = self._with_model(task, self.stack.starts(task.vector, told, state))
        correction = self.stack.begin(task.vector, told, state)
        return replace(task, job=replace(task.job, correction=correction))

    def with_own_model(self, task: Received) -> Received:
        """The task with the model that this node uses."""
        if not self.stack.personal:
            return task
        own = self.stack.own(task.vector, self.told(task), task.context.state)
        return self._with_model(task, own)

    def _with_model(self, task: Received, vector: Tensor) -> Received:
        if vector is task.vector:
            return task
        weights = Weights(self.manifest.unflatten(vector), task.weights.buffers)
        return replace(task, vector=vector, weights=weights)

    def told(self, task: Received, steps: int = 0) -> NodeContext:
        """What the layers are told of a round; before training, nothing was stepped yet."""
        model = take_record(task.message.content, MODEL, ArrayRecord)
        sent = {
            name.removeprefix(SENT): from_array(array)
            for name, array in model.items()
            if name.startswith(SENT)
        }
        return NodeContext(
            config=task.config,
            sent=sent,
            round=task.job.round,
            seed=task.job.seed,
            steps=steps,
            learning_rate=task.job.learning_rate or 0.0,
            start_loss=task.start_loss,
        )

    def reply(self, task: Received, trained: Trained) -> Message:
        update = self.manifest.flatten(trained.weights.parameters).sub_(task.vector)
        config = task.config
        measured = {**trained.metrics, EXAMPLES: trained.examples}
        buffers, examples = trained.weights.buffers, trained.examples
        told = self.told(task, trained.steps)
        del trained  # a model; from here on only its difference is needed
        encoded, said = self.stack.encode(update, config, task.context.state, measured, told)
        del update
        parts = self.stack.pack(encoded, config, task.context.state, told)
        record, size = record_of({k: to_array(v) for k, v in parts.items()}), encoded.numel()
        del encoded, parts
        if self.synced_buffers.size:
            sent = averaged_buffers(buffers, str(self.options["buffers"]))
            record[BUFFERS] = to_array(self.synced_buffers.flatten(sent))
        if buffers:
            own = {k: v for k, v in buffers.items() if k not in task.public}
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


def without_values(first: Weights) -> Weights:
    """The first model's layout: its parameters come with every message, its buffers may not."""
    layout = {name: tensor.to("meta") for name, tensor in first.parameters.items()}
    return Weights(layout, first.buffers)
