"""Records in a message's content, found by name or kind.

Flower's `content.array_records` and its sisters copy the directory into an object that refers
to itself, so that every content they are asked of stays in memory until Python looks for cycles:
with models of 40 MB, long after the next round. These three do not.

Nothing here is of PyTorch, so that a node's connection, which holds no tensor, starts in a third
of the time and the memory.
"""

from collections.abc import Iterator
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord, MetricRecord)


def find_record(content: RecordDict, name: str, kind: type[Kind]) -> Kind | None:
    """The record of that name; None where there is none of that kind."""
    record = content.get(name)
    return record if isinstance(record, kind) else None


def take_record(content: RecordDict, name: str, kind: type[Kind]) -> Kind:
    """The record of that name.

    Raises:
        KeyError: there is none of that kind.
    """
    record = find_record(content, name, kind)
    if record is None:
        raise KeyError(f"the content has no {kind.__name__} named {name!r}")
    return record


def records_of(content: RecordDict, kind: type[Kind]) -> Iterator[Kind]:
    """All records of one kind, in the content's order."""
    return (record for record in content.values() if isinstance(record, kind))
