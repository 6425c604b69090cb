"""Arrow's own files (IPC, also called Feather 2): a file's pieces are its record batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.clients.at_rest.columns import TableColumns
from umbel.clients.at_rest.pieces import Piece
from umbel.clients.at_rest.places import arrow, reading
from umbel.clients.at_rest.tables import TableRuns, short


@dataclass(frozen=True)
class ArrowFile:
    """One file."""

    path: str
    keys: Mapping[str, Any]
    system: Any
    layout: TableColumns

    def pieces(self) -> list[Piece]:
        with reading(short(self.path)), self.system.open_input_file(self.path) as file:
            reader = arrow("ipc").open_file(file)
            schema = reader.schema
            for name in self.keys:
                schema = schema.append(arrow().field(name, self.layout.types.get(name)))
            self.layout.check(schema, short(self.path))
            first = self._only(file, (schema.names[0],))
            sizes = [first.get_batch(n).num_rows for n in range(reader.num_record_batches)]
        return [RecordBatch(self, number, rows) for number, rows in enumerate(sizes)]

    def _only(self, file: Any, names: tuple[str, ...]) -> Any:
        """A reader of some columns."""
        ipc = arrow("ipc")
        places = [ipc.open_file(file).schema.get_field_index(name) for name in names]
        options = ipc.IpcReadOptions(included_fields=places, use_threads=False)
        return ipc.open_file(file, options=options)

    def batch(self, number: int, names: tuple[str, ...]) -> Any:
        """Columns of one record batch."""
        with self.system.open_input_file(self.path) as file:
            return self._only(file, names).get_batch(number)


class RecordBatch(TableRuns):
    """One record batch of a file."""

    def __init__(self, file: ArrowFile, number: int, rows: int) -> None:
        super().__init__(f"{short(file.path)}, record batch {number}", file.layout, file.keys)
        self.file, self.number, self._rows = file, number, rows

    @property
    def rows(self) -> int:
        return self._rows

    def tables(self, names: tuple[str, ...], size: int) -> Iterator[Any]:
        pa = arrow()
        first = names or (self.layout.read[0],)
        batch = self.file.batch(self.number, first)
        for start in range(0, batch.num_rows, size):
            yield pa.Table.from_batches([batch.slice(start, size)])
