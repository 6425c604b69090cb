"""A federation's `data` function for data at rest: each node reads its own rows, and no others.

    data = Parquet("s3://records/visits", x=("age", "weight"), y="sick", by="hospital")

What fits into half of `memory` is read whole; more is streamed (see `umbel.clients.at_rest.rows`),
so that memory is bounded whatever the size. Packages: `umbel[data]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from umbel.clients.at_rest import division
from umbel.clients.at_rest.arrow_files import ArrowFile
from umbel.clients.at_rest.columns import TableColumns
from umbel.clients.at_rest.csv_files import CsvFile, found_csv
from umbel.clients.at_rest.images import FOLDER, LABEL, ImageFormat
from umbel.clients.at_rest.parquet import ParquetFormat
from umbel.clients.at_rest.pieces import Format, Kept
from umbel.clients.at_rest.places import Place
from umbel.clients.at_rest.rows import StoredRows, Transform
from umbel.clients.at_rest.tables import FoundFiles, TableFormat
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.data.inputs import Columns, Inputs
from umbel.clients.data.partition import Partitioner
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError

MEMORY = 1 << 28


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredData(ABC):
    """What all formats have in common.

    Attributes:
        path: a file, a folder, an address (`s3://`, `webhdfs://`, `https://`, whatever fsspec
            knows), divided among the nodes; or a function of the node that gives the path of what
            is all its own.
        by: a column whose values are natural users: a hospital, a person.
        partitioner: divides all rows by their targets; without it and `by`, pieces are divided.
        test_fraction: the share of a node's rows that it keeps for its own tests.
        transform: of rows as stored to what the model takes; row by row, none left out.
        storage: what fsspec's file system must be told, such as `endpoint_url`.
        memory: bytes that a node's rows may take, about.
        seed: of the division; None takes the option `seed`, else 0.

    Raises:
        ConfigError: values that do not go together.
    """

    path: str | Path | Callable[[Node], str | Path] = field(kw_only=False)
    by: str = ""
    partitioner: Partitioner | None = None
    test_fraction: float = 0.0
    transform: Transform | None = None
    storage: Mapping[str, Any] = field(default_factory=dict)
    memory: int = MEMORY
    seed: int | None = None
    FIXED: ClassVar[bool] = True
    _memory: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.by and self.partitioner is not None:
            raise ConfigError(f"by is {self.by!r} beside a partitioner; give one of them")
        if callable(self.path) and (self.by or self.partitioner is not None):
            raise ConfigError(
                "path is a function of the node, whose data are all its own; leave by and "
                "partitioner out"
            )
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"test_fraction is {self.test_fraction}; give at least 0 and less than 1"
            )
        if self.memory < 1 << 16:
            raise ConfigError(f"memory is {self.memory} bytes; give at least {1 << 16:,}")

    @abstractmethod
    def _format(self, place: Place) -> Format:
        """What lies there."""

    @property
    @abstractmethod
    def _target(self) -> str:
        """The column that a partitioner looks at."""

    @property
    def source(self) -> object:
        """Whose data these are, however they are divided: the name that a budget is kept under."""
        return None if callable(self.path) else str(self.path)

    def __call__(self, node: Node, options: Options) -> Split:
        """The node's rows.

        Raises:
            ConfigError: they cannot be had, are no examples, or there are none.
        """
        kept = self._share(node, options)
        who = f"node {node.partition} of {self._place(node)}"
        if not sum(one.rows for one in kept):
            raise ConfigError(f"{who} has no rows; every node needs at least one")
        if not self.test_fraction:
            return Split(self._ready(kept, who))
        train, test = division.set_apart(
            kept, self.test_fraction, self._seed(options), node.partition
        )
        return Split(self._ready(train, who), self._ready(test, who) if test else None)

    def check(self, nodes: int, options: Options) -> None:
        """Look for what would be wrong on a node, before the first round.

        Raises:
            ConfigError: as when a node reads.
        """
        if callable(self.path):
            return
        node = Node(0, nodes, {})
        place = self._place(node)
        if not place.remote:  # else it would be a journey for each file
            for file in self._stored(place).files():
                file.pieces()
        self._share(node, options)

    def read(self) -> Examples:
        """All rows, in memory: for `Federation(test=lambda options: Parquet(...).read())`."""
        node = Node(0, 1, {})
        kept = division.whole(self._stored(self._place(node)))
        return StoredRows(kept, self.memory, self.transform, str(self._place(node))).read()

    def _ready(self, kept: Sequence[Kept], who: str) -> Examples | StoredRows:
        rows = StoredRows(kept, self.memory, self.transform, who)
        return rows.read() if rows.bytes <= self.memory // 2 else rows

    def _share(self, node: Node, options: Options) -> list[Kept]:
        if not 0 <= node.partition < node.partitions:
            raise ConfigError(
                f"there is no partition {node.partition} of {node.partitions}; "
                f"partition-id counts from 0 to num-partitions - 1"
            )
        place = self._place(node)
        stored, where, seed = self._stored(place), str(place), self._seed(options)
        if callable(self.path):
            return division.whole(stored)
        if self.partitioner is not None:
            return division.by_partitioner(stored, self._target, self.partitioner, node, seed)
        if not self.by:
            return division.by_pieces(stored, node, where)
        if self.by in node.config:
            return division.by_column(stored, self.by, node, None, seed, where)
        if "counts" not in self._memory:
            self._memory["counts"] = division.counted(stored, self.by, where)
        return division.by_column(stored, self.by, node, self._memory["counts"], seed, where)

    def _place(self, node: Node) -> Place:
        path = self.path(node) if callable(self.path) else self.path
        return Place(str(path), self.storage)

    def _stored(self, place: Place) -> Format:
        if callable(self.path):
            return self._format(place)
        if "format" not in self._memory:
            self._memory["format"] = self._format(place)
        found: Format = self._memory["format"]
        return found

    def _seed(self, options: Options) -> int:
        return int(options.get("seed", 0)) if self.seed is None else self.seed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": {}}


@dataclass(frozen=True, eq=False, kw_only=True)
class _Table(StoredData):
    """What tables have in common.

    Attributes:
        y: the column of the target.
        x: the columns of the inputs, in order; all others, if none is named.
        classes: of a target that is a text, in the order of their numbers.
    """

    y: str
    x: Sequence[str] = ()
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("x", "classes"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ConfigError(f"{name} is a text; give a tuple of names: ({given!r},)")

    @property
    def _target(self) -> str:
        return self.y

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, where they are texts."""
        return tuple(self.classes)

    def inputs(self) -> Inputs | None:
        """The columns, for those who use the model later; None where they are transformed here."""
        return Columns(tuple(self.x)) if self.x and self.transform is None else None

    def _columns(self, found: FoundFiles, place: Place) -> TableColumns:
        return TableColumns.of(
            found.schema, x=self.x, y=self.y, by=self.by, classes=self.classes, where=str(place)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Parquet(_Table):
    """A `data` function for Parquet: a file, or a folder of them (Hive's `key=value` too).

    Pieces are row groups. Where files are sorted by the column that divides them, or divided into
    folders by it, a node reads its own row groups alone. See `StoredData` for what is common.

    Example:
        >>> data = Parquet("visits", y="sick", by="hospital")  # doctest: +SKIP
    """

    def _format(self, place: Place) -> Format:
        found = FoundFiles.of(place, "parquet")
        return ParquetFormat(found, self._columns(found, place), place.remote)


@dataclass(frozen=True, eq=False, kw_only=True)
class Csv(_Table):
    """A `data` function for CSV with a line of names. Pieces are ranges of 8 MiB of a file."""

    def _format(self, place: Place) -> Format:
        found = found_csv(place)
        return TableFormat(found, self._columns(found, place), CsvFile)


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrow(_Table):
    """A `data` function for files of Arrow (IPC, Feather 2). Pieces are record batches."""

    def _format(self, place: Place) -> Format:
        found = FoundFiles.of(place, "ipc")
        return TableFormat(found, self._columns(found, place), ArrowFile)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFolder(StoredData):
    """A `data` function for images in folders by label; with by="folder", in folders of folders.

    Inputs are bytes of shape (n, channels, height, width), which trainers scale to [0, 1].

    Attributes:
        classes: the labels in the order of their numbers; all there are, sorted, if none is named.
        size: (height, width) that images are scaled to; None: all must have that of the first.
        channels: 1 is grey, 3 is colour.
    """

    classes: Sequence[str] = ()
    size: tuple[int, int] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("", FOLDER):
            raise ConfigError(f'by is {self.by!r}; images are divided by="folder", or not at all')
        if self.channels not in (1, 3):
            raise ConfigError(f"channels is {self.channels}; give 1 for grey or 3 for colour")

    @property
    def _target(self) -> str:
        return LABEL

    def labels(self) -> tuple[str, ...]:
        """The labels, where they are named."""
        return tuple(self.classes)

    def _format(self, place: Place) -> Format:
        return ImageFormat.of(
            place,
            divided=bool(self.by),
            classes=self.classes,
            size=self.size,
            channels=self.channels,
        )
