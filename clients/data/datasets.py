"""Data sets by name: real data with no account and, where possible, no download.

    load("digits")          from scikit-learn, at once
    load("fashion-mnist")   from the cache, this system, apt or HTTPS; mapped, not read

A `DataSet` holds the examples as they are stored and `prepare`, which turns the few rows that
someone needs into a model's inputs: 60,000 images stay 47 MB that all processes share.
"""

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umbel.clients.data import fashion_mnist
from umbel.clients.data.examples import Examples
from umbel.clients.data.inputs import Columns, Inputs, Pixels
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
Task = Literal["classification", "regression"]
Progress = fashion_mnist.Progress

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the training pixels, scaled to [0, 1]
TEST_SHARE = 0.2
SPLIT_SEED = 0


def as_is(examples: Examples) -> Examples:
    """The examples themselves: for arrays that are ready for a model."""
    return examples


def as_images(examples: Examples) -> Examples:
    """Grey images of bytes to what a convolutional network takes.

    Args:
        examples: x of shape (n, height, width), uint8; y of shape (n,).

    Returns:
        x of shape (n, 1, height, width), float32, with mean 0 and standard deviation 1 over
        the training images of Fashion-MNIST; y as int64.
    """
    pixels = np.asarray(examples.x).astype(np.float32)[:, None]
    pixels *= 1 / (255 * FASHION_STD)
    pixels -= FASHION_MEAN / FASHION_STD
    return Examples(pixels, np.asarray(examples.y).astype(np.int64))


def as_vectors(examples: Examples) -> Examples:
    """As `as_images`, each image a row: x of shape (n, height * width), for linear models."""
    images = as_images(examples)
    return Examples(images.x.reshape(len(images), -1), images.y)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training examples, and the held-out ones that judge a model.

    Attributes:
        name: what it is called in reports.
        train: as stored; see `prepare`.
        test: as stored, never given to a node.
        task: whether y is a class (integers from 0) or a number.
        classes: the names of the classes, in the order of their numbers.
        source: where the data come from.
        licence: on what terms.
        groups: of each training example, the natural key it belongs to (a hospital, a person).
        prepare: turns selected examples into a model's inputs.
        inputs: the same for one input of somebody who uses the model, as plain numbers; None
            where nobody said.
    """

    name: str
    train: Examples
    test: Examples
    task: Task = "classification"
    classes: tuple[str, ...] | None = None
    source: str = ""
    licence: str = ""
    groups: Array | None = None
    prepare: Callable[[Examples], Examples] = as_is
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and len(self.groups) != len(self.train):
            raise ConfigError(
                f"data set {self.name} has {len(self.groups)} groups for {len(self.train)} "
                "training examples; give one group for each"
            )


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue: what is known of a data set before it is loaded."""

    name: str
    task: Task
    train: int
    test: int
    features: str
    source: str
    licence: str


