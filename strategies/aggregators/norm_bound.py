"""Norm bound (Sun et al. 2019, https://arxiv.org/abs/1911.07963, section 4).

The mean of updates that are scaled down to a norm where they are longer. It limits what each liar
does, and leaves out none: f of n move the mean by f / n of the norm. With a given norm, one node's
part of the sum is bounded, so central privacy may stand on it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from umbel.core.errors import StackError
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.aggregators.each import Choice, EachRule, Kept, Rows
from umbel.strategies.transform import Facts


@dataclass(frozen=True)
class NormBound(EachRule):
    """See the module; `EachRule` has the other arguments.

    Args:
        norm: the longest update; 0 is the median of the round's norms.
    """

    norm: float = 0.0
    name: str = "norm-bound"
    STANDS: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.norm < float("inf"):
            raise StackError(
                f"{self.name} has the norm {self.norm:g}; it needs one above 0, or 0 for the "
                "median of the round"
            )

    def need(self, liars: int) -> tuple[int, str]:  # noqa: ARG002
        return 1, "it leaves out none"

    def check(self, facts: Facts) -> Facts:
        after = super().check(facts)
        if not self.norm:
            return after
        if facts.l2_bound is not None and facts.l2_bound > self.norm:
            raise StackError(
                f"norm-bound scales updates down to {self.norm:g}, but nodes clip to "
                f"{facts.l2_bound:g} and exact sums need them as they are; clip to {self.norm:g}"
            )
        bound = facts.l2_bound if facts.l2_bound is not None else self.norm
        return after.replace(kind="sum", l2_bound=bound, public_denominator=True)

    def choose(self, rows: Rows, liars: int) -> Choice:  # noqa: ARG002
        bound = self.norm or float(rows.norms.median())
        scale = (bound / rows.norms.clamp(min=1e-300)).clamp_(max=1.0)
        return Choice(rows.combined(scale / len(rows)), scale.tolist())

    def result(self, acc: Kept) -> Aggregate:
        made = super().result(acc)
        return made if not self.norm else _over_cohort(made, acc.spec)


def _over_cohort(made: Aggregate, spec: RoundSpec) -> Aggregate:
    """The sum over the expected cohort, which does not tell who came."""
    total = made.total * made.replies if made.replies else torch.zeros_like(made.total)
    return replace(made, total=total, denominator=spec.cohort)
