"""Features that every node computes for itself, once, and keeps in its cache.

    data set -> recipe (fixed, the same for all) -> rows in parts of a thousand on disk -> batches

A recipe does not look at other nodes' data, so features cost no privacy. Parts are files, made
by whoever needs them first and replaced in one step: processes that share a cache share the
work, and a later run finds it done.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.clients.data.datasets import DataSet, cache_folder, load
from umbel.clients.data.examples import Examples, Node, Shares, Split
from umbel.clients.data.sealed import check_open
from umbel.clients.trainers.base import Options

PART = 1000
"""Rows of one file."""
KEPT = 2
"""Folders of derived features that stay in the cache; they are of one run each."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FeatureMap:
    """How features are made of what a data set stores.

    Attributes:
        name: part of the cache's folder; change it when the features change.
        width: of one row.
        make: stored inputs of shape (n, ...) to features of shape (n, width), float32.
    """

    name: str
    width: int
    make: Callable[[Array], Tensor]


@dataclass(frozen=True)
class Store:
    """Rows of features, in files of a thousand, made when they are first needed.

    Attributes:
        folder: of the files.
        count: of rows.
        width: of a row.
        dtype: in which rows are kept.
        fill: row numbers to rows.
    """

    folder: Path
    count: int
    width: int
    dtype: np.dtype[Any]
    fill: Callable[[Array], Array]
    _open: dict[int, Array] = field(default_factory=dict, repr=False, compare=False)

    def part(self, number: int) -> Array:
        """One file's rows, mapped."""
        if number not in self._open:
            path = self.folder / f"{number:05d}.npy"
            if not path.exists():
                self._make(number, path)
            self._open[number] = np.load(path, mmap_mode="r")
        return self._open[number]

    def _make(self, number: int, path: Path) -> None:
        rows = np.arange(number * PART, min(self.count, (number + 1) * PART))
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        with fresh.open("wb") as file:
            np.save(file, np.ascontiguousarray(self.fill(rows), dtype=self.dtype))
        fresh.replace(path)

    def take(self, rows: Array) -> Tensor:
        """Rows by number, in the store's own type, shape (n, width)."""
        out = torch.empty(
            len(rows), self.width, dtype=torch.from_numpy(np.empty(0, self.dtype)).dtype
        )
        parts = rows // PART
        for number in np.unique(parts):
            places = np.flatnonzero(parts == number)
            kept = np.take(self.part(int(number)), rows[places] - number * PART, axis=0)
            out[torch.from_numpy(places)] = torch.from_numpy(kept)
        return out


@dataclass(frozen=True)
class Rows:
    """Some rows of a store, as the inputs of `Examples`: read when they are asked for."""

    store: Store
    index: Array

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> "Rows":
        return Rows(self.store, self.index[rows])

    def tensor(self) -> Tensor:
        """The rows themselves, in the store's own type."""
        return self.store.take(self.index)

    def parts(self) -> Iterator[Array]:
        """Places of this object's rows, file by file."""
        number = self.index // PART
        for one in np.unique(number):
            yield np.flatnonzero(number == one)

    def derived(
        self, key: str, width: int, dtype: np.dtype[Any], make: Callable[[Tensor], Tensor]
    ) -> "Rows":
        """The same rows after a function that is the same for the whole run.

        Args:
            key: names what the function depends on; kept in the cache beside the features.
            width: of a row after it.
            dtype: in which to keep them.
            make: from a batch of this store's rows.
        """
        folder = self.store.folder.parent / "derived" / f"{key}-{self.store.folder.name}"

        def fill(rows: Array) -> Array:
            result: Array = make(self.store.take(rows)).numpy()
            return result

        _prune(folder)
        return Rows(Store(folder, self.store.count, width, dtype, fill), self.index)


def _prune(folder: Path) -> None:
    """Forget derived features of old runs; files that are in use stay readable."""
    if folder.exists() or not folder.parent.exists():
        return
    others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[2 * KEPT :]:
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class PrecomputedFeatures:
    """A `data` function: one example a node (or equal shares), as features.

    Attributes:
        dataset: a name in the catalogue, or a `DataSet`.
        recipe: a recipe, or a function of the options that gives one.
        cache: folder for the files; the node's cache by default.
    """

    dataset: str | DataSet
    recipe: FeatureMap | Callable[[Options], FeatureMap]
    cache: Path | None = None
    FIXED: ClassVar[bool] = True
    _stores: dict[str, Store] = field(default_factory=dict, repr=False, compare=False)

    @property
    def source(self) -> object:
        """Whose data these are, whatever features are made of them."""
        return self.dataset

    def __call__(self, node: Node, options: Options) -> Split:
        """The node's examples: every `count`-th of the training examples."""
        data = self.load()
        index = np.arange(node.partition, len(data.train), node.partitions)
        return Split(self._examples("train", index, options))

    def pool(self, partitions: Sequence[int], count: int, options: Options) -> Examples | None:
        """The examples of several nodes; None where some nodes would have more than others."""
        total = len(self.load().train)
        each = total // count
        if each * count != total:
            return None
        members = np.asarray(partitions, dtype=np.int64)
        index = (members[:, None] + count * np.arange(each)).reshape(-1)
        found = self._examples("train", index, options)
        return found if each == 1 else Shares(found.x, found.y, each)

    def central_test(self, options: Options) -> Examples:
        """The held-out examples.

        Raises:
            ConfigError: they are locked; see `umbel.clients.data.sealed`.
        """
        check_open()
        return self._examples("test", np.arange(len(self.load().test)), options)

    def load(self) -> DataSet:
        """The data set."""
        return load(self.dataset) if isinstance(self.dataset, str) else self.dataset

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, where the data set has any."""
        return self.load().classes or ()

    def recipe_for(self, options: Options) -> FeatureMap:
        """The recipe under these options."""
        return self.recipe if isinstance(self.recipe, FeatureMap) else self.recipe(options)

    def _examples(self, part: str, index: Array, options: Options) -> Examples:
        stored = self.load().train if part == "train" else self.load().test
        y = np.asarray(stored.y)[index].astype(np.int64)
        return Examples(Rows(self._store(part, stored, options), index), y)  # type: ignore[arg-type]  # rows that are read when they are asked for

    def _store(self, part: str, stored: Examples, options: Options) -> Store:
        recipe = self.recipe_for(options)
        key = f"{part}/{recipe.name}"
        if key not in self._stores:
            images = np.asarray(stored.x)
            made = json.dumps([recipe.name, part, images.shape, torch.__version__]).encode()
            digest = hashlib.sha256(made + np.ascontiguousarray(images).data).hexdigest()[:16]
            folder = (self.cache or cache_folder()) / "features" / f"{recipe.name}-{digest}"

            def fill(rows: Array) -> Array:
                result: Array = recipe.make(images[rows]).to(torch.float16).numpy()
                return result

            kind = np.dtype(np.float16)
            self._stores[key] = Store(folder, len(images), recipe.width, kind, fill)
        return self._stores[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}


def features_of(examples: Examples, columns: slice = slice(None)) -> Tensor:
    """The inputs of some examples as float32, shape (n, width); stored rows are read now.

    Args:
        examples: as a node's `data` function gives them.
        columns: of the features, if not all are wanted.
    """
    if isinstance(examples.x, Rows):
        return examples.x.tensor()[:, columns].float()
    return torch.as_tensor(np.asarray(examples.x)).flatten(1)[:, columns].float()


Recipe = FeatureMap
"""The former name."""
Featured = PrecomputedFeatures
"""The former name."""
