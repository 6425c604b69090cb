"""`check_partitioner`: the laws of `umbel.clients.data.partition.Partitioner`."""

import copy
from typing import Any

import numpy as np

from umbel.clients.data.partition import Partitioner
from umbel.core.errors import ConfigError
from umbel.core.streams import seeded
from umbel.testing.laws import hold, same


def check_partitioner(partitioner: Partitioner, labels: Any, parts: int = 4) -> None:
    """Fail unless a partitioner keeps its laws on these labels.

    Each example goes to exactly one node, no node is empty, the rows of a node are sorted, the same
    seed gives the same split whatever else was drawn before, the labels are left alone, and too
    few examples are refused.

        check_partitioner(Dirichlet(0.5), np.arange(100) % 10)

    Args:
        partitioner: the one to try.
        labels: of every example, shape (n,), as the partitioner needs them.
        parts: the number of nodes; at least one example for each must be there.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    count, name = len(labels), type(partitioner).__name__
    before = copy.deepcopy(labels)
    for seed in (0, 1, 2**31):
        with seeded(seed + 1):
            rows = partitioner.split(labels, parts, seed)
        with seeded(seed + 2):
            again = partitioner.split(labels, parts, seed)
        _one_split(name, rows, count, parts, seed)
        hold(
            same([np.asarray(r) for r in rows], [np.asarray(r) for r in again]),
            f"{name}: the same seed gives the same split",
            f"seed {seed} gave two different ones",
            "draw every choice from numpy.random.default_rng(seed), and keep nothing on self",
        )
    hold(
        same(before, labels),
        f"{name}: labels are read, never changed",
        "they were changed",
        "work on a copy of them",
    )
    try:
        partitioner.split(labels, count + 1, 0)
    except ConfigError:
        return
    hold(
        False,
        f"{name}: more nodes than examples are refused with a ConfigError",
        f"{count + 1} nodes were given a split of {count} examples",
        "compare the number of examples with parts * min_examples first",
    )


def _one_split(name: str, rows: Any, count: int, parts: int, seed: int) -> None:
    hold(
        len(rows) == parts,
        f"{name}: there is one array of row numbers for each node",
        f"{parts} nodes got {len(rows)} (seed {seed})",
        "return a list of as many arrays as parts",
    )
    for part, own in enumerate(map(np.asarray, rows)):
        hold(
            own.ndim == 1 and len(own) > 0,
            f"{name}: no node is empty",
            f"node {part} has an array of shape {own.shape} (seed {seed})",
            "move examples from the largest nodes, or raise ConfigError",
        )
        hold(
            own.dtype.kind in "iu" and bool(np.all(np.diff(own) > 0)),
            f"{name}: a node's row numbers are whole and sorted, each once",
            f"node {part} has {own[:5].tolist()}... of {own.dtype} (seed {seed})",
            "sort them, and give each row once",
        )
    given = np.concatenate([np.asarray(own) for own in rows])
    times = np.bincount(given[(given >= 0) & (given < count)], minlength=count)
    wrong = np.flatnonzero(times != 1)
    example = int(wrong[0]) if len(wrong) else int(given.max())
    seen = int(times[example]) if len(wrong) else 0
    hold(
        len(wrong) == 0 and len(given) == count,
        f"{name}: every example goes to exactly one node",
        f"example {example} of {count} went to {seen} nodes (seed {seed})"
        if len(wrong)
        else f"there is a row {example} among {count} examples (seed {seed})",
        "divide a permutation of all row numbers",
    )
