"""Ditto: beside the common model every node trains its own, held near the common one.

    node   the common model as without; then v: gradient + lambda x (v - w0), kept on the node
    node -> server   the common model's update

Li, Hu, Beirami and Smith 2021 (https://arxiv.org/abs/2012.04221, algorithm 1). Nothing of the
personal model leaves its node, so noise, secure sums and traffic are those of FedAvg; local work
is doubled. The node's own tests judge v, the server's the common model. The second training uses
the buffers (running statistics) that the node has for the first.

A node that was away goes on with its old v; one that is new or lost its memory begins at w0.
"""

from dataclasses import dataclass

from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.objective import Correction, Objective


@dataclass(frozen=True)
class Ditto(Objective):
    """Personal models near a common one.

    Args:
        strength: lambda, of the pull to the common model, in 1 / learning rate; above 0.

    Raises:
        StackError: the strength is not a finite number above 0.
    """

    strength: float = 0.1
    name: str = "ditto"

    def __post_init__(self) -> None:
        try:
            positive(ditto_lambda=self.strength)
        except ValueError as error:
            raise StackError(str(error)) from error

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts

    def starts(self, model: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return model

    def own(self, model: Tensor, ctx: NodeContext) -> Tensor:
        return ctx.recall("own", model) if "own" in ctx.memory else model

    def second(self, model: Tensor, ctx: NodeContext) -> tuple[Tensor, Correction]:
        return self.own(model, ctx), Correction(anchor=model, strength=self.strength)

    def keep(self, trained: Tensor, ctx: NodeContext) -> None:
        ctx.memory["own"] = trained
