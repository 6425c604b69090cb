"""A node's running statistics: which they are, and whether they may be shown."""

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from umbel.clients.trainers.base import KeepsStatistics, Options, Trainer, Tree
from umbel.core.contents import find_record
from umbel.core.records import to_array
from umbel.strategies.collect import BUFFERS, EXAMPLES, METRICS
from umbel.strategies.layout import shows_statistics
from umbel.strategies.stack import Stack

TRAINED = "umbel.trained"
"""The node's own record of how many examples its statistics are of."""


def statistics_of(trainer: Trainer, stack: Stack, options: Options) -> tuple[str, ...]:
    """Names of the buffers that nodes show for the delivered model; none where they must not.

    A trainer says by a method `statistics` which of its buffers are statistics of the examples;
    one without it, such as `PrivateSgd`, shows none.
    """
    shown = shows_statistics(stack, str(options["buffers"]))
    if not isinstance(trainer, KeepsStatistics) or not shown:
        return ()
    return tuple(trainer.statistics(options))


def answer_statistics(
    message: Message, names: tuple[str, ...], kept: Tree, state: RecordDict
) -> Message:
    """What a node says of its statistics: nothing, where it may not or has not trained."""
    content = RecordDict()
    counted = find_record(state, TRAINED, MetricRecord)
    if names and counted is not None and all(name in kept for name in names):
        content[BUFFERS] = ArrayRecord({name: to_array(kept[name]) for name in names})
        content[METRICS] = MetricRecord({EXAMPLES: counted[EXAMPLES]})
    return Message(content, reply_to=message)
