"""For the tests of people who use Umbel.

    def test_my_stack_keeps_its_promise():
        assert_private("path/to/my-app", epsilon=8)

    def test_my_trainer_is_one():
        check_trainer(MyTrainer(), examples)

`assert_private` puts canary nodes under the very stack of an app, a federation or a finished run,
and fails where the stack claims nothing, claims more than is allowed, or does not keep its claim.
`assert_records_private` does that for a trainer that hides single records, and
`assert_withstands_lies` plays a coordinator that does not keep to the protocol.
`assert_stands_liars` plays nodes that lie against aggregators.

`check_trainer`, `check_layer`, `check_aggregator`, `check_collect`, `check_partitioner`,
`check_optimizer`, `check_sampler` and `check_pool` try the laws of a part that you wrote: those
that its protocol states, and that the rest of Umbel relies on. An AssertionError names the law, the
value that broke it, and what to do.
"""

from umbel.testing.aggregators import check_aggregator
from umbel.testing.audits import assert_private, assert_records_private, assert_withstands_lies
from umbel.testing.collects import check_collect
from umbel.testing.layers import check_layer
from umbel.testing.liars import assert_stands_liars
from umbel.testing.partitioners import check_partitioner
from umbel.testing.parts import check_optimizer, check_sampler
from umbel.testing.pools import check_pool
from umbel.testing.trainers import check_trainer

__all__ = [
    "assert_private",
    "assert_records_private",
    "assert_stands_liars",
    "assert_withstands_lies",
    "check_aggregator",
    "check_collect",
    "check_layer",
    "check_optimizer",
    "check_partitioner",
    "check_pool",
    "check_sampler",
    "check_trainer",
]
