"""Bucketing (Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365, algorithm 1).

A rule over the means of small random buckets of updates. Where nodes' data differ, honest updates
lie far from each other, and their means nearer; so a rule takes fewer of them for liars. A liar
spoils its bucket, so the rule has to stand `size` times as large a share of liars.

Buckets are drawn by the seed and the number of the round, among those who came.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from umbel.core.errors import StackError
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.aggregators.each import Choice, EachRule, Kept, Rows
from umbel.strategies.exchange import Exchange


@dataclass(frozen=True)
class Bucketing(EachRule):
    """A rule over buckets' means; `EachRule` has the other arguments.

    Args:
        rule: what looks at the buckets' means; its `liars` does not matter.
        size: updates of a bucket; the last has the rest, where they do not divide.
        seed: decides who is with whom.
    """

    rule: EachRule | None = None
    size: int = 2
    seed: int = 0
    name: str = "bucketing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is None or self.size < 1:
            raise StackError(
                f"bucketing needs a rule and buckets of at least 1 update; it has {self.rule} and "
                f"{self.size}"
            )
        if self.liars * self.size >= self.rule.STANDS:
            raise StackError(
                f"liars is {self.liars:g}, and in buckets of {self.size} a liar spoils as many; "
                f"that is {self.liars * self.size:g} of the buckets, but {self.rule.name} stands "
                f"fewer than {self.rule.STANDS:g}; take smaller buckets, or lower liars"
            )
        object.__setattr__(self, "name", f"{self.rule.name} of {self.size}")

    @property
    def over(self) -> EachRule:
        """The rule that looks at buckets."""
        assert self.rule is not None
        return self.rule

    def over_sums(self, mode: str, min_cohort: int) -> Exchange:
        """The same over secure sums of the buckets, of which the server sees no less."""
        # Secure sums take a while to import, which other runs need not wait.
        from umbel.strategies.secure.buckets import SecureBuckets
        from umbel.strategies.secure.secure_sum import SecureSum

        rule = replace(self.over, liars=self.liars * self.size)
        sums = SecureSum(mode=cast(Any, mode), min_cohort=min_cohort)
        return SecureBuckets(rule, self.size, sums, self.seed)

    def need(self, liars: int) -> tuple[int, str]:
        least, sum_ = self.over.need(liars)
        return (least - 1) * self.size + 1, f"({sum_} - 1) x {self.size} + 1"

    def result(self, acc: Kept) -> Aggregate:
        shuffled = torch.randperm(len(acc.parts), generator=_generator(self.seed, acc.spec))
        return self.made(acc, lambda rows, liars: self.bucketed(rows, liars, shuffled.tolist()))

    def choose(self, rows: Rows, liars: int) -> Choice:
        return self.bucketed(rows, liars, list(range(len(rows))))

    def bucketed(self, rows: Rows, liars: int, order: list[int]) -> Choice:
        """The rule over buckets of the rows in this order."""
        members = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        means = []
        for some in members:
            weights = torch.zeros(len(rows), dtype=torch.float64)
            weights[some] = 1 / len(some)
            means.append(rows.combined(weights).to(rows.vectors[0].dtype))
        choice = self.over.choose(Rows(means), liars)
        influence = [0.0] * len(rows)
        for some, value in zip(members, choice.influence, strict=True):
            for i in some:
                influence[i] = value
        return Choice(choice.mean, influence)


def _generator(seed: int, spec: RoundSpec) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + spec.number)
