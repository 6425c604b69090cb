"""One request to a node, unpacked, and whose it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Context, Message
from torch import Tensor

from umbel.clients.data.examples import Node, Split
from umbel.clients.ledger.charging import Charging
from umbel.clients.trainers.base import Job, Tree, Weights

SAYS_NO_DATA = True
"""See `umbel.core.errors`."""


@dataclass(frozen=True)
class Received:
    """One request, unpacked.

    Attributes:
        message: as it came.
        context: of the node.
        split: the node's examples.
        weights: where training begins.
        vector: their parameters, shape (size,).
        job: for the trainer.
        account: charges the node's ledger.
        sent: the model's bytes as they came.
        config: the scalars of the broadcast.
        public: what questions have released so far.
        start_loss: of these weights on the node's examples, where a layer asks for it.
    """

    message: Message
    context: Context
    split: Split
    weights: Weights
    vector: Tensor
    job: Job
    account: Charging
    sent: bytes | memoryview
    config: dict[str, Any]
    public: Tree
    start_loss: float | None = None


def node_of(context: Context) -> Node:
    """Who a context belongs to; a node without a partition has all of its own data."""
    config = context.node_config
    return Node(int(config.get("partition-id", 0)), int(config.get("num-partitions", 1)), config)


def job_seed(seed: int, number: int, partition: int) -> int:
    """The seed of one node's work in one round, the same on every engine."""
    parts = [seed, number, partition]
    words = np.array(parts, np.uint32) if max(parts) < 1 << 32 else parts  # a list takes longer
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
