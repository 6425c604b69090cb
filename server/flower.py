"""The only file that touches what Flower does not export. Each use says why.

Flower 1.41 and 1.42 export messages, apps and the `Grid` interface, but an engine needs three
things more: an identity under which instruction messages are built, ids on messages, and an
empty `Run` for apps that look at `grid.run`.
"""

from dataclasses import dataclass

from flwr.app import Error, Message, Metadata, RecordDict

# ErrorCode: `flwr.app.Error` takes a code, but the codes have no public name.
from flwr.common.constant import ErrorCode

# NodeInfo: the type that `Grid.get_nodes` must return.
from flwr.proto.node_pb2 import NodeInfo

# Run: the type of `Grid.run`, part of the public interface but exported nowhere.
from flwr.supercore.run import Run

# TaskIdentity: `Message(content, dst_node_id, message_type)` reads run, task and node ids from
# it and raises outside of a run started by Flower itself.
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["CRASHED", "RAISED", "UNAVAILABLE", "Envelope", "NodeInfo", "Run", "empty_run"]

RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
CRASHED = int(ErrorCode.CLIENT_APP_CRASHED)
UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)

SERVER_NODE = 1
"""Flower's own id of the coordinator."""


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
        return Message(metadata=metadata, content=content)  # type: ignore[call-overload, no-any-return]

    def error(self, code: int, reason: str) -> Message:
        """An error in the place of the node's reply."""
        return Message(Error(code, reason), reply_to=self.message(RecordDict()))
