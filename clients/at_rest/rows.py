"""A node's rows where they lie: an epoch reads them through a buffer, in a mixed order.

    pieces      in random order
    windows     consecutive runs of rows, of a quarter of `memory` together; their rows are mixed
    batches     taken from one window after another, while the next is read in a thread

This is the two-level shuffle of Xu et al., "Stochastic Gradient Descent without Full Data Shuffle"
(2022), section 4, https://arxiv.org/abs/2206.05830: as good as a full shuffle where a window holds
rows of several pieces, and it reads every piece once, from its first row to its last. At most two
windows are held while a third is read; a process holds those of one node.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.clients.at_rest.pieces import Kept
from umbel.clients.data.examples import Examples
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]
Transform = Callable[[Examples], Examples]

HELD = 2
"""Windows in memory beside the one that is read."""
PARTS = 8
"""A run of rows is at most this part of `memory`; a window is twice as much."""


@dataclass(frozen=True)
class Run:
    """Rows of a piece that are read at once: the `number`-th of its runs."""

    piece: int
    number: int
    rows: int


@dataclass(frozen=True)
class Window:
    """Runs in memory, one after another.

    Attributes:
        runs: their numbers, ascending or as an epoch has them.
        starts: of each, its first row in `x` and `y`.
    """

    runs: Rows
    starts: Rows
    x: Array
    y: Array


_holder: "weakref.ref[StoredRows] | None" = None


class StoredRows:
    """Rows that are read while they are used.

    Args:
        kept: which rows of which pieces.
        memory: bytes that they may take, about.
        transform: of the rows as they are stored to what the model takes; must keep their number.
        who: whose rows these are, for sentences.

    Example:
        >>> for batch in data(node, options).train.batches(256, seed=1):  # doctest: +SKIP
        ...     fit(batch.x, batch.y)
    """

    def __init__(
        self, kept: Sequence[Kept], memory: int, transform: Transform | None, who: str
    ) -> None:
        self.kept = [one for one in kept if one.rows]
        self.memory, self.transform, self.who = memory, transform, who
        self._runs = [run for place in range(len(self.kept)) for run in self._runs_of(place)]
        self._starts = np.concatenate([[0], np.cumsum([run.rows for run in self._runs])])
        self._reader = _Reader(self)
        self._windows: list[Window] = []

    def _runs_of(self, place: int) -> Iterator[Run]:
        one, size = self.kept[place], self._run_size(place)
        for number, start in enumerate(range(0, one.piece.rows, size)):
            stop = min(start + size, one.piece.rows)
            rows = stop - start if one.keep is None else np.count_nonzero(one.keep[start:stop])
            yield Run(place, number, int(rows))

    def _run_size(self, place: int) -> int:
        piece = self.kept[place].piece
        return max(1, min(piece.rows, self.memory // PARTS // max(1, piece.row_bytes)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes(self) -> int:
        """Of memory that all rows would take."""
        return sum(one.rows * one.piece.row_bytes for one in self.kept)

    def read(self) -> Examples:
        """All rows, in order, in memory."""
        self._windows.clear()
        window = self._load(range(len(self._runs)))
        return Examples(window.x, window.y)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Examples]:
        """One epoch.

        Args:
            size: rows of a batch; the last may be short.
            seed: of the order; None is as they lie.
        """
        if size < 1:
            raise ConfigError(f"a batch of {size} rows is none; give 1 or more")
        generator = None if seed is None else np.random.default_rng(seed)
        waiting = np.empty(0, np.int64)
        for mixed in self.order(generator):
            waiting = np.concatenate([waiting, mixed])
            whole = len(waiting) // size * size
            for start in range(0, whole, size):
                yield self.take(waiting[start : start + size])
            waiting = waiting[whole:]
        if len(waiting):
            yield self.take(waiting)

    def order(self, generator: np.random.Generator | None) -> Iterator[Rows]:
        """The row numbers of an epoch, window by window, each read ahead of its turn.

        Args:
            generator: draws the order; None is ascending.
        """
        windows = self._planned(generator)
        self._windows.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="umbel-rows") as ahead:
            coming = ahead.submit(self._load, windows[0])
            for place, runs in enumerate(windows):
                self._hold(coming.result())
                if place + 1 < len(windows):
                    coming = ahead.submit(self._load, windows[place + 1])
                parts = [np.arange(self._starts[run], self._starts[run + 1]) for run in runs]
                rows = np.concatenate(parts)
                yield rows if generator is None else generator.permutation(rows)

    def _planned(self, generator: np.random.Generator | None) -> list[list[int]]:
        """The runs of each window."""
        places = np.arange(len(self.kept))
        order = places if generator is None else generator.permutation(places)
        of_piece: list[list[int]] = [[] for _ in self.kept]
        for number, run in enumerate(self._runs):
            of_piece[run.piece].append(number)
        return self._grouped([number for place in order for number in of_piece[place]])

    def _grouped(self, runs: Sequence[int]) -> list[list[int]]:
        """Consecutive runs, as many as a window takes."""
        windows: list[list[int]] = []
        room = 0
        for number in runs:
            run = self._runs[number]
            size = run.rows * self.kept[run.piece].piece.row_bytes
            if not windows or size > room:
                windows.append([])
                room = 2 * self.memory // PARTS
            windows[-1].append(number)
            room -= size
        return windows

    def take(self, rows: Rows) -> Examples:
        """Rows by their numbers; quick in the order of an epoch, and read anew out of it."""
        runs = np.searchsorted(self._starts, rows, "right") - 1
        within = rows - self._starts[runs]
        x: Array | None = None
        y: Array | None = None
        left = np.ones(len(rows), np.bool_)
        while left.any() or x is None or y is None:
            window = self._window_of(int(runs[left][0]) if len(rows) else 0)
            known = _places(window, runs)
            here = left & (known >= 0)
            wanted = known[here] + within[here]
            if here.all():
                return Examples(window.x.take(wanted, 0), window.y.take(wanted, 0))
            if x is None or y is None:
                x = np.empty((len(rows), *window.x.shape[1:]), window.x.dtype)
                y = np.empty((len(rows), *window.y.shape[1:]), window.y.dtype)
            x[here], y[here] = window.x.take(wanted, 0), window.y.take(wanted, 0)
            left &= ~here
        return Examples(x, y)

    def _window_of(self, run: int) -> Window:
        for window in reversed(self._windows):
            if (window.runs == run).any():
                return window
        later = self._grouped(range(run, len(self._runs)))[0]
        self._hold(self._load(later))
        return self._windows[-1]

    def _hold(self, window: Window) -> None:
        """Keep a window; whatever another node's rows have in memory goes."""
        global _holder
        other = None if _holder is None else _holder()
        if other is not None and other is not self:
            other._windows.clear()
        _holder = weakref.ref(self)
        self._windows = [*self._windows[-(HELD - 1) :], window]

    def _load(self, runs: Sequence[int]) -> Window:
        parts = [(number, self._reader.run(self._runs[number])) for number in runs]
        sizes = [len(part) for _, part in parts]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        first = parts[0][1]
        if len(parts) == 1:
            x, y = np.asarray(first.x), np.asarray(first.y)
        else:
            x, y = self._joined([part for _, part in parts], int(starts[-1]))
        return Window(np.asarray(runs, np.int64), starts[:-1], x, y)

    def _joined(self, parts: list[Examples], rows: int) -> tuple[Array, Array]:
        shapes = {(np.shape(part.x)[1:], np.shape(part.y)[1:]) for part in parts if len(part)}
        if len(shapes) > 1:
            one, other = sorted(shapes, key=str)[:2]
            raise ConfigError(
                f"{self.who} has examples of the shapes {one[0]} and {other[0]}; give all rows one "
                "shape"
            )
        solid = [part for part in parts if len(part)] or parts[:1]
        x = np.concatenate([np.asarray(part.x) for part in solid])
        y = np.concatenate([np.asarray(part.y) for part in solid])
        assert len(x) == rows
        return x, y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": [], "_reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = _Reader(self)