_UCI = "UCI (scikit-learn)"
CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry("digits", "classification", 1437, 360, "64 pixels, 10 classes", _UCI, "CC BY 4.0"),
        Entry(
            "breast-cancer", "classification", 455, 114, "30 numbers, 2 classes", _UCI, "CC BY 4.0"
        ),
        Entry("wine", "classification", 142, 36, "13 numbers, 3 classes", _UCI, "CC BY 4.0"),
        Entry(
            "diabetes",
            "regression",
            353,
            89,
            "10 numbers",
            "Efron et al. (scikit-learn)",
            "BSD-3-Clause, as scikit-learn",
        ),
        Entry(
            "fashion-mnist",
            "classification",
            60_000,
            10_000,
            "28×28 pixels, 10 classes",
            "Zalando Research",
            "MIT",
        ),
    )
}

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def cache_folder() -> Path:
    """`$UMBEL_CACHE`, else `umbel` in `$XDG_CACHE_HOME`, else `~/.cache/umbel`."""
    if chosen := os.environ.get("UMBEL_CACHE"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    base = Path(shared) if Path(shared).is_absolute() else Path("~/.cache").expanduser()
    return base / "umbel"


def load(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> DataSet:
    """A data set by its name in the catalogue; the second call in a process is free.

    Args:
        name: a key of `CATALOGUE`.
        cache: where fetched files are kept; `cache_folder()` by default.
        progress: called while something is fetched; by default each step is logged.

    Raises:
        ConfigError: the name is unknown, or the data can be neither found nor fetched.
    """
    entry = find(name)
    if entry.name != "fashion-mnist":
        return _from_scikit_learn(entry.name)
    folder = (cache or cache_folder()) / entry.name
    fashion_mnist.ensure(folder, progress or _logged)
    return _fashion(folder)


def find(name: str) -> Entry:
    """The catalogue's entry.

    Raises:
        ConfigError: the name is unknown; the message names the closest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name.lower().replace("_", "-"), CATALOGUE, n=2, cutoff=0.5)
    cure = f"did you mean {' or '.join(close)}? All" if close else "all"
    raise ConfigError(f"unknown data set {name!r}; {cure} that there are: {', '.join(CATALOGUE)}")


def place(name: str, *, cache: Path | None = None) -> str | None:
    """Where a data set lies on this machine, without fetching it; None if it does not.

    Raises:
        ConfigError: the name is unknown.
    """
    if find(name).name != "fashion-mnist":
        return "scikit-learn"
    folder = (cache or cache_folder()) / name
    return str(folder) if fashion_mnist.cached(folder) is not None else None


def fetch(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> str:
    """Make sure that a data set is on this machine and undamaged; where it is.

    Raises:
        ConfigError: the name is unknown, or the data can be neither found nor fetched.
    """
    if find(name).name == "fashion-mnist":
        fashion_mnist.repair((cache or cache_folder()) / name, progress or _logged)
        _fashion.cache_clear()
    where = place(name, cache=cache)
    if where is None:
        raise ConfigError(f"the data cache lost {name} while it was checked; try again")
    return where


def _logged(doing: str, share: float) -> None:
    if share == 0:
        logging.getLogger(__name__).info("fashion-mnist: %s", doing)


@remembered
def _fashion(folder: Path) -> DataSet:
    arrays = fashion_mnist.ensure(folder, _logged)
    entry = CATALOGUE["fashion-mnist"]
    return DataSet(
        name=entry.name,
        train=Examples(arrays["train-images"], arrays["train-labels"]),
        test=Examples(arrays["test-images"], arrays["test-labels"]),
        task=entry.task,
        classes=_FASHION_CLASSES,
        source=entry.source,
        licence=entry.licence,
        prepare=as_images,
        inputs=Pixels(28, 28, mean=(FASHION_MEAN,), std=(FASHION_STD,)),
    )


@remembered
def _from_scikit_learn(name: str) -> DataSet:
    # Imported here: it takes a second, and runs on images do without.
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    entry = CATALOGUE[name]
    bunch = getattr(datasets, f"load_{name.replace('-', '_')}")()
    classify = entry.task == "classification"
    train, test = train_test_split(
        np.arange(len(bunch.target)),
        test_size=TEST_SHARE,
        random_state=SPLIT_SEED,
        stratify=bunch.target if classify else None,
    )
    # Pixels have a public range; other features are scaled by what the training rows show.
    mean, std = (
        (0.0, 16.0) if name == "digits" else (bunch.data[train].mean(0), bunch.data[train].std(0))
    )
    x = ((bunch.data - mean) / std).astype(np.float32)
    y = bunch.target.astype(np.int64 if classify else np.float32)
    return DataSet(
        name=name,
        train=Examples(x[train], y[train]),
        test=Examples(x[test], y[test]),
        task=entry.task,
        classes=tuple(str(one) for one in bunch.target_names) if classify else None,
        source=entry.source,
        licence=entry.licence,
        inputs=Columns(tuple(map(str, bunch.feature_names)), _each(mean, x), _each(std, x)),
    )


def _each(value: Any, x: Array) -> tuple[float, ...]:
    """One number for each column of `x`."""
    return tuple(np.broadcast_to(np.asarray(value, np.float64), x.shape[1:]).tolist())
