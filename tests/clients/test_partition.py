"""Partitioners: every example once, nobody empty, always the same."""

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.clients.data import datasets
from umbel.clients.data.partition import ByKey, BySize, Dirichlet, Iid, Partitioner, Shards
from umbel.core.errors import ConfigError

EVERY: list[Partitioner] = [
    Iid(),
    Dirichlet(0.5),
    Dirichlet(1e-8),
    Dirichlet(1e8),
    Shards(1),
    Shards(3),
    BySize(),
    BySize(4.0),
    ByKey(),
]


def is_partition(rows: list[Any], count: int) -> bool:
    """Every row exactly once, sorted within each part."""
    ordered = all((np.diff(part) > 0).all() for part in rows)
    return ordered and np.array_equal(np.sort(np.concatenate(rows)), np.arange(count))


@given(
    which=st.sampled_from(["iid", "dirichlet", "shards", "size", "sizes", "key"]),
    labels=st.lists(st.integers(-3, 8), min_size=1, max_size=80),
    data=st.data(),
)
def test_every_example_goes_to_exactly_one_node_and_no_node_is_empty(
    which: str, labels: list[int], data: st.DataObject
) -> None:
    most = len(set(labels)) if which == "key" else len(labels)
    parts = data.draw(st.integers(1, most))
    least = 1 if which == "key" else data.draw(st.integers(1, len(labels) // parts))
    sizes = st.lists(st.floats(1e-3, 1e3), min_size=parts, max_size=parts)
    partitioner: Partitioner = {
        "iid": lambda: Iid(least),
        "dirichlet": lambda: Dirichlet(data.draw(st.floats(1e-9, 1e9)), least),
        "shards": lambda: Shards(data.draw(st.integers(1, len(labels) // parts)), least),
        "size": lambda: BySize(data.draw(st.floats(0, 10)), min_examples=least),
        "sizes": lambda: BySize(sizes=data.draw(sizes), min_examples=least),
        "key": lambda: ByKey(min_examples=least),
    }[which]()
    seed = data.draw(st.integers(0, 2**32))
    rows = partitioner.split(np.array(labels), parts, seed)
    assert len(rows) == parts
    assert min(len(part) for part in rows) >= least
    assert is_partition(rows, len(labels))
    again = partitioner.split(labels, parts, seed)
    assert all(np.array_equal(one, two) for one, two in zip(rows, again, strict=True))


@pytest.mark.parametrize("partitioner", EVERY, ids=str)
def test_another_seed_is_another_split(partitioner: Partitioner) -> None:
    labels = np.arange(600) % 12
    one, two = (partitioner.split(labels, 6, seed) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("partitioner", "digest"),
    [
        (Iid(), "e02767c1ea93"),
        (Dirichlet(0.5), "b886e75a238c"),
        (Shards(2), "b5a10767c15e"),
        (BySize(), "8d586f325e38"),
        (ByKey(), "7a95c9e252ed"),
    ],
    ids=lambda value: str(value),
)
def test_the_split_of_a_seed_never_changes(partitioner: Partitioner, digest: str) -> None:
    """In another process, next year: old runs can be repeated."""
    rows = partitioner.split(np.arange(300) * 7 % 10, 4, seed=5)
    text = repr([part.tolist() for part in rows])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest


def test_iid_sizes_differ_by_one_at_most() -> None:
    assert {len(part) for part in Iid().split(103, 10)} == {10, 11}


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """E[sum of squares] = (alpha + 1) / (parts alpha + 1) for each class, section 49.1 of
    Johnson, Kotz and Balakrishnan's Continuous Multivariate Distributions; 400 classes, a fixed
    seed, six standard errors."""
    parts, classes, each = 10, 400, 500
    labels = np.repeat(np.arange(classes), each)
    for alpha in (0.1, 1.0, 10.0):
        rows = Dirichlet(alpha).split(labels, parts, seed=3)
        counts = np.stack([np.bincount(labels[part], minlength=classes) for part in rows])
        squares = ((counts / each) ** 2).sum(0)
        error = squares.std() / np.sqrt(classes)
        assert abs(squares.mean() - (alpha + 1) / (parts * alpha + 1)) < 6 * error + 1 / each


def test_dirichlet_goes_from_single_classes_to_iid() -> None:
    labels = np.repeat(np.arange(10), 500)
    counts = {
        alpha: np.stack(
            [np.bincount(labels[p], minlength=10) for p in Dirichlet(alpha).split(labels, 5)]
        )
        for alpha in (1e-6, 1e6)
    }
    assert (counts[1e-6].max(0) >= 499).all()  # every class lives on one node
    assert (abs(counts[1e6] - 100) <= 2).all()


def test_the_needy_are_fed_by_the_largest_only() -> None:
    labels = np.repeat(np.arange(10), 500)
    free = Dirichlet(1e-6).split(labels, 50, seed=1)
    fair = Dirichlet(1e-6, min_examples=20).split(labels, 50, seed=1)
    before, after = (np.array([len(part) for part in rows]) for rows in (free, fair))
    assert (after[before < 20] == 20).all()
    assert after.max() <= before.max()
    richer = before[before > 20]
    assert (np.sort(after[before > 20]) <= np.sort(richer)).all()


def test_shards_show_a_node_few_classes() -> None:
    labels = np.tile(np.arange(10), 600)
    for part in Shards(2).split(labels, 100, seed=0):
        assert len(part) == 60
        assert len(np.unique(labels[part])) <= 2


def test_sizes_are_exact_where_they_cover_the_examples() -> None:
    sizes = [250, 150, 90, 50, 29]
    assert [len(part) for part in BySize(sizes=sizes).split(569, 5)] == sizes
    assert [len(part) for part in BySize(sizes=[3, 1]).split(100, 2)] == [75, 25]


def test_sizes_follow_the_power_law() -> None:
    sizes = [len(part) for part in BySize(1.0).split(11_000, 10)]
    harmonic = sum(1 / rank for rank in range(1, 11))
    assert sizes == pytest.approx([11_000 / harmonic / rank for rank in range(1, 11)], abs=1)
    assert {len(part) for part in BySize(0).split(100, 4)} == {25}


def test_keys_stay_together() -> None:
    keys = np.array(list("bbbbaaacccdde"))
    one_each = ByKey(keys).split(13, 5)
    assert [set(keys[part]) for part in one_each] == [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]
    two = ByKey(keys).split(np.zeros(13), 2)
    assert not set(keys[two[0]]) & set(keys[two[1]])
    assert sorted(len(part) for part in two) == [6, 7]


def test_a_node_for_each_of_sixty_thousand_examples() -> None:
    labels = datasets.load("fashion-mnist").train.y
    for partitioner in (Iid(), Dirichlet(0.5), Shards(1), BySize()):
        rows = partitioner.split(labels, 60_000, seed=1)
        assert {len(part) for part in rows} == {1}
        assert len(np.unique(np.concatenate(rows))) == 60_000


@pytest.mark.parametrize("partitioner", EVERY, ids=str)
def test_more_nodes_than_examples_are_refused(partitioner: Partitioner) -> None:
    with pytest.raises(ConfigError, match=r"10 examples are too few for 11 nodes .* at most 10"):
        partitioner.split(np.arange(10) % 3, 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Iid(6).split(10, 2), "at least 6 each; use at most 1 nodes"),
        (lambda: Iid().split(10, 0), "0 nodes"),
        (lambda: Iid(0).split(10, 1), "at least 0"),
        (lambda: Iid().split(10, 2, -1), "seed is -1"),
        (lambda: Dirichlet(0.0), "alpha of Dirichlet is 0"),
        (lambda: Dirichlet(float("nan")), "alpha of Dirichlet is nan"),
        (lambda: Dirichlet(1).split(10, 2), "needs labels, not only their number"),
        (lambda: Dirichlet(1).split(np.array([0.5, 1.5]), 2), "labels are real numbers"),
        (lambda: Dirichlet(1).split(np.zeros((4, 2)), 2), r"shape \(4, 2\)"),
        (lambda: Shards(0), "give at least 1"),
        (lambda: Shards(2).split(np.zeros(10), 6), "need 12 examples.* at most 5 nodes"),
        (lambda: BySize(-1.0), "exponent of BySize is -1"),
        (lambda: BySize(sizes=[1, 0]), "must all be above 0"),
        (lambda: BySize(sizes=[1, 2]).split(10, 3), "2 sizes for 3 nodes"),
        (lambda: ByKey([1, 2]).split(3, 1), "2 keys for 3 examples"),
        (lambda: ByKey([1, 1, 2]).split(3, 3), "2 different keys for 3 nodes; use at most 2"),
        (lambda: ByKey([1, 1, 1, 2], 2).split(4, 2), "node 1 has 1 examples"),
    ],
)
def test_what_does_not_fit_is_said_with_its_cure(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("partitioner", "text"),
    [
        (Iid(), "iid"),
        (Dirichlet(0.5), "Dirichlet(0.5) over labels"),
        (Shards(), "shards by label, 2 a node"),
        (BySize(), "by size, power law with exponent 1"),
        (BySize(sizes=[1, 2]), "by size, in given proportions for 2 nodes"),
        (ByKey(), "by natural key"),
    ],
)
def test_a_partitioner_describes_itself(partitioner: Partitioner, text: str) -> None:
    assert str(partitioner) == text
