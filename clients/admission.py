"""Whether a federation's app may answer: its options and its stack against the node's policy.

Everything is read off what will run: options completed as the app completes them, the stack as they
build it, with the numbers of the message that its layers will use. See `umbel.clients.gate`.
"""

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from umbel.clients.gate import Guarded, Known
from umbel.core.contents import find_record
from umbel.core.errors import StackError
from umbel.core.names import CONFIG, EXAMPLES, METRICS, STATISTICS
from umbel.strategies.policy.node_policy import NodePolicy, PolicyError
from umbel.strategies.protection import Protection


def admit(
    policy: NodePolicy, kind: str, message: Message, app: Guarded, known: Known, *, alone: bool
) -> None:
    """Whether a federation's app may answer a message.

    Args:
        policy: of the node.
        kind: of the message; see `umbel.clients.gate.kind_of`.
        message: of the coordinator.
        app: that is to answer.
        known: what it would answer with.
        alone: the node answers for itself only.

    Raises:
        PolicyError: it may not.
    """
    policy.check_app(app.app_digest)
    own = app.app_options if policy.other_options != "any" else None
    policy.check_options(known.options, own)
    if kind == "pool":
        if alone or policy.given:
            raise PolicyError("answer", "a node answers for itself alone, and never as a pool")
        return
    policy.check_kind(kind)
    if kind == "train":
        told: Mapping[str, Any] = find_record(message.content, CONFIG, ConfigRecord) or {}
        protection = _protection(known, told)
        policy.check_protection(protection, records=known.records)
        _check_measures(policy, known, protection)
    elif kind == "evaluate" and not known.quiet:  # beside others nothing is told anyway
        policy.check_level("metrics", "clear")
        policy.check_level("counts", "clear")
    elif kind in ("private-mean", "statistics", "query") and not policy.unprotected:
        raise PolicyError(
            "unprotected",
            f"no bare update leaves, and what a node answers to a message of the kind {kind} is no "
            "better; ask for less",
        )
    if message.metadata.message_type == f"query.{STATISTICS}":
        policy.check_level("counts", "clear")  # they weigh the statistics


def _protection(known: Known, told: Mapping[str, Any]) -> Protection:
    try:
        return known.outlook.under(told)
    except StackError as error:
        raise PolicyError("layers", str(error)) from None


def _check_measures(policy: NodePolicy, known: Known, protection: Protection) -> None:
    """Metrics inside an update cannot be taken out of it; beside it they can, but for a weight."""
    if known.outlook.quiet:
        policy.check_level("metrics", protection.metrics)
        policy.check_level("counts", protection.counts)
    elif known.outlook.counts_matter:
        policy.check_level("counts", "clear")


def without_measures(reply: Message, policy: NodePolicy) -> Message:
    """A reply to a request to train without the metrics and counts that may not stand beside it."""
    keep = {name: getattr(policy, name) in (None, "clear") for name in ("metrics", "counts")}
    if all(keep.values()) or not reply.has_content():
        return reply
    record = find_record(reply.content, METRICS, MetricRecord)
    if record is None:
        return reply
    left = {k: v for k, v in record.items() if keep["counts" if k == EXAMPLES else "metrics"]}
    reply.content = RecordDict({**reply.content, METRICS: MetricRecord(left)})
    return reply
