"""FLTrust (Cao et al. 2021, https://arxiv.org/abs/2012.13995, section 4).

The server trains on a few examples of its own, as a node would. An update counts for the cosine of
its angle to the server's own, and not at all where that is negative, and is scaled to its length.

Stands any share of liars below all, as far as the server's examples are like the nodes'.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from flwr.app import Message
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.aggregators.each import Choice, EachRule, Kept, Rows

Reference = Callable[[Message], Tensor]
"""From a request of the round to the update that the server's own examples make of it."""


@dataclass(frozen=True)
class FLTrust(EachRule):
    """See the module; `EachRule` has the other arguments.

    Args:
        reference: the server's own update, shape (size,); on nodes, which build the same stack,
            there is none.
    """

    reference: Reference | None = field(default=None, repr=False)
    name: str = "fltrust"
    STANDS: ClassVar[float] = 1.0

    def compared_with(self, reference: Reference) -> "FLTrust":
        """The rule with the server's own update."""
        return replace(self, reference=reference)

    def need(self, liars: int) -> tuple[int, str]:
        return liars + 1, f"{liars} + 1"

    def result(self, acc: Kept) -> Aggregate:
        own = self._own(acc.spec)
        return self.made(acc, lambda rows, _: trusted(rows, own))

    def _own(self, spec: RoundSpec) -> Tensor:
        if self.reference is None or spec.request is None:
            raise StackError(
                "fltrust compares updates with one of the server's own, and this server has no "
                "examples to make it of; give Federation(root=...), a function of the options"
            )
        own = self.reference(spec.request)
        if own.shape != (spec.size,):
            raise StackError(
                f"the server's own update has the shape {tuple(own.shape)}, and nodes' have "
                f"({spec.size},); give root examples of the kind that nodes train on"
            )
        return own

    def choose(self, rows: Rows, liars: int) -> Choice:
        raise NotImplementedError("FLTrust chooses by an update of the server's own")


def trusted(rows: Rows, own: Tensor) -> Choice:
    """The mean of the rows by their cosines to `own`, each of its length; zeros if none is near."""
    products = Rows([*rows.vectors, own.to(rows.vectors[0].dtype)]).products
    length = products[-1, -1].sqrt()
    lengths = products.diagonal()[:-1].sqrt()
    cosines = (products[-1, :-1] / (lengths * length).clamp(min=1e-300)).clamp_(0.0, 1.0)
    if not float(cosines.sum()) > 0:
        return Choice(torch.zeros(rows.size, dtype=torch.float64), [0.0] * len(rows))
    weights = cosines / cosines.sum() * (length / lengths.clamp(min=1e-300))
    highest = float(cosines.max())
    influence = [1.0 if c >= highest / 2 else float(c) / highest for c in cosines]
    return Choice(rows.combined(weights), influence)
