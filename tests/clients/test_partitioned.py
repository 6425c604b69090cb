"""`Partitioned`: one data set, a part for each node, held-out examples for nobody."""

import pickle

import numpy as np
import pytest
import torch

from umbel.clients.data import datasets
from umbel.clients.data.datasets import DataSet
from umbel.clients.data.examples import Examples, Node
from umbel.clients.data.partition import ByKey, Dirichlet, Iid, Partitioner, Rows
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError


def node(partition: int, partitions: int = 4) -> Node:
    return Node(partition, partitions, {})


def numbered(count: int = 100) -> DataSet:
    """Examples that can be told apart: x is the row's number."""
    x = np.arange(count, dtype=np.float32)[:, None]
    return DataSet("numbered", Examples(x, np.arange(count) % 3), Examples(-x - 1, np.zeros(count)))


def test_nodes_share_the_training_examples_among_themselves() -> None:
    data = Partitioned(numbered(), Dirichlet(0.3), test_fraction=0.25)
    splits = [data(node(part), {}) for part in range(4)]
    own = [np.concatenate([s.train.x, s.test.x]).ravel() for s in splits]
    np.testing.assert_array_equal(np.sort(np.concatenate(own)), np.arange(100))
    for split in splits:
        count = len(split.train) + len(split.test)
        assert abs(len(split.test) - 0.25 * count) <= 0.5
        np.testing.assert_array_equal(split.train.y, split.train.x.ravel() % 3)


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    def rows(seed: int) -> list[np.ndarray]:
        data = Partitioned(numbered(), test_fraction=0.1)
        found = [data(node(part), {"seed": seed}) for part in (3, 0)]
        return [array for split in found for array in (split.train.x, split.test.x)]

    assert all(np.array_equal(a, b) for a, b in zip(rows(1), rows(1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(rows(1), rows(2), strict=True))
    fixed = Partitioned(numbered(), seed=1)
    first = fixed(node(0), {"seed": 8}).train.x
    np.testing.assert_array_equal(first, fixed(node(0), {"seed": 9}).train.x)


def test_a_node_with_little_keeps_nothing_apart() -> None:
    data = Partitioned(numbered(4), test_fraction=0.1)
    assert data(node(0), {}).test is None
    greedy = Partitioned(numbered(4), test_fraction=0.99)
    assert len(greedy(node(0), {}).train) == 1


def test_only_the_nodes_own_rows_are_converted() -> None:
    converted: list[int] = []

    def transform(examples: Examples) -> Examples:
        converted.append(len(examples))
        return datasets.as_vectors(examples)

    data = Partitioned("fashion-mnist", Iid(), transform=transform)
    split = data(node(7, 1_000), {})
    assert converted == [60]
    assert split.train.x.shape == (60, 784)
    assert data.central_test({}).x.shape == (10_000, 784)
    assert data.central_test({}) is data.central_test({})
    assert converted == [60, 10_000]


def test_the_partition_is_computed_once() -> None:
    calls: list[int] = []

    class Counting:
        def split(self, labels: object, parts: int, seed: int = 0) -> list[Rows]:
            calls.append(parts)
            return Iid().split(len(labels), parts, seed)  # type: ignore[arg-type]

    data = Partitioned(numbered(), Counting())
    for part in range(4):
        data(node(part), {"seed": 1})
    assert calls == [4]
    data(node(0, 5), {"seed": 1})
    assert calls == [4, 5]


def test_arrays_of_ones_own() -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    data = Partitioned(arrays=(x, y, x[:2], y[:2]), partitioner=Dirichlet(1.0))
    split = data(node(0, 2), {})
    assert isinstance(split.train.x, torch.Tensor)
    assert len(split.train) + len(data(node(1, 2), {}).train) == 6
    assert len(data.central_test({})) == 2


def test_a_function_gives_the_data_when_they_are_first_needed() -> None:
    calls: list[str] = []

    def mine() -> DataSet:
        calls.append("called")
        return numbered()

    data = Partitioned(mine)
    assert calls == []
    data(node(0), {})
    data.central_test({})
    assert calls == ["called"]


def test_the_partitioner_may_follow_the_options() -> None:
    def chosen(options: Options) -> Partitioner:
        return Dirichlet(float(options["alpha"]))

    data = Partitioned(numbered(), chosen)
    even = [len(rows) for rows in data.rows(2, {"alpha": 1e6})]
    assert max(even) - min(even) <= 3
    assert max(len(rows) for rows in data.rows(2, {"alpha": 1e-6})) >= 66
    assert data.describe({"alpha": 2.0}) == "numbered, Dirichlet(2) over labels"


def test_groups_are_the_natural_key() -> None:
    base = numbered(30)
    groups = np.repeat(["north", "east", "south"], [15, 10, 5])
    data = Partitioned(DataSet("sites", base.train, base.test, groups=groups), ByKey())
    assert [len(rows) for rows in data.rows(3, {})] == [10, 15, 5]  # east, north, south


def test_another_process_gets_the_recipe_not_the_rows() -> None:
    data = Partitioned("digits", Dirichlet(0.5), test_fraction=0.2)
    before = data(node(1), {})
    copied = pickle.dumps(data)
    assert len(copied) < 1_000
    after = pickle.loads(copied)(node(1), {})
    np.testing.assert_array_equal(before.train.x, after.train.x)
    assert data.describe({}) == (
        "digits, Dirichlet(0.5) over labels, 20% of each node kept for its tests"
    )


@pytest.mark.parametrize("partition", [-1, 4])
def test_a_partition_that_is_not_there_is_refused(partition: int) -> None:
    with pytest.raises(ConfigError, match=f"no partition {partition} of 4"):
        Partitioned(numbered())(node(partition), {})


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        Partitioned()
    with pytest.raises(ConfigError, match="exactly one"):
        Partitioned("digits", arrays=(np.zeros(1),) * 4)
    with pytest.raises(ConfigError, match="test_fraction is 1"):
        Partitioned("digits", test_fraction=1.0)
    with pytest.raises(ConfigError, match="gave a dict; return a DataSet"):
        Partitioned(dict)(node(0), {})  # type: ignore[arg-type]
