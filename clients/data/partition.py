"""Who gets which examples: partitioners.

    labels (n,) --split(labels, parts, seed)--> one sorted array of row numbers for each node

Every partitioner obeys one law: each example goes to exactly one node, no node gets fewer than
`min_examples`, and the same arguments give the same split in every process.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from umbel.clients.data.examples import ArrayLike
from umbel.core.errors import ConfigError

Labels = ArrayLike | Sequence[Any]
Array = np.ndarray[Any, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


class Partitioner(Protocol):
    """Divides examples among nodes; `str()` of it is its description in reports."""

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """Row numbers for each node, sorted.

        Args:
            labels: of every example, shape (n,); or n, where labels do not matter.
            parts: the number of nodes.
            seed: not negative; fixes every choice.

        Raises:
            ConfigError: there are too few examples, or the labels do not fit.
        """
        ...


@dataclass(frozen=True)
class Iid:
    """Every node gets a uniformly random part; sizes differ by one at most."""

    min_examples: int = 1

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """See `Partitioner.split`."""
        count = _checked(labels, parts, self.min_examples)
        owner = np.empty(count, np.int64)
        owner[generator_of(seed).permutation(count)] = np.arange(count) % parts
        return _rows(owner, parts)

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True)
class Dirichlet:
    """Each class is divided among the nodes in proportions drawn from Dirichlet(alpha).

    Sizes differ as well as labels. Where a node is left with fewer than `min_examples`, it gets
    random examples of the largest nodes. Yurochkin et al., "Bayesian Nonparametric Federated
    Learning of Neural Networks" (2019), section 4, https://arxiv.org/abs/1905.12022.

    Attributes:
        alpha: near 0 each class lives on few nodes; large is close to iid.
        min_examples: the least that a node gets.
    """

    alpha: float
    min_examples: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.alpha < float("inf")):
            raise ConfigError(f"the alpha of Dirichlet is {self.alpha}; give a number above 0")

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """See `Partitioner.split`; the labels are classes."""
        count = _checked(labels, parts, self.min_examples)
        classes = _classes(labels, self)
        generator = generator_of(seed)
        owner = np.empty(count, np.int64)
        for members in _rows(classes, int(classes.max()) + 1):
            shares = generator.dirichlet(np.full(parts, self.alpha))
            ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
            ends[-1] = len(members)
            sizes = np.diff(np.minimum(ends, len(members)), prepend=0)
            owner[generator.permutation(members)] = np.repeat(np.arange(parts), sizes)
        return _rows(_at_least(owner, parts, self.min_examples, generator), parts)

    def __str__(self) -> str:
        return f"Dirichlet({self.alpha:g}) over labels"


@dataclass(frozen=True)
class Shards:
    """Examples sorted by label are cut into equal shards; each node gets a few at random.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
    (2017), section 3, https://arxiv.org/abs/1602.05629.

    Attributes:
        per_node: shards for each node, about the number of classes that it sees.
        min_examples: the least that a node gets.
    """

    per_node: int = 2
    min_examples: int = 1

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise ConfigError(f"{self.per_node} shards a node are none; give at least 1")

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """See `Partitioner.split`; the labels are classes or numbers."""
        count = _checked(labels, parts, self.min_examples)
        shards = parts * self.per_node
        if count < shards:
            raise ConfigError(
                f"{parts} nodes with {self.per_node} shards each need {shards} examples, but "
                f"there are {count}; use fewer shards or at most {count // self.per_node} nodes"
            )
        generator = generator_of(seed)
        mixed = generator.permutation(count)
        ordered = mixed[np.argsort(_array(labels, self)[mixed], kind="stable")]
        node_of_shard = generator.permutation(shards) % parts
        owner = np.empty(count, np.int64)
        owner[ordered] = node_of_shard[np.arange(count) * shards // count]
        return _rows(_at_least(owner, parts, self.min_examples, generator), parts)

    def __str__(self) -> str:
        return f"shards by label, {self.per_node} a node"


@dataclass(frozen=True)
class BySize:
    """Random examples in unequal amounts.

    Attributes:
        exponent: node i (from 1) gets a share proportional to i ** -exponent; 0 is equal.
        sizes: of the nodes, instead; scaled to cover all examples, exact if they do already.
        min_examples: the least that a node gets.
    """

    exponent: float = 1.0
    sizes: Sequence[float] | None = None
    min_examples: int = 1

    def __post_init__(self) -> None:
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(float(size) for size in self.sizes))
            if not all(0 < size < float("inf") for size in self.sizes):
                raise ConfigError(f"sizes {list(self.sizes)} must all be above 0")
        if not (0 <= self.exponent < float("inf")):
            raise ConfigError(f"the exponent of BySize is {self.exponent}; give 0 or more")

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """See `Partitioner.split`."""
        count = _checked(labels, parts, self.min_examples)
        if self.sizes is not None and len(self.sizes) != parts:
            raise ConfigError(
                f"there are {len(self.sizes)} sizes for {parts} nodes; give one for each"
            )
        shares = np.array(self.sizes or np.arange(1, parts + 1, dtype=np.float64) ** -self.exponent)
        ideal = shares * count / shares.sum()
        sizes = np.floor(ideal).astype(np.int64)
        # The rows that rounding left over go to the largest remainders.
        sizes[np.argsort(sizes - ideal, kind="stable")[: count - sizes.sum()]] += 1
        generator = generator_of(seed)
        owner = np.empty(count, np.int64)
        owner[generator.permutation(count)] = np.repeat(np.arange(parts), sizes)
        return _rows(_at_least(owner, parts, self.min_examples, generator), parts)

    def __str__(self) -> str:
        if self.sizes is not None:
            return f"by size, in given proportions for {len(self.sizes)} nodes"
        return f"by size, power law with exponent {self.exponent:g}"


@runtime_checkable
class DividesGroups(Protocol):
    """A partitioner that is given the data set's groups in place of labels, where it has any."""

    @property
    def by_groups(self) -> bool:
        """Whether it is."""
        ...


