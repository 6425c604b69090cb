"""FedProx: every node is pulled back to the model that it was sent.

    node   loss + mu / 2 x |w - w0|^2

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith 2020 (https://arxiv.org/abs/1812.06127, eq. 2). It
sends nothing more, keeps nothing, and the server does what it does without.
"""

from dataclasses import dataclass

from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.validate import positive
from umbel.strategies.contexts import NodeContext
from umbel.strategies.objective import Correction, Objective


@dataclass(frozen=True)
class FedProx(Objective):
    """The proximal term of FedProx.

    Args:
        mu: its strength, in 1 / learning rate; above 0.

    Raises:
        StackError: the strength is not a finite number above 0.
    """

    mu: float
    name: str = "fedprox"

    def __post_init__(self) -> None:
        try:
            positive(proximal_mu=self.mu)
        except ValueError as error:
            raise StackError(str(error)) from error

    @property
    def proximal(self) -> float:
        """The strength."""
        return self.mu

    def begin(self, start: Tensor, ctx: NodeContext) -> Correction:  # noqa: ARG002
        return Correction(anchor=start, strength=self.mu)
