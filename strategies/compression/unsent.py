"""Error feedback: what a node does not send it keeps, and adds to its next update."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.transform import Stateless

UNSENT = "unsent"
"""The name in the node's memory, and of the metric."""


class Unsent(Stateless):
    """The node's half of layers that send an approximation and keep the difference.

    What has arrived of a node and what it keeps are the sum of its updates, whatever `chosen`
    does. A node that was away keeps what it had; one that is new, or lost its memory, begins with
    zeros. What a clip below cuts off is cut off, and what is sent and never arrives is lost, as
    without compression.
    """

    name: str

    @abstractmethod
    def chosen(self, whole: Tensor) -> Tensor:
        """What of a vector of shape (size,) is sent, in the same shape; `whole` is not changed."""

    def check(self, facts: Facts, state: Any) -> Facts:  # noqa: ARG002
        refuse_segments(self.name, facts)
        return facts

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        whole = update + ctx.recall(UNSENT, update)
        sent = self.chosen(whole)
        length = float(torch.linalg.vector_norm(whole))
        whole -= sent
        ctx.memory[UNSENT] = whole
        ctx.report(UNSENT, float(torch.linalg.vector_norm(whole)) / length if length else 0.0)
        return sent


def refuse_segments(name: str, facts: Facts) -> None:
    """Refuse what must not be sent in part.

    Raises:
        StackError: a layer before has put more behind the update than the model's change, or
            made integers of it.
    """
    if facts.segments:
        raise StackError(
            f"{name} would send a part of {facts.segments[0][0]} only, which has to "
            "arrive whole; leave out the compression, or take a method that sends nothing "
            "beside the update"
        )
    if facts.modulus is not None:
        raise StackError(
            f"{name} keeps what it does not send as real numbers, and it would be given "
            "integers of a secure sum; put it first"
        )
