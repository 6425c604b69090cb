"""`PlainSum`: replies in the clear into a weighted mean; what a stack stands on by default.

The parts have modules of their own: the rule is `umbel.strategies.aggregators.weighted_mean`, how
replies are read `umbel.strategies.exchange`.
"""

from dataclasses import dataclass, replace
from typing import Self, TypeAlias, cast

from umbel.core.names import BUFFERS as BUFFERS
from umbel.core.names import COUNTED as COUNTED
from umbel.core.names import EXAMPLES as EXAMPLES
from umbel.core.names import METRICS as METRICS
from umbel.core.names import NO_REPLY as NO_REPLY
from umbel.core.names import UPDATE as UPDATE
from umbel.strategies.aggregator import LARGEST_METRIC as LARGEST_METRIC
from umbel.strategies.aggregator import Aggregate as Aggregate
from umbel.strategies.aggregator import Limited as Limited
from umbel.strategies.aggregator import MeanMetrics as MeanMetrics
from umbel.strategies.aggregator import Rejected as Rejected
from umbel.strategies.aggregator import RoundSpec as RoundSpec
from umbel.strategies.aggregators.weighted_mean import WeightedMean, Weighting
from umbel.strategies.exchange import LENIENCE as LENIENCE
from umbel.strategies.exchange import ClientFn as ClientFn
from umbel.strategies.exchange import Considers as Considers
from umbel.strategies.exchange import Exchange as Exchange
from umbel.strategies.exchange import Gather as Gather
from umbel.strategies.exchange import ReadsReplies
from umbel.strategies.exchange import Sealing as Sealing
from umbel.strategies.exchange import Seals as Seals
from umbel.strategies.exchange import is_own as is_own
from umbel.strategies.exchange import numbers as numbers
from umbel.strategies.exchange import read_vector as read_vector

# Their former names.
Sum: TypeAlias = Aggregate
Gathering: TypeAlias = RoundSpec
Collect: TypeAlias = Exchange


@dataclass(frozen=True)
class PlainSum(ReadsReplies):
    """The server adds up the updates in the clear, one after the other as they arrive.

        server -> node  the request            (every node of the cohort)
        node -> server  update, weight         the server sees each

    Args:
        weighting: by `examples` (McMahan et al. 2017, section 2); `equal` over the replies; or
            `fixed`: equal weights and the expected cohort as denominator, which a bounded
            sensitivity needs.
        longest: an update with a larger Euclidean norm is rejected; a divergent node must not
            ruin the round.
        hold_bytes: memory for replies that arrive before their turn.
        max_examples: by `examples`, the largest number that a node counts for; 0 is ten times
            the median of the round, see `umbel.strategies.example_weights`.
    """

    weighting: Weighting = "examples"
    longest: float = 1e8
    hold_bytes: int = 32 << 20
    max_examples: int = 0
    name: str = "plain-sum"

    @property
    def aggregator(self) -> WeightedMean:
        return WeightedMean(self.weighting, self.hold_bytes, self.max_examples)

    def weighted(self, weighting: str) -> Self:
        return replace(self, weighting=cast(Weighting, weighting))

    def with_max_examples(self, most: int) -> Self | None:
        return replace(self, max_examples=most) if self.weighting == "examples" else None
