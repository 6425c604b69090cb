"""The last look at what an app's process would send, by the process that holds the connection.

Where a node's owner wants secure sums only, nothing that an app hands over may be an update: the
masked one is made outside of it (`umbel.clients.process.sessions`). So whatever an app does in its
own process, its reply holds keys, certificates and statements, and no numbers of its own.
"""

from collections.abc import Sequence

from flwr.app import ConfigRecord, MetricRecord

from umbel.strategies.policy.node_policy import NodePolicy, PolicyError
from umbel.transport.codec import Buffer, decode, size_of

LARGEST = 1 << 14
"""Bytes of a reply with keys, a certificate and statements, several times over."""


def check_leaving(policy: NodePolicy, content: Sequence[Buffer]) -> None:
    """Whether the bytes of a reply may leave the node.

    Raises:
        PolicyError: they hold an array, a metric, or more than a secure sum's first message.
        CodecError: they are no content.
    """
    if not policy.only_sums:
        return
    size = size_of(content)
    if size > LARGEST:
        raise PolicyError(policy.only_sums, _said(policy, f"{size} bytes"))
    for name, record in decode(b"".join(content), checksum=True).items():
        empty = isinstance(record, MetricRecord) and not record
        plain = isinstance(record, ConfigRecord) and all(
            isinstance(value, bytes | str | int) for value in record.values()
        )
        if not (empty or plain):
            raise PolicyError(policy.only_sums, _said(policy, f"{type(record).__name__} {name!r}"))


def _said(policy: NodePolicy, what: str) -> str:
    return (
        f"{policy.only_sums} asks for secure sums, and the app would send {what}; run an app whose "
        "updates leave through Umbel's own secure sum alone"
    )
