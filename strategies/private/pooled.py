"""Cohorts of virtual nodes that share a process: one reply for thousands of updates.

    server -> process   the model, the round, and which nodes are to answer
    process             every node's update through its layers, as a bundle; their exact sum
    process -> server   the sum, and of how many updates it is made

For simulation only: the engine that asks owns the processes and their data. Each update is
clipped and put on its grid by itself, so the sum is the one that as many single replies give.
A real node answers for itself alone (`PlainSum`).
"""

import math
from collections.abc import Sequence

import torch
from flwr.app import ArrayRecord, Message

from umbel.core.contents import take_record
from umbel.privacy.bounds.clipping import l2_norm
from umbel.strategies.collect import (
    EXAMPLES,
    LENIENCE,
    UPDATE,
    Gather,
    Gathering,
    Rejected,
    Sum,
    numbers,
    read_vector,
)
from umbel.strategies.layout import MODEL

POOL = "umbel_pool"
"""The query by which a process is asked for the sum of several nodes' updates."""
ASK = "umbel_ask"
"""The query by which one node is asked for its vector of a private mean."""
MEMBERS = "members"
"""In a pool's request: partitions of the nodes that answer, shape (n,), int64."""
QUESTION = "question"
"""In the config: the private mean that is asked; absent in training."""
PUBLIC = "public."
"""Before the names of what questions have released, in the request's model record."""


def gather_pools(requests: Sequence[Message], round_: Gathering) -> Gather:
    """The sum of what the processes send, each for as many nodes as it was asked for."""
    asked = {
        message.metadata.dst_node_id: take_record(message.content, MODEL, ArrayRecord)[
            MEMBERS
        ].shape[0]
        for message in requests
    }
    total = torch.zeros(round_.size, dtype=torch.float64)
    rejected: list[Rejected] = []
    replies = bytes_up = 0
    bound = round_.facts.l2_bound or math.inf
    for reply in (yield requests):
        node = reply.metadata.src_node_id
        try:
            count = asked.pop(node)
            vector = read_vector(reply, UPDATE, round_.size)
            if numbers(reply).get(EXAMPLES) != count:
                raise ValueError(f"a sum over another number of nodes than the {count} asked")
            if not l2_norm(vector) <= count * bound * (1 + LENIENCE):
                raise ValueError("a sum longer than its updates can be")
        except KeyError:
            rejected.append(Rejected(node, "a reply that nobody asked for"))
        except ValueError as error:
            rejected.append(Rejected(node, str(error)))
        else:
            total += vector  # exact: every term is a multiple of one grid
            replies += count
            bytes_up += vector.numel() * vector.element_size()
    return Sum(
        total=total,
        weight=float(replies),
        replies=replies,
        denominator=round_.cohort,
        rejected=tuple(rejected),
        bytes_up=bytes_up,
    )