def _places(window: Window, runs: Rows) -> Rows:
    """Of each run its first row in the window; below 0 where it is not there."""
    order = np.argsort(window.runs)
    place = np.searchsorted(window.runs, runs, sorter=order)
    place = order[np.minimum(place, len(order) - 1)]
    return np.where(window.runs[place] == runs, window.starts[place], -1)


class _Reader:
    """Reads runs of pieces; the next run of the same piece goes on where the last one ended."""

    def __init__(self, rows: StoredRows) -> None:
        self._rows: StoredRows = weakref.proxy(rows)
        self._open: tuple[int, int, Iterator[Examples]] | None = None
        self._turn = threading.Lock()

    def run(self, wanted: Run) -> Examples:
        """The rows of a run, ready for a model."""
        with self._turn:
            try:
                return self._run(wanted)
            except BaseException:
                self._open = None  # what has failed is begun anew
                raise

    def _run(self, wanted: Run) -> Examples:
        kept = self._rows.kept[wanted.piece]
        if self._open is None or self._open[:2] != (wanted.piece, wanted.number):
            again = kept.piece.runs(self._rows._run_size(wanted.piece), kept.keep)
            for _ in range(wanted.number):
                next(again)
            self._open = wanted.piece, wanted.number, again
        _, number, runs = self._open
        self._open = wanted.piece, number + 1, runs
        found = next(runs, None)
        if found is None or len(found) != wanted.rows:
            raise ConfigError(
                f"{kept.piece.where} has other rows than when it was opened; do not write files "
                "that a run reads"
            )
        transform = self._rows.transform
        if transform is None or not len(found):
            return found
        changed = transform(found)
        if len(changed) != len(found):
            raise ConfigError(
                f"the transform made {len(changed)} examples of {len(found)} rows of "
                f"{kept.piece.where}; it has to keep their number"
            )
        return changed
