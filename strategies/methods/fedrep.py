"""FedRep: each node trains its own head on the common body, then the body under that head.

    node             its head alone, over some epochs; then the body alone, from there
    node -> server   the update of the body; the server never sees a head

Collins, Hassani, Mokhtari and Shakkottai 2021 (https://arxiv.org/abs/2102.07078, algorithm 1). The
head is what the option personal-layers names. Beside FedPer, which trains both at once, a node has
to train twice; what travels, and what a node keeps that was away or comes late, is the same
(`umbel.strategies.methods.personal_parts`). Each of the two trainings begins with an optimiser of
its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from umbel.core.errors import StackError
from umbel.strategies.methods.personal_parts import PersonalParts
from umbel.strategies.objective import PARTS, Phase


@dataclass(frozen=True)
class FedRep(PersonalParts):
    """Personal parts that are trained before the common ones.

    Args:
        head_epochs: passes over a node's examples for its own parts; the common ones get those of
            the run (`local-epochs`, `local-steps`).

    Raises:
        StackError: no epoch, or parts that cannot be; see `PersonalParts`.
    """

    head_epochs: int = 5
    name: str = "fedrep"
    needs: ClassVar[frozenset[str]] = frozenset({PARTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_epochs < 1:
            raise StackError(f"head_epochs is {self.head_epochs}; heads need at least one epoch")

    def phases(self) -> Sequence[Phase]:
        ends = [0, *(end for part in self.parts for end in part), self.model_size]
        pairs = zip(ends[::2], ends[1::2], strict=True)
        common = tuple(pair for pair in pairs if pair[0] < pair[1])
        own = {"local-epochs": self.head_epochs, "local-steps": 0}
        return Phase(self.parts, own), Phase(common)
