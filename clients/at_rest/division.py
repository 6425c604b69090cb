"""Which stored rows are whose.

    by a column      natural users: node i has the i-th value; fewer nodes have several each
    a partitioner    of all rows, by the target
    neither          pieces, in order: node i has as many as the next, within one

A node whose own configuration names its value of the column (`hospital=Bern`) reads that one, and
of the others not even the column where path or row group say that they are others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from umbel.clients.at_rest.pieces import File, Format, Kept, Mask, Piece
from umbel.clients.at_rest.places import arrow, listed, reading
from umbel.clients.data.examples import Node
from umbel.clients.data.partition import Partitioner, deal, generator_of
from umbel.core.errors import ConfigError

Counts = Mapping[Any, int]


def whole(stored: Format) -> list[Kept]:
    """All rows."""
    return [Kept(piece) for piece in _pieces(stored.files())]


def by_pieces(stored: Format, node: Node, where: str) -> list[Kept]:
    """The node's pieces, one after another.

    Raises:
        ConfigError: there are fewer than nodes.
    """
    pieces = [piece for piece in _pieces(stored.files()) if piece.rows]
    count = len(pieces)
    if count < node.partitions:
        raise ConfigError(
            f"{where} has {count} pieces with rows for {node.partitions} nodes; use at most "
            f"{count} nodes, divide it by a column (by=...) or a partitioner, or write it in "
            "smaller row groups"
        )
    start, stop = (count * (node.partition + more) // node.partitions for more in (0, 1))
    return [Kept(piece) for piece in pieces[start:stop]]


def by_column(
    stored: Format, column: str, node: Node, counts: Counts | None, seed: int, where: str
) -> list[Kept]:
    """The rows whose value of a column is the node's.

    Args:
        counts: of the values; None where the node names its own.

    Raises:
        ConfigError: there are fewer values than nodes, or none of these rows.
    """
    wanted = _wanted(stored, column, node, counts, seed, where)
    found = [
        kept
        for file in stored.files()
        if column not in file.keys or file.keys[column] in wanted.to_pylist()
        for piece in file.pieces()
        if piece.may_hold(column, wanted)
        for kept in [_matching(piece, column, wanted)]
        if kept.rows
    ]
    if not found:
        raise ConfigError(
            f"node {node.partition} has no rows: nowhere in {where} is {column} "
            f"{listed(wanted.to_pylist())}"
        )
    return found


def _wanted(
    stored: Format, column: str, node: Node, counts: Counts | None, seed: int, where: str
) -> Any:
    pa = arrow()
    kind = stored.kind(column)
    if counts is None:
        with reading(f"the {column} of node {node.partition}"):
            return pa.array([pa.scalar(node.config[column]).cast(kind).as_py()], kind)
    keys = sorted(counts)
    if len(keys) < node.partitions:
        raise ConfigError(
            f"the column {column!r} of {where} has {len(keys)} values for {node.partitions} "
            f"nodes; use at most {len(keys)} nodes"
        )
    sizes = np.asarray([counts[key] for key in keys], np.int64)
    owner = deal(sizes, node.partitions, generator_of(seed))
    return pa.array([keys[i] for i in np.flatnonzero(owner == node.partition)], kind)


def _matching(piece: Piece, column: str, wanted: Any) -> Kept:
    mask = arrow("compute").is_in(piece.values(column), value_set=wanted)
    keep: Mask = mask.to_numpy()
    return Kept(piece, None if keep.all() else keep)


def counted(stored: Format, column: str, where: str) -> Counts:
    """How often each value of a column is there; only the column is read.

    Raises:
        ConfigError: it is empty in a row.
    """
    counts: dict[Any, int] = {}
    for file in stored.files():
        for piece in file.pieces():
            if column in file.keys:
                found = {file.keys[column]: piece.rows}
            else:
                pairs = piece.values(column).value_counts().to_pylist()
                found = {pair["values"]: pair["counts"] for pair in pairs}
            if None in found:
                raise ConfigError(
                    f"the column {column!r} has {found[None]:,} empty values in {piece.where}, so "
                    f"that nobody has these rows; fill them, or leave them out of {where}"
                )
            for key, rows in found.items():
                if rows:
                    counts[key] = counts.get(key, 0) + rows
    return counts


def by_partitioner(
    stored: Format, target: str, partitioner: Partitioner, node: Node, seed: int
) -> list[Kept]:
    """The rows that a partitioner gives the node, by all rows' targets."""
    pa = arrow()
    pieces = [piece for piece in _pieces(stored.files()) if piece.rows]
    columns = [piece.values(target) for piece in pieces]
    labels = pa.chunked_array([c for one in columns for c in one.chunks])
    if not (pa.types.is_floating(labels.type) or pa.types.is_integer(labels.type)):
        labels = labels.unify_dictionaries() if pa.types.is_dictionary(labels.type) else labels
        _, codes = np.unique(np.asarray(labels.to_pylist(), dtype=str), return_inverse=True)
    else:
        codes = labels.to_numpy()
    rows = partitioner.split(codes, node.partitions, seed)[node.partition]
    found, start = [], 0
    for piece in pieces:
        first, last = np.searchsorted(rows, [start, start + piece.rows])
        if last > first:
            keep = np.zeros(piece.rows, np.bool_)
            keep[rows[first:last] - start] = True
            found.append(Kept(piece, keep))
        start += piece.rows
    return found


def set_apart(
    kept: Sequence[Kept], fraction: float, seed: int, partition: int
) -> tuple[list[Kept], list[Kept]]:
    """The rows that a node trains on, and a random part of them that it keeps for its tests."""
    total = sum(one.rows for one in kept)
    tests = min(int(total * fraction + 0.5), total - 1)
    train, test = [], []
    before = 0
    for place, one in enumerate(kept):
        after = before + one.rows
        rows = np.arange(one.piece.rows) if one.keep is None else np.flatnonzero(one.keep)
        count = tests * after // total - tests * before // total
        chosen = generator_of(seed, partition, place).permutation(rows)[:count]
        apart = np.zeros(one.piece.rows, np.bool_)
        apart[chosen] = True
        train.append(Kept(one.piece, ~apart if one.keep is None else one.keep & ~apart))
        test.append(Kept(one.piece, apart))
        before = after
    return train, [one for one in test if one.rows]


def _pieces(files: Sequence[File]) -> list[Piece]:
    return [piece for file in files for piece in file.pieces()]
