"""The only file that touches what Flower does not export. Each use says why.

Flower exports messages, apps and the `Grid` interface, but an engine and a node need four things
more: an identity under which instruction messages are built, ids on messages, an empty `Run` for
apps that look at `grid.run`, and the numbers by which errors are told apart. Flower makes no
promise about these, so a release that has moved one is refused here, in one sentence.

Tested with Flower 1.41 and 1.42.
"""

import time
from dataclasses import dataclass
from importlib import metadata

from flwr.app import DEFAULT_TTL, Error, Message, Metadata, RecordDict

try:
    # NodeInfo: the type that `Grid.get_nodes` must return.
    from flwr.proto.node_pb2 import NodeInfo

    # Run: the type of `Grid.run`, part of the public interface but exported nowhere.
    from flwr.supercore.run import Run

    # TaskIdentity: `Message(content, dst_node_id, message_type)` reads run, task and node ids
    # from it and raises outside of a run started by Flower itself.
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as _moved:
    raise ImportError(
        f"flwr {metadata.version('flwr')} keeps {_moved.name or 'a part'} elsewhere, which Umbel "
        'needs; install a release that Umbel was tested with: pip install "flwr>=1.41,<1.43"'
    ) from _moved

__all__ = [
    "CRASHED",
    "DEFAULT_TTL",
    "RAISED",
    "SERVER_NODE",
    "TOO_LATE",
    "UNAVAILABLE",
    "UNKNOWN",
    "Envelope",
    "NodeInfo",
    "Run",
    "empty_run",
    "expired",
    "give_id",
    "is_over",
    "no_such_message",
    "seconds_left",
    "take_identity",
]

# Flower's `ErrorCode`. The numbers travel between releases, so they are as fixed as a file
# format; a test compares them with the installed release's.
RAISED = 2
"""The client app raised an exception."""
UNKNOWN = 3
"""There is no such message: it never was, has been answered and read, or its ttl is over."""
UNAVAILABLE = 5
"""The node is not there."""
CRASHED = 8
"""The client app's process died."""

SERVER_NODE = 1
"""Flower's own id of the coordinator."""

TOO_LATE = "the message's ttl was over before its reply was there"
"""Why a message that was sent has an error in the place of its reply."""

_SYSTEM = "system"
"""Flower's message type of errors that belong to no known message."""


def take_identity(run_id: int) -> None:
    """Let this process build instruction messages of a run."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = SERVER_NODE


def empty_run(run_id: int) -> Run:
    """A `Run` that knows its id."""
    return Run.create_empty(run_id)


def give_id(message: Message, message_id: str) -> None:
    """Set a message's id, which Flower's own grids set in this way too."""
    message.metadata.__dict__["_message_id"] = message_id


@dataclass(frozen=True)
class Envelope:
    """A message without its content: what a node needs to rebuild it."""

    run_id: int
    message_id: str
    node_id: int
    group_id: str
    created_at: float
    ttl: float
    message_type: str

    @classmethod
    def of(cls, message: Message) -> "Envelope":
        """The envelope of an instruction message."""
        data = message.metadata
        return cls(
            data.run_id,
            data.message_id,
            data.dst_node_id,
            data.group_id,
            data.created_at,
            data.ttl,
            data.message_type,
        )

    def message(self, content: RecordDict) -> Message:
        """The instruction message, as its node receives it."""
        metadata = Metadata(
            run_id=self.run_id,
            message_id=self.message_id,
            src_node_id=SERVER_NODE,
            dst_node_id=self.node_id,
            reply_to_message_id="",
            group_id=self.group_id,
            created_at=self.created_at,
            ttl=self.ttl,
            message_type=self.message_type,
            src_task_id=1,
        )
        return Message(metadata=metadata, content=content)  # type: ignore[call-overload, no-any-return]  # Flower hides this constructor in its types

    def error(self, code: int, reason: str) -> Message:
        """An error in the place of the node's reply."""
        return Message(Error(code, reason), reply_to=self.message(RecordDict()))


def no_such_message(message_id: str, run_id: int) -> Message:
    """What a grid gives to whoever asks for a reply to a message that it does not know."""
    about = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SERVER_NODE,
        dst_node_id=SERVER_NODE,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type=_SYSTEM,
    )
    reason = (
        "there is no such message: it was never sent, its reply has been read, or its ttl is over"
    )
    error = Error(UNKNOWN, reason)
    return Message(metadata=about, error=error)  # type: ignore[call-overload, no-any-return]  # Flower hides this constructor in its types


def is_over(message: Message) -> bool:
    """Whether a message's ttl is over, by this machine's clock."""
    data = message.metadata
    return data.created_at + data.ttl < time.time()


def expired(reply: Message) -> Message:
    """What is given in the place of a reply that came after the ttl of what it answers."""
    error = Error(UNKNOWN, TOO_LATE)
    return Message(metadata=reply.metadata, error=error)  # type: ignore[call-overload, no-any-return]  # Flower hides this constructor in its types


def seconds_left(message: Message) -> float:
    """Of a message's ttl, which Flower counts from when the message was made."""
    data = message.metadata
    return data.created_at + data.ttl - time.time()
