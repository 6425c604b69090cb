"""What the pages that a person looks at have in common: their templates, and tables of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; `heads` may be empty.

    Attributes:
        heads: one name a column.
        rows: cells as text, each row as long as `heads` where there are heads.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def environment() -> Environment:
    """The templates of this folder; whatever is put into one is escaped."""
    found = Environment(
        loader=PackageLoader("umbel.server.output", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    found.filters["drawing"] = lambda plot: Markup(plot.svg)  # ours, and escaped by it
    return found
