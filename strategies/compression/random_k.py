"""Random-k with error feedback: a few coordinates a round, the same ones on all nodes.

    node             update + what was left unsent;  the round's k coordinates leave, the rest stays
    node -> server   k numbers; no places, which both sides draw from the seed and the round
    server           the sum's k numbers in their places, zeros elsewhere

All nodes of a round send the same coordinates, so their vectors can be added up, and what follows
in the stack never knows: clipping bounds the k numbers with all that was left over in them, noise
is drawn for k coordinates instead of all, a secure sum masks k. The server's half is
post-processing of what those release.

Nothing is lost over rounds: what has arrived of a node and what it still keeps add up to the sum of
its updates (Stich, Cordonnier and Jaggi 2018, https://arxiv.org/abs/1809.07599, algorithm 1; one
set of coordinates for all nodes as in Konecny et al. 2016, https://arxiv.org/abs/1610.05492,
section 3). A node that was away keeps what it had; one that is new, or lost its memory, begins with
zeros. What a clip below cuts off is cut off, and what is sent and never arrives is lost, as without
compression.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.strategies.compression.unsent import UNSENT, refuse_segments
from umbel.strategies.contexts import NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.transform import Stateless


@dataclass(frozen=True)
class RandomK(Stateless):
    """Sends a fraction of the coordinates, and keeps the rest for later rounds.

    Args:
        fraction: of the coordinates, above 0 and up to 1; at least one is sent.
        seed: of the run, from which both sides draw the places.

    Raises:
        StackError: a fraction out of range, or a layer before it has put more behind the update
            than the model's change, which must arrive whole.

    Metrics: `unsent`, the length of what a node keeps over the length of what it had to send.
    """

    fraction: float = 0.05
    seed: int = 0
    name: str = "random-k"
    of_one_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise StackError(f"the fraction of {self.name} is {self.fraction}; give 0 < f <= 1")

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        refuse_segments(self.name, facts)
        return facts.replace(size=self.count(facts.size))

    def count(self, size: int) -> int:
        """How many of `size` coordinates are sent."""
        return max(1, round(self.fraction * size))

    def places(self, size: int, number: int) -> Tensor:
        """The coordinates of round `number`, in order: int64 of shape (count,).

        It is one tensor for all nodes of a round, and not to be written to.
        """
        return _smallest_keys(size, self.count(size), self.seed, number)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        if ctx.round < 1:
            raise RunError(f"{self.name} was not told the round, from which its places follow")
        whole = update + ctx.recall(UNSENT, update)
        places = self.places(whole.numel(), ctx.round)
        sent = whole[places]
        length = float(torch.linalg.vector_norm(whole))
        whole[places] = 0
        ctx.memory[UNSENT] = whole
        ctx.report(UNSENT, float(torch.linalg.vector_norm(whole)) / length if length else 0.0)
        return sent

    def decode(self, total: Tensor, state: Any, ctx: RoundContext) -> tuple[Tensor, Any]:
        whole = total.new_zeros(ctx.entered.size)
        whole[self.places(whole.numel(), ctx.number)] = total
        return whole, state


@functools.lru_cache(maxsize=1)  # a process has many nodes of one round
def _smallest_keys(size: int, count: int, seed: int, number: int) -> Tensor:
    """The `count` coordinates whose keys of 64 bits are the smallest.

    Keys are raw words of Philox, which every version of NumPy gives alike; its samplers promise no
    such thing.
    """
    key = np.array([seed & (1 << 64) - 1, number], np.uint64)
    words = np.random.Philox(key=key).random_raw(size)
    return torch.from_numpy(np.sort(np.argpartition(words, count - 1)[:count]))
