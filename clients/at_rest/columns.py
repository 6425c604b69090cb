"""Columns of a table as inputs and targets.

    numbers, true and false     one column each; together (rows, columns)
    lists of equal length       one column; (rows, length)
    tensors of a fixed shape    one column; (rows, *shape)
    texts                       the target only, with the classes in their order

The type of the inputs is the one that holds all of them (NumPy's rules). Everything else is refused
by the names of column and file, as are empty values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.clients.at_rest.places import arrow, listed
from umbel.clients.data.examples import Examples
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
LIST_LENGTH = 64
"""Of a list whose length the schema does not say, for an estimate of memory."""


@dataclass(frozen=True)
class TableColumns:
    """Which columns are inputs and which is the target, with their types.

    Attributes:
        x: names of the inputs, in order.
        y: name of the target.
        classes: of a target that is a text, in the order of their numbers.
        types: Arrow types by name, of these and of what divides the rows.
        where: the data, for sentences.
    """

    x: tuple[str, ...]
    y: str
    classes: tuple[str, ...]
    types: Mapping[str, Any]
    where: str

    @classmethod
    def of(
        cls, schema: Any, *, x: Sequence[str], y: str, by: str, classes: Sequence[str], where: str
    ) -> "TableColumns":
        """The columns of a schema; without `x` all are inputs but `y` and `by`.

        Raises:
            ConfigError: one is missing, or is nothing that a model computes with.
        """
        names = list(schema.names)
        inputs = tuple(x) or tuple(name for name in names if name not in (y, by))
        for name in (*inputs, y, *((by,) if by else ())):
            if name not in names:
                raise ConfigError(
                    f"{where} has no column {name!r}; its columns are {listed(names)}"
                )
            if names.count(name) > 1:
                raise ConfigError(f"{where} has two columns {name!r}; rename one of them")
        wanted = dict.fromkeys((*inputs, y, *((by,) if by else ())))
        types = {name: schema.field(name).type for name in wanted}
        found = cls(inputs, y, tuple(classes), types, where)
        found._check_inputs()
        found._check_target()
        return found

    def _check_inputs(self) -> None:
        if not self.x:
            raise ConfigError(f"{self.where} has no column but {self.y!r}; give at least one input")
        for name in self.x:
            kind = self.types[name]
            if not (_is_number(kind) or _list_of(kind) is not None):
                raise ConfigError(
                    f"the column {name!r} of {self.where} holds {_words(kind)}, which no model "
                    f"computes with; {_cure(kind)}"
                )
            if _list_of(kind) is not None and len(self.x) > 1:
                raise ConfigError(
                    f"the column {name!r} of {self.where} holds lists beside the other inputs "
                    f"{listed([other for other in self.x if other != name])}; give it alone, or "
                    "write a column for each number"
                )

    def _check_target(self) -> None:
        kind = self.types[self.y]
        if _is_text(kind) and not self.classes:
            raise ConfigError(
                f"the target {self.y!r} of {self.where} is a text; name the classes, the same on "
                'every node: classes=("no", "yes")'
            )
        if self.classes and not _is_text(kind):
            raise ConfigError(
                f"classes are named, but the target {self.y!r} of {self.where} holds "
                f"{_words(kind)}; leave classes out"
            )
        if not (_is_text(kind) or _is_number(kind) or _list_of(kind) is not None):
            raise ConfigError(
                f"the target {self.y!r} of {self.where} holds {_words(kind)}; {_cure(kind)}"
            )

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that an example is made of."""
        return tuple(dict.fromkeys((*self.x, self.y)))

    @property
    def row_bytes(self) -> int:
        """Of an example in memory, as the types say."""
        width = [(_numbers_in(self.types[name])) for name in self.x]
        inputs = sum(count for count, _ in width) * self._type().itemsize
        count, kind = _numbers_in(self.types[self.y])
        return inputs + count * (8 if self.classes else kind.itemsize)

    def _type(self) -> np.dtype[Any]:
        return np.result_type(*(_numbers_in(self.types[name])[1] for name in self.x))

    def check(self, schema: Any, where: str) -> None:
        """Raises:
        ConfigError: another file has other types, or lacks a column.
        """
        for name, kind in self.types.items():
            place = schema.get_field_index(name)
            if place < 0:
                raise ConfigError(
                    f"{where} has no column {name!r}, which other files of {self.where} have; give "
                    "all files the same columns"
                )
            other = schema.field(place).type
            if other != kind:
                raise ConfigError(
                    f"the column {name!r} holds {_words(other)} in {where}, but {_words(kind)} in "
                    f"the first file of {self.where}; write it as one type"
                )

    def examples(self, table: Any, where: str) -> Examples:
        """Rows of these columns as examples.

        Args:
            table: of Arrow, with the columns of `read`.
            where: the rows, for sentences.

        Raises:
            ConfigError: a value is empty, a class unknown, or lists are unequal.
        """
        for name in self.read:
            empty = table.column(name).null_count
            if empty:
                raise ConfigError(
                    f"the column {name!r} has {empty:,} empty values in {where}; fill them, or "
                    "leave those rows out"
                )
        return Examples(self._inputs(table, where), self._target(table, where))

    def _inputs(self, table: Any, where: str) -> Array:
        if _list_of(self.types[self.x[0]]) is not None:
            return _lists(table.column(self.x[0]), self.x[0], where)
        out = np.empty((table.num_rows, len(self.x)), self._type())
        for place, name in enumerate(self.x):
            start = 0
            for chunk in table.column(name).chunks:
                out[start : start + len(chunk), place] = chunk.to_numpy(zero_copy_only=False)
                start += len(chunk)
        return out

    def _target(self, table: Any, where: str) -> Array:
        column = table.column(self.y)
        if self.classes:
            return self._numbered(column, where)
        if _list_of(self.types[self.y]) is not None:
            return _lists(column, self.y, where)
        found: Array = column.to_numpy()
        return found.astype(np.int64) if found.dtype.kind in "biu" else found

    def _numbered(self, column: Any, where: str) -> Array:
        pa, compute = arrow(), arrow("compute")
        names = pa.array(self.classes, pa.string())
        texts = column.cast(pa.string())
        places = compute.index_in(texts, value_set=names)
        if places.null_count:
            unknown = compute.filter(texts, compute.is_null(places))[0].as_py()
            raise ConfigError(
                f"the target {self.y!r} is {unknown!r} in {where}, which is none of the classes "
                f"{listed(self.classes)}; name it among them, or leave those rows out"
            )
        found: Array = places.to_numpy().astype(np.int64)
        return found


