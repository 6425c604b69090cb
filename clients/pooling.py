"""A node's answers beside training: private means, and sums over virtual nodes of one process.

    server -> node      query.umbel_ask    a question's name, what is public
    node -> server      its vector, through the question's layers
    server -> process   query.umbel_pool   the model or a question, and who is to answer
    process -> server   the exact sum of those nodes' updates

A pool needs data that can be had for many nodes at once (`pool`), equal shares, and layers that
encode bundles; where private means are asked, one example a node. It gives what single answers
give, without 8,192 messages a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.clients.data.examples import each_of
from umbel.clients.trainers.base import BundleTrainer, Job, Options, Trainer, Weights
from umbel.core.contents import take_record
from umbel.core.errors import ConfigError
from umbel.core.names import (
    CONFIG,
    EXAMPLES,
    MEMBERS,
    METRICS,
    MODEL,
    PUBLIC,
    QUESTION,
    UPDATE,
)
from umbel.core.records import from_array, to_array
from umbel.strategies.stack import Stack

if TYPE_CHECKING:
    from umbel.privacy.bounds.bundle import Bundle
    from umbel.strategies.private.private_mean import PrivateMean

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""

Questions: TypeAlias = "Sequence[PrivateMean] | Callable[[Options], Sequence[PrivateMean]]"
"""The private means of an app, or a function of the options that makes them."""


@runtime_checkable
class PooledData(Protocol):
    """A `data` function that can give the examples of many nodes as one batch."""

    def pool(self, partitions: Sequence[int], count: int, options: Options) -> Any:
        """The examples of these of `count` nodes, in order; None if they have unequal shares.

        Where nodes have more than one each, they are `umbel.clients.data.examples.Shares`.
        """
        ...


@runtime_checkable
class InParts(Protocol):
    """Inputs that are stored in parts, each of which is worth reading at once."""

    def parts(self) -> Iterator[Any]:
        """Places of the rows, part by part."""
        ...


def questions_of(questions: Questions, options: Options) -> tuple[PrivateMean, ...]:
    """An app's questions under these options.

    Raises:
        ConfigError: two have one name.
    """
    found = tuple(questions(options) if callable(questions) else questions)
    names = [question.name for question in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two private means are called {name!r}; rename one of them")
    return found


def public_of(message: Message) -> dict[str, Tensor]:
    """What questions have released so far, as the request says."""
    record = take_record(message.content, MODEL, ArrayRecord)
    return {
        name.removeprefix(PUBLIC): from_array(array)
        for name, array in record.items()
        if name.startswith(PUBLIC)
    }


def asked(message: Message, questions: Sequence[PrivateMean]) -> PrivateMean | None:
    """The question that a request is about; None is training.

    Raises:
        ConfigError: this app has no such question.
    """
    name = take_record(message.content, CONFIG, ConfigRecord).get(QUESTION)
    if name is None:
        return None
    for question in questions:
        if question.name == name:
            return question
    raise ConfigError(f"this node's app has no private mean {name!r}; use the coordinator's app")


def answer_question(
    message: Message, question: PrivateMean, examples: Any, memory: RecordDict
) -> Message:
    """One node's vector, through the question's layers."""
    config = dict(take_record(message.content, CONFIG, ConfigRecord))
    vector = question.vector(examples, public_of(message)).to(torch.float32)
    encoded, said = question.stack.encode(vector, config, memory)
    content = RecordDict({UPDATE: ArrayRecord({UPDATE: to_array(encoded)})})
    content[METRICS] = MetricRecord({**said})
    return Message(content, reply_to=message)


def members_of(message: Message) -> list[int]:
    """The partitions whose updates a pool is asked for."""
    members: list[int] = from_array(
        take_record(message.content, MODEL, ArrayRecord)[MEMBERS]
    ).tolist()
    return members


def answer_pool(message: Message, bundles: Iterator[Bundle], stack: Stack, size: int) -> Message:
    """The exact sum of several nodes' updates, and how many they are."""
    config = dict(take_record(message.content, CONFIG, ConfigRecord))
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for bundle in bundles:
        encoded = stack.encode_many(bundle, config)
        if encoded is None:
            raise ConfigError(f"the layers {stack} cannot encode many updates at once")
        total += encoded.total()
        count += encoded.count
    content = RecordDict({UPDATE: ArrayRecord({UPDATE: to_array(total)})})
    content[METRICS] = MetricRecord({EXAMPLES: count})
    return Message(content, reply_to=message)


def question_bundles(
    question: PrivateMean, examples: Any, public: Mapping[str, Tensor]
) -> Iterator[Bundle]:
    """A question's vectors, a piece of the examples at a time."""
    for piece in pieces(examples):
        yield question.bundle(piece, public)


def pieces(examples: Any, size: int = 128) -> Iterator[Any]:
    """Examples in pieces that fit a cache; data that is stored in parts says how."""
    stored = examples.x
    for rows in stored.parts() if isinstance(stored, InParts) else (np.arange(len(examples)),):
        for start in range(0, len(rows), size):
            yield examples.take(rows[start : start + size])


def can_pool(
    trainer: Trainer,
    data: Any,
    count: int,
    stack: Stack,
    options: Options,
    questions: Sequence[PrivateMean] = (),
) -> bool:
    """Whether a pool of this app's virtual nodes gives what single answers would."""
    if not isinstance(trainer, BundleTrainer) or not isinstance(data, PooledData):
        return False
    examples = data.pool([], count, options)
    # A question's vector for each example is a node's own only where it has no other.
    single = examples is not None and each_of(examples) == 1
    return stack.many and examples is not None and (single or not questions)


def pooled_examples(data: Any, members: Sequence[int], count: int, options: Options) -> Any:
    """The examples of several virtual nodes.

    Raises:
        ConfigError: this node has only its own.
    """
    found = data.pool(members, count, options) if isinstance(data, PooledData) else None
    if found is None:
        raise ConfigError("this node answers for itself alone; it has no other nodes' data")
    return found


def training_bundles(
    trainer: Trainer, weights: Weights, examples: Any, job: Job
) -> Iterator[Bundle]:
    """The updates of one step of many one-example nodes.

    Raises:
        ConfigError: this trainer cannot train many nodes as one bundle.
    """
    if not isinstance(trainer, BundleTrainer):
        raise ConfigError(f"{type(trainer).__name__} cannot train many nodes as one bundle")
    return trainer.bundles(weights, examples, job)