@dataclass(frozen=True, eq=False)
class ByKey:
    """All examples of one key (a hospital, a person) stay together on one node.

    With as many nodes as keys, node i has the i-th key in sorted order. With fewer nodes, keys
    are dealt out so that the nodes' sizes come close.

    Attributes:
        keys: of every example, shape (n,); None takes the data set's groups, else its labels.
        min_examples: the least that a node may have; keys are never divided to reach it.
    """

    keys: Labels | None = None
    min_examples: int = 1
    by_groups: ClassVar[bool] = True

    def split(self, labels: Labels | int, parts: int, seed: int = 0) -> list[Rows]:
        """See `Partitioner.split`; the labels are the keys where none were given."""
        count = _checked(labels, parts, self.min_examples)
        keys = _array(labels if self.keys is None else self.keys, self)
        if len(keys) != count:
            raise ConfigError(f"there are {len(keys)} keys for {count} examples; give one for each")
        names, which, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        if len(names) < parts:
            raise ConfigError(
                f"there are {len(names)} different keys for {parts} nodes; "
                f"use at most {len(names)} nodes"
            )
        rows = _rows(deal(sizes, parts, generator_of(seed))[which], parts)
        smallest = min(range(parts), key=lambda part: len(rows[part]))
        if len(rows[smallest]) < self.min_examples:
            raise ConfigError(
                f"by key, node {smallest} has {len(rows[smallest])} examples, below the minimum "
                f"of {self.min_examples}; use fewer nodes or a lower minimum"
            )
        return rows

    def __str__(self) -> str:
        return "by natural key"


def generator_of(*seed: int) -> np.random.Generator:
    """Seeded by one or more numbers, none negative."""
    if min(seed) < 0:
        raise ConfigError(f"the seed is {min(seed)}; give 0 or more")
    return np.random.default_rng(seed)


def _checked(labels: Labels | int, parts: int, least: int) -> int:
    """The number of examples, once it is known to be enough."""
    count = labels if isinstance(labels, int) else len(labels)
    if parts < 1 or least < 1:
        raise ConfigError(f"{parts} nodes with at least {least} examples each: give 1 or more")
    if count < parts * least:
        raise ConfigError(
            f"{count} examples are too few for {parts} nodes with at least {least} each; "
            f"use at most {count // least} nodes"
        )
    return count


def _array(labels: Labels | int, needed_by: Partitioner) -> Array:
    if isinstance(labels, int):
        raise ConfigError(f"the partitioner ({needed_by}) needs labels, not only their number")
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ConfigError(
            f"the partitioner ({needed_by}) needs one label for each example, "
            f"but they have shape {array.shape}"
        )
    return array


def _classes(labels: Labels | int, needed_by: Partitioner) -> Rows:
    """Labels as numbers of classes from 0, shape (n,)."""
    array = _array(labels, needed_by)
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        raise ConfigError(
            f"the partitioner ({needed_by}) needs classes, but the labels are real numbers; "
            "use Shards, BySize or Iid"
        )
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _rows(owner: Rows, parts: int) -> list[Rows]:
    """Row numbers by owner: stable sorting leaves them in order within each."""
    ordered = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=parts)).tolist()
    return [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _at_least(owner: Rows, parts: int, least: int, generator: np.random.Generator) -> Rows:
    """Owners after the largest nodes gave random examples to those with too few."""
    sizes = np.bincount(owner, minlength=parts)
    wanted = np.maximum(least - sizes, 0)
    missing = int(wanted.sum())
    if missing == 0:
        return owner
    # The highest level such that what lies above it suffices.
    low, high = least, int(sizes.max())
    while low < high:
        middle = (low + high + 1) // 2
        enough = int(np.maximum(sizes - middle, 0).sum()) >= missing
        low, high = (middle, high) if enough else (low, middle - 1)
    spare = np.maximum(sizes - low, 0)
    mixed = generator.permutation(len(owner))
    by_owner = mixed[np.argsort(owner[mixed], kind="stable")]
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    given = generator.permutation(by_owner[rank < np.repeat(spare, sizes)])[:missing]
    after = owner.copy()
    after[given] = np.repeat(np.arange(parts), wanted)
    return after


def deal(sizes: Rows, parts: int, generator: np.random.Generator) -> Rows:
    """The node of each key: the largest key first, each to the node with the least so far."""
    if len(sizes) == parts:
        return np.arange(parts)
    mixed = generator.permutation(len(sizes))
    heap = [(0, 0, part) for part in range(parts)]
    node = np.empty(len(sizes), np.int64)
    for key in mixed[np.argsort(-sizes[mixed], kind="stable")].tolist():
        held, keys, part = heap[0]
        node[key] = part
        heapq.heapreplace(heap, (held + int(sizes[key]), keys + 1, part))
    return node
