"""CSV: a file's pieces are ranges of its bytes, from one end of a line to another.

A line is a row: values with line ends in them are refused by Arrow, by the number of their columns.
CSV says nothing of types: those of the first piece are taken for all, and a value that is not of
its column's type is refused with its row.
"""

import functools
import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.clients.at_rest.columns import TableColumns
from umbel.clients.at_rest.pieces import Piece
from umbel.clients.at_rest.places import Place, arrow, reading
from umbel.clients.at_rest.tables import FoundFiles, TableRuns, short
from umbel.core.errors import ConfigError

RANGE = 1 << 23
"""Bytes of a piece."""
LONGEST_LINE = 1 << 20
COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".lz4")


def found_csv(place: Place) -> FoundFiles:
    """The files of a place, with the types of the first one's first lines.

    Raises:
        ConfigError: nothing is there, or it is compressed.
    """
    if place.path.endswith(COMPRESSED):
        raise ConfigError(
            f"{place} is compressed, so that no part of it can be read by itself; unpack it, or "
            "write it as Parquet"
        )
    return FoundFiles.of(place, "csv")


@dataclass(frozen=True)
class CsvFile:
    """One file."""

    path: str
    keys: Mapping[str, Any]
    system: Any
    layout: TableColumns

    def pieces(self) -> list[Piece]:
        with reading(short(self.path)), self.system.open_input_file(self.path) as file:
            head = _line(file, 0)
            names = self._names(head)
            edges = [len(head)]
            while edges[-1] < file.size():
                edges.append(_next_line(file, min(edges[-1] + RANGE, file.size())))
        missing = [n for n in self.layout.types if n not in names and n not in self.keys]
        if missing:
            raise ConfigError(
                f"{short(self.path)} has no column {missing[0]!r}, which other files of "
                f"{self.layout.where} have; give all files the same columns"
            )
        pairs = itertools.pairwise(edges)
        return [Lines(self, head, start, stop) for start, stop in pairs]

    def _names(self, head: bytes) -> list[str]:
        if not head.strip():
            raise ConfigError(f"{short(self.path)} is empty; give it a line of names")
        names: list[str] = arrow("csv").read_csv(io.BytesIO(head)).column_names
        return names


class Lines(TableRuns):
    """A range of lines of a file."""

    def __init__(self, file: CsvFile, head: bytes, start: int, stop: int) -> None:
        where = f"{short(file.path)}, bytes {start:,} to {stop:,}"
        super().__init__(where, file.layout, file.keys)
        self.file, self.head, self.start, self.stop = file, head, start, stop

    @functools.cached_property
    def rows(self) -> int:  # counted once, by reading a column
        name = next(name for name in self.layout.read if name not in self.keys)
        with reading(self.where):
            return int(self._table((name,)).num_rows)

    def tables(self, names: tuple[str, ...], size: int) -> Iterator[Any]:
        if not names:
            names = tuple(name for name in self.layout.read if name not in self.keys)
        table = self._table(names)
        for start in range(0, table.num_rows, size):
            yield table.slice(start, size)

    def _table(self, names: tuple[str, ...]) -> Any:
        csv = arrow("csv")
        with self.file.system.open_input_file(self.file.path) as file:
            file.seek(self.start)
            lines = file.read(self.stop - self.start)
        types = {name: self.layout.types[name] for name in names}
        options = csv.ConvertOptions(column_types=types, include_columns=list(names))
        try:
            return csv.read_csv(
                io.BytesIO(self.head + lines),
                read_options=csv.ReadOptions(use_threads=False),
                convert_options=options,
            )
        except arrow().ArrowInvalid as error:
            raise ConfigError(
                f"{self.where} of {self.layout.where} does not fit the rest: {error}; write every "
                "column as one type, in one line a row"
            ) from error


def _line(file: Any, start: int) -> bytes:
    """The line that begins here, with its end."""
    file.seek(start)
    text: bytes = file.read(LONGEST_LINE)
    end = text.find(b"\n")
    return text if end < 0 else text[: end + 1]


def _next_line(file: Any, place: int) -> int:
    """Where the line after this place begins; the end of the file, if none does."""
    while place < file.size():
        file.seek(place)
        text = file.read(LONGEST_LINE)
        end = text.find(b"\n")
        if end >= 0:
            return int(place + end + 1)
        place += len(text)
    return int(file.size())
