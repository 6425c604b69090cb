"""Per-FedAvg, first order: a common model that is good after one step on a node's own examples.

    node             gradient at w - alpha x gradient(w), on another batch, in every step
    node -> server   update
    node, judged     the common model after one step of rate alpha on its own training examples

Fallah, Mokhtari and Ozdaglar 2020 (https://arxiv.org/abs/2002.07948, algorithm 1, with the first
order approximation of section 5, which leaves the second derivative out). A step costs two
gradients. Noise, secure sums and traffic are those of FedAvg. A node remembers the model that it
was judged with; nothing else, so one that was away or comes late is like any other.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.objective import AHEAD, Correction, Objective, Phase


@dataclass(frozen=True)
class PerFedAvg(Objective):
    """Meta-learning of a start for one's own model.

    Args:
        alpha: the learning rate of the step by which a node makes the model its own; above 0.

    Raises:
        StackError: alpha is not a finite number above 0, or it stands below another layer.
    """

    alpha: float = 0.05
    name: str = "per-fedavg"
    needs: ClassVar[frozenset[str]] = frozenset({AHEAD})

    def __post_init__(self) -> None:
        try:
            positive(perfedavg_alpha=self.alpha)
        except ValueError as error:
            raise StackError(str(error)) from error

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        return facts

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:  # noqa: ARG002
        return Correction(ahead=self.alpha)

    def tuning(self) -> Phase:
        return Phase(options={"local-steps": 1, "learning-rate": self.alpha})

    def keep(self, tuned: Tensor, ctx: NodeContext) -> None:
        ctx.memory["own"] = tuned
