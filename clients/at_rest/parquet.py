"""Parquet: a file's pieces are its row groups, which are read column by column.

What a row group says of its columns (least and greatest value) tells whether a node's rows can be
in it, so that those of other nodes are left alone where rows are sorted by what divides them.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.clients.at_rest.columns import TableColumns
from umbel.clients.at_rest.pieces import File, Piece
from umbel.clients.at_rest.places import arrow, reading
from umbel.clients.at_rest.tables import FoundFiles, TableRuns, short

LARGE = 1 << 25
"""Bytes of a row group from which on it is not held in memory whole while it is decoded."""
BUFFER = 1 << 18
"""Bytes of each column that are held then."""


@dataclass(frozen=True)
class ParquetFormat:
    """Parquet files.

    Attributes:
        found: the files.
        layout: what is read of them.
        remote: whether a read is a journey.
    """

    found: FoundFiles
    layout: TableColumns
    remote: bool

    def kind(self, column: str) -> Any:
        """Of a column."""
        return self.layout.types[column]

    def files(self) -> list[File]:
        return [
            ParquetFile(path, keys, self.found.system, self.layout, self.remote)
            for path, keys in self.found.keys.items()
        ]


@dataclass(frozen=True)
class ParquetFile:
    """One file; opened again for every read, its footer read once."""

    path: str
    keys: Mapping[str, Any]
    system: Any
    layout: TableColumns
    remote: bool

    @functools.cached_property
    def footer(self) -> Any:
        """Its metadata."""
        with reading(short(self.path)), self.system.open_input_file(self.path) as file:
            return arrow("parquet").read_metadata(file)

    def pieces(self) -> list[Piece]:
        schema = self.footer.schema.to_arrow_schema()
        for name, value in self.keys.items():
            schema = schema.append(arrow().field(name, self.layout.types.get(name, _type(value))))
        self.layout.check(schema, short(self.path))
        numbers = range(self.footer.num_row_groups)
        return [RowGroup(self, number) for number in numbers]

    def open(self, file: Any, *, large: bool) -> Any:
        """The opened file as Arrow's reader."""
        more = {"buffer_size": BUFFER} if large else {"pre_buffer": self.remote}
        return arrow("parquet").ParquetFile(file, metadata=self.footer, **more)


def _type(value: Any) -> Any:
    return arrow().scalar(value).type


class RowGroup(TableRuns):
    """One row group of a file."""

    def __init__(self, file: ParquetFile, number: int) -> None:
        super().__init__(f"{short(file.path)}, row group {number}", file.layout, file.keys)
        self.file, self.number = file, number
        facts = file.footer.row_group(number)
        self._rows = int(facts.num_rows)
        self._large = facts.total_byte_size > LARGE

    @property
    def rows(self) -> int:
        return self._rows

    def may_hold(self, column: str, wanted: Any) -> bool:
        if column in self.keys:
            return super().may_hold(column, wanted)
        group = self.file.footer.row_group(self.number)
        facts = next(
            (
                group.column(place).statistics
                for place in range(group.num_columns)
                if group.column(place).path_in_schema == column
            ),
            None,
        )
        if facts is None or not facts.has_min_max:
            return True
        return any(facts.min <= value <= facts.max for value in wanted.to_pylist())

    def tables(self, names: tuple[str, ...], size: int) -> Iterator[Any]:
        pa = arrow()
        with self.file.system.open_input_file(self.file.path) as file:
            reader = self.file.open(file, large=self._large)
            batches = reader.iter_batches(
                size, row_groups=[self.number], columns=list(names), use_threads=False
            )
            for batch in batches:
                yield pa.Table.from_batches([batch])
