"""Power of choice: of some nodes drawn by chance, those take part whose loss was largest.

    draw `candidates` nodes, each as likely as it has examples
    keep the `size` of them with the largest loss

Cho, Wang and Joshi 2020 (https://arxiv.org/abs/2010.01243), in the form that sends nothing more
(section 5, rpow-d): a node's loss is the one that it measured when it trained last, and one that
never did comes first. More candidates learn faster and leave the optimum further behind; as many
as the cohort is drawing by chance. The choice follows what nodes measure, so a run that hides that
is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from umbel.core.errors import ConfigError
from umbel.strategies.samplers import N, SamplingContext, examples_of, loss_of


@dataclass(frozen=True)
class PowerOfChoice:
    """The nodes with the largest losses among a few.

    Args:
        size: of the cohort.
        candidates: how many are drawn by chance; 0 is twice the cohort.

    Raises:
        ConfigError: fewer candidates than the cohort has nodes.
    """

    size: int
    candidates: int = 0
    name: Literal["power-of-choice"] = "power-of-choice"
    sampling: ClassVar[None] = None
    by_losses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.candidates and self.candidates < self.size:
            raise ConfigError(
                f"cohort-candidates is {self.candidates}, below cohort-size {self.size}; raise it, "
                "or leave it out (twice the cohort)"
            )

    def bounds(self, population: int) -> tuple[float, int]:
        size = min(self.size, population)
        return float(size), size

    def select(self, nodes: Sequence[N], ctx: SamplingContext) -> list[N]:
        """The nodes of a round.

        Raises:
            RunError: a node trained and said no loss.
        """
        if not nodes:
            return []
        losses = [loss_of(node, ctx, self.name) for node in nodes]
        examples = examples_of(nodes, ctx)
        count = min(self.candidates or 2 * self.size, len(nodes))
        drawn = ctx.generator().choice(
            len(nodes), count, replace=False, p=examples / examples.sum()
        )
        # A sort that keeps the order of the draw, so that chance decides between equal losses.
        ranked = drawn[np.argsort([-losses[place] for place in drawn], kind="stable")]
        return [nodes[place] for place in sorted(ranked[: self.size].tolist())]
