"""Files of tables: found by `pyarrow.dataset`, in the order of their paths.

Folders named like `hospital=Bern` are keys of all rows below them, as Hive writes them; files that
begin with a dot or an underscore are nobody's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.clients.at_rest.columns import TableColumns
from umbel.clients.at_rest.pieces import File, Mask
from umbel.clients.at_rest.places import Place, arrow, reading
from umbel.clients.data.examples import Examples
from umbel.core.errors import ConfigError


@dataclass(frozen=True)
class FoundFiles:
    """The files of a place, and what all of them have in common.

    Attributes:
        system: Arrow's file system.
        schema: of the first file, with the keys of its path.
        keys: by path, what it says of all rows.
    """

    system: Any
    schema: Any
    keys: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, place: Place, kind: Any) -> "FoundFiles":
        """What is there.

        Raises:
            ConfigError: nothing, or no file of this format.
        """
        dataset = arrow("dataset")
        with reading(str(place)):
            system, path = place.opened()
            found = dataset.dataset(path, filesystem=system, format=kind, partitioning="hive")
            fragments = {one.path: one for one in found.get_fragments()}
        if not fragments:
            raise ConfigError(f"{place} holds no file; correct the path")
        keys = {
            path: dataset.get_partition_keys(fragments[path].partition_expression)
            for path in sorted(fragments)
        }
        return cls(found.filesystem, found.schema, keys)


def short(path: str) -> str:
    """The end of a path, which tells files apart in a sentence."""
    return "/".join(path.rsplit("/", 3)[-3:]) if path.count("/") > 3 else path


@dataclass(frozen=True)
class TableFormat:
    """Files that are tables with the columns of one layout.

    Attributes:
        found: the files.
        layout: their columns.
        opened: makes a file of its path, what its path says of its rows, the file system and the
            layout.
    """

    found: FoundFiles
    layout: TableColumns
    opened: Callable[[str, Mapping[str, Any], Any, TableColumns], File]

    def kind(self, column: str) -> Any:
        """Of a column."""
        return self.layout.types[column]

    def files(self) -> list[File]:
        return [
            self.opened(path, keys, self.found.system, self.layout)
            for path, keys in self.found.keys.items()
        ]


class TableRuns:
    """Rows of one file that are read from the first to the last.

    Attributes:
        where: for sentences.
        layout: what an example is made of.
        keys: of the file's path.
    """

    def __init__(self, where: str, layout: TableColumns, keys: Mapping[str, Any]) -> None:
        self.where, self.layout, self.keys = where, layout, keys

    @property
    def rows(self) -> int:
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    def tables(self, names: tuple[str, ...], size: int) -> Iterator[Any]:
        """Columns of the file itself, so many rows at a time."""
        raise NotImplementedError

    def may_hold(self, column: str, wanted: Any) -> bool:
        """Whether a row may have one of these values."""
        return column not in self.keys or self.keys[column] in wanted.to_pylist()

    def values(self, column: str) -> Any:
        """A column of all rows."""
        pa = arrow()
        if column in self.keys:
            value = pa.scalar(self.keys[column], self.layout.types[column])
            return pa.chunked_array([pa.repeat(value, self.rows)])
        with reading(self.where):
            chunks = [
                chunk
                for table in self._with_keys((column,), max(1, self.rows))
                for chunk in table.column(0).chunks
            ]
            return pa.chunked_array(chunks, self.layout.types[column])

    def runs(self, size: int, keep: Mask | None) -> Iterator[Examples]:
        """The rows as examples, so many at a time."""
        pa = arrow()
        start = 0
        tables = self._with_keys(self.layout.read, size)
        while True:
            with reading(self.where):
                table = next(tables, None)
            if table is None:
                return
            stop = start + table.num_rows
            if keep is not None:
                table = table.filter(pa.array(keep[start:stop]))
            start = stop
            yield self.layout.examples(table, self.where)

    def _with_keys(self, names: tuple[str, ...], size: int) -> Iterator[Any]:
        pa = arrow()
        stored = tuple(name for name in names if name not in self.keys)
        for table in self.tables(stored, size):
            for name in names:
                if name in self.keys:
                    kind = self.layout.types[name]
                    column = pa.repeat(pa.scalar(self.keys[name], kind), table.num_rows)
                    table = table.append_column(name, column)
            yield table.select(names)
