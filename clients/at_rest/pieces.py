"""What stored data are made of, whatever their format: files, of pieces, of rows.

    file     its keys are known from its path alone (hospital=Bern/visits.parquet)
    piece    read by itself, from its first row to its last: a row group, a record batch, a range of
             bytes, a hundred images
    kept     a piece, and which of its rows belong to somebody

Nothing here is read before it is needed, and of a file that is nobody's only the name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from umbel.clients.data.examples import Examples

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Piece(Protocol):
    """Rows that are read together."""

    @property
    def where(self) -> str:
        """For sentences, such as `visits.parquet, row group 3`."""
        ...

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def row_bytes(self) -> int:
        """Of memory that a row takes as an example."""
        ...

    def may_hold(self, column: str, wanted: Any) -> bool:
        """Whether a row may have one of these values; false only if that is known unread.

        Args:
            column: its name.
            wanted: an Arrow array of values.
        """
        ...

    def values(self, column: str) -> Any:
        """A column of all rows, as a chunked array of Arrow; no other column is read."""
        ...

    def runs(self, size: int, keep: Mask | None) -> Iterator[Examples]:
        """The rows, so many at a time; of each run those that are kept.

        Args:
            size: rows of a run, before any is left out.
            keep: which rows; None is all.

        Raises:
            ConfigError: they are no examples.
        """
        ...


class File(Protocol):
    """A stored file."""

    @property
    def keys(self) -> Mapping[str, Any]:
        """What its path says of all its rows."""
        ...

    def pieces(self) -> list[Piece]:
        """Its pieces; opens the file.

        Raises:
            ConfigError: it cannot be read, or has other columns than the first file.
        """
        ...


class Format(Protocol):
    """Stored data of one format."""

    def kind(self, column: str) -> Any:
        """The Arrow type of a column that divides rows."""
        ...

    def files(self) -> list[File]:
        """In a fixed order.

        Raises:
            ConfigError: there is none, or columns are missing or of no use.
        """
        ...


@dataclass(frozen=True)
class Kept:
    """Some rows of a piece.

    Attributes:
        piece: where they are.
        keep: which; None is all.
    """

    piece: Piece
    keep: Mask | None = None

    @property
    def rows(self) -> int:
        """How many are kept."""
        return self.piece.rows if self.keep is None else int(np.count_nonzero(self.keep))
