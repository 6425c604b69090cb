"""The list of options as a person reads it on a terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from umbel.commands.options_listing import OptionRow
from umbel.core.options import shown


def show(rows: Sequence[OptionRow]) -> None:
    """Print the options, a table for each reader."""
    console = Console(highlight=False)
    for reader, group in groupby(rows, key=lambda row: row.reader):
        table = Table(box=SIMPLE, title=f"read by: {reader}", title_justify="left")
        for column in ("option", "default", "values", "meaning"):
            table.add_column(column, no_wrap=column == "option", overflow="fold")
        for row in group:
            table.add_row(row.name, shown(row.default), row.values or row.type, row.meaning)
        console.print(table, markup=False)
