"""The plain messages of a secure sum as Flower's records, and what its trips are called."""

from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict

from umbel.core.contents import find_record
from umbel.strategies.secure.message import Plain, Value

SECURE = "umbel.secure"
"""Name of the ConfigRecord of this protocol in every message."""

STAGES = ("share", "mask", "agree", "unmask")
"""The trips after the first."""

_ACTION = "umbel_secure_"
_QUERY = f"query.{_ACTION}"


def action_of(stage: str) -> str:
    """The query action of a stage."""
    return _ACTION + stage


def query_of(stage: str) -> str:
    """The message type of a stage."""
    return _QUERY + stage


def stage_of(message_type: str) -> str | None:
    """The stage that messages of a type belong to; None for all others."""
    stage = message_type.removeprefix(_QUERY)
    return stage if stage in STAGES and stage != message_type else None


def content_of(message: Mapping[str, Value], name: str = SECURE) -> RecordDict:
    """A content with nothing else in it."""
    return RecordDict({name: ConfigRecord({**message})})


def plain_of(content: RecordDict, name: str = SECURE) -> Plain:
    """The message in a content; empty where there is none."""
    record = find_record(content, name, ConfigRecord)
    if record is None:
        return {}
    return {k: v for k, v in record.items() if isinstance(v, int | str | bytes)}