def _lists(column: Any, name: str, where: str) -> Array:
    """A column of lists, or of tensors of a fixed shape, as an array."""
    pa = arrow()
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no rows
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], column.type)
    if isinstance(column.type, pa.FixedShapeTensorType):
        tensors: Array = whole.to_numpy_ndarray()
        return tensors
    flat = whole.flatten()
    if flat.null_count:
        raise ConfigError(f"a list of the column {name!r} has empty values in {where}; fill them")
    values: Array = flat.to_numpy(zero_copy_only=False)
    rows = len(whole)
    if pa.types.is_fixed_size_list(whole.type):
        return values.reshape(rows, whole.type.list_size)
    lengths = np.diff(whole.offsets.to_numpy())
    if rows and (lengths != lengths[0]).any():
        other = int(np.argmax(lengths != lengths[0]))
        raise ConfigError(
            f"the lists of the column {name!r} are unequal in {where}: row 0 has {lengths[0]} "
            f"numbers, row {other} has {lengths[other]}; pad or crop them to one length"
        )
    return values.reshape(rows, int(lengths[0]) if rows else 0)


def _is_number(kind: Any) -> bool:
    types = arrow().types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_text(kind: Any) -> bool:
    types = arrow().types
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(plain) or types.is_large_string(plain))


def _list_of(kind: Any) -> Any:
    """The type of the numbers in lists of this type; None if it is no such type."""
    pa = arrow()
    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.value_type
    types = pa.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if lists and _is_number(kind.value_type) else None


def _numbers_in(kind: Any) -> tuple[int, np.dtype[Any]]:
    """How many numbers a value of this type has, and of which type they are."""
    pa = arrow()
    inner = _list_of(kind)
    if _is_text(kind):
        return 1, np.dtype(np.int64)
    number = kind if inner is None else inner
    dtype = np.dtype(np.bool_ if pa.types.is_boolean(number) else number.to_pandas_dtype())
    if inner is None:
        return 1, dtype
    if isinstance(kind, pa.FixedShapeTensorType):
        return int(np.prod(kind.shape)), dtype
    return kind.list_size if pa.types.is_fixed_size_list(kind) else LIST_LENGTH, dtype


def _words(kind: Any) -> str:
    return "texts" if _is_text(kind) else f"values of type {kind}"


def _cure(kind: Any) -> str:
    if _is_text(kind):
        return "number its categories, the same on every node, or leave it out of x"
    return "cast it to numbers, or leave it out"
