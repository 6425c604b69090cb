"""Fine-tuning: before its own model is judged, each node trains the common one a little more.

    node, judged     the common model, trained for some epochs on its own training examples

It goes with every method, and changes nothing of what is learned together: nothing of it leaves a
node but what the model scores there. The node remembers that model.
"""

from dataclasses import dataclass

from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.contexts import NodeContext
from umbel.strategies.objective import Phase
from umbel.strategies.transform import Stateless


@dataclass(frozen=True)
class FineTuning(Stateless):
    """A model of one's own after training.

    Args:
        epochs: passes over the node's examples.

    Raises:
        StackError: no epoch.
    """

    epochs: int
    name: str = "fine-tuning"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise StackError(f"epochs is {self.epochs}; fine-tuning needs at least one")

    def tuning(self) -> Phase:
        return Phase(options={"local-epochs": self.epochs, "local-steps": 0})

    def keep(self, tuned: Tensor, ctx: NodeContext) -> None:
        ctx.memory["own"] = tuned
