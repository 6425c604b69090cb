"""Data at rest as `data` functions: whose rows, in which order, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import umbel
from umbel import ConfigError, Dirichlet, Examples, Node, TorchTrainer
from umbel.clients.at_rest import parquet as stored_parquet
from umbel.clients.at_rest.rows import StoredRows
from umbel.clients.trainers.base import Job

pa = pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")
pq = pytest.importorskip("pyarrow.parquet")
csv = pytest.importorskip("pyarrow.csv")
feather = pytest.importorskip("pyarrow.feather")

USERS = ("ada", "bob", "cyd")
MAKE = {"parquet": umbel.Parquet, "csv": umbel.Csv, "arrow": umbel.Arrow}


def table(rows: int = 600, start: int = 0) -> Any:
    """Rows that can be told apart: `id` is the row's number, the others follow from it."""
    number = np.arange(start, start + rows)
    return pa.table(
        {
            "id": number.astype(np.float32),
            "half": (number / 2).astype(np.float32),
            "user": pa.array([USERS[one % 3] for one in number.tolist()]),
            "y": number % 5,
        }
    )


def write(kind: str, file: Path, rows: Any, group: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(rows, file, row_group_size=group)
    elif kind == "csv":
        csv.write_csv(rows, file)
    else:
        with pa.ipc.new_file(file, rows.schema) as sink:
            sink.write_table(rows, max_chunksize=group)


@pytest.fixture(params=sorted(MAKE))
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[..., Any], Path]:
    """The same 1,200 rows in two files of a format."""
    folder = tmp_path / "rows"
    for number in range(2):
        name = folder / f"part-{number}.{request.param}"
        write(request.param, name, table(start=600 * number))
    return MAKE[request.param], folder


def ids(examples: Any) -> np.ndarray[Any, Any]:
    whole = examples.read() if isinstance(examples, StoredRows) else examples
    np.testing.assert_array_equal(whole.x[:, 1], whole.x[:, 0] / 2)
    np.testing.assert_array_equal(whole.y, whole.x[:, 0] % 5)
    return np.asarray(whole.x[:, 0], np.int64)


def splits(data: Any, nodes: int, options: dict[str, Any] | None = None) -> list[Any]:
    return [data(Node(part, nodes, {}), options or {}) for part in range(nodes)]


COLUMNS: dict[str, Any] = {"x": ("id", "half"), "y": "y"}


def test_every_row_goes_to_one_node_whichever_way_they_are_divided(stored: Any) -> None:
    make, folder = stored
    ways = [
        make(folder, by="user", **COLUMNS),
        make(folder, partitioner=Dirichlet(0.3), **COLUMNS),
        make(folder, partitioner=Dirichlet(0.3), test_fraction=0.2, **COLUMNS),
    ]
    if make is not umbel.Csv:  # of 8 MiB are its pieces
        ways.append(make(folder, **COLUMNS))
    for data in ways:
        for nodes in (2, 3):
            parts = splits(data, nodes)
            own = [
                np.concatenate([ids(s.train), *([ids(s.test)] if s.test else [])]) for s in parts
            ]
            np.testing.assert_array_equal(np.sort(np.concatenate(own)), np.arange(1200))
            assert all(len(one) for one in own)
            if data.test_fraction:
                for split, rows in zip(parts, own, strict=True):
                    assert abs(len(split.test) - 0.2 * len(rows)) <= 0.5 + 1e-9
            if data.by and nodes == 3:
                assert [set((one % 3).tolist()) for one in own] == [{0}, {1}, {2}]


def test_a_node_that_names_its_own_value_gets_it(stored: Any) -> None:
    make, folder = stored
    data = make(folder, by="user", **COLUMNS)
    rows = ids(data(Node(0, 50, {"user": "bob"}), {}).train)
    np.testing.assert_array_equal(rows, np.arange(1, 1200, 3))
    with pytest.raises(ConfigError, match=r"node 0 has no rows: nowhere in .* is user eve"):
        data(Node(0, 50, {"user": "eve"}), {})


def test_the_split_depends_on_the_seed_and_on_nothing_else(stored: Any) -> None:
    make, folder = stored

    def drawn(seed: int) -> list[list[int]]:
        data = make(folder, partitioner=Dirichlet(0.3), test_fraction=0.5, **COLUMNS)
        again = pickle.loads(pickle.dumps(data))
        return [ids(split.test).tolist() for split in splits(again, 2, {"seed": seed})]

    assert drawn(1) == drawn(1) != drawn(2)


def streamed(folder: Path, **more: Any) -> StoredRows:
    """20,000 rows of 16 bytes in 40 row groups, of which a window holds 16 KiB: 1,024 rows."""
    write("parquet", folder / "rows.parquet", table(20_000), group=500)
    data = umbel.Parquet(folder, memory=1 << 16, **COLUMNS, **more)
    found = data(Node(0, 1, {}), {}).train
    assert isinstance(found, StoredRows)
    return found


def test_an_epoch_has_every_row_once_in_another_order(tmp_path: Path) -> None:
    rows = streamed(tmp_path)
    first, again, other = (
        np.concatenate([ids(batch) for batch in rows.batches(128, seed)]) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(np.sort(first), np.arange(20_000))
    in_order = np.concatenate([ids(batch) for batch in rows.batches(128)])
    np.testing.assert_array_equal(in_order, np.arange(20_000))
    # Mixed within windows as well as over them: few neighbours in a file stay neighbours.
    assert np.mean(np.diff(first) == 1) < 0.01
    # Rows asked for out of any order are the right ones, if slowly.
    wanted = np.asarray([19_999, 3, 10_000, 3])
    np.testing.assert_array_equal(ids(rows.take(wanted)), wanted)


def test_a_row_group_larger_than_the_buffer_is_read_in_parts(tmp_path: Path) -> None:
    """Files as pyarrow writes them have a million rows a group."""
    write("parquet", tmp_path / "rows.parquet", table(20_000), group=20_000)
    before, stored_parquet.LARGE = stored_parquet.LARGE, 1
    try:
        rows = umbel.Parquet(tmp_path, memory=1 << 16, **COLUMNS)(Node(0, 1, {}), {}).train
        seen = np.concatenate([ids(batch) for batch in rows.batches(128, 1)])
    finally:
        stored_parquet.LARGE = before
    np.testing.assert_array_equal(np.sort(seen), np.arange(20_000))
    held = max(len(window.x) for window in rows._windows)
    assert held * 16 <= (1 << 16) / 4


def test_windows_of_one_node_at_a_time_are_in_memory(tmp_path: Path) -> None:
    rows = streamed(tmp_path / "a")
    other = streamed(tmp_path / "b")
    list(rows.batches(128, 1))
    assert 0 < len(rows._windows) <= 2
    list(other.batches(128, 1))
    assert not rows._windows


def test_only_a_nodes_own_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted by user: what row groups say of the column is enough, and folders say it by name."""
    whole = table(3000).sort_by("user")
    write("parquet", tmp_path / "sorted" / "rows.parquet", whole, group=1000)
    pa.dataset.write_dataset(
        whole,
        tmp_path / "hive",
        format="parquet",
        partitioning=["user"],
        partitioning_flavor="hive",
    )
    read: list[str] = []
    tables = stored_parquet.RowGroup.tables

    def watched(self: Any, names: tuple[str, ...], size: int) -> Any:
        read.append(self.where)
        return tables(self, names, size)

    monkeypatch.setattr(stored_parquet.RowGroup, "tables", watched)
    for folder, own in (("sorted", "row group 1"), ("hive", "user=bob")):
        read.clear()
        data = umbel.Parquet(tmp_path / folder, by="user", **COLUMNS)
        np.testing.assert_array_equal(
            np.sort(ids(data(Node(0, 9, {"user": "bob"}), {}).train)), np.arange(1, 3000, 3)
        )
        assert read and all(own in where for where in read), read
    assert len(ids(data(Node(2, 3, {}), {}).train)) == 1000


def test_a_path_of_the_nodes_own_is_not_divided(tmp_path: Path) -> None:
    write("csv", tmp_path / "7.csv", table(30))
    data = umbel.Csv(lambda node: tmp_path / f"{node.config['ward']}.csv", **COLUMNS)
    data.check(9, {})  # nobody can know
    assert len(data(Node(4, 9, {"ward": 7}), {}).train) == 30
    with pytest.raises(ConfigError, match=r"there is no .*/8\.csv on .*; correct the path"):
        data(Node(4, 9, {"ward": 8}), {})


def learnt(examples: Any, **settings: Any) -> Any:
    trainer = TorchTrainer(
        lambda: nn.Linear(2, 5), batch_size=250, local_epochs=2, learning_rate=1e-9, **settings
    )
    weights = trainer.initial(trainer.OPTIONS, 0)
    return trainer, weights, trainer.train(weights, examples, Job(1, 3, trainer.OPTIONS))


def test_streamed_rows_train_as_rows_in_memory_do(tmp_path: Path) -> None:
    """Steps so small that the order does not matter: the loss of an epoch is that of the rows."""
    rows = streamed(tmp_path)
    whole = rows.read()
    scaled = Examples(whole.x / 20_000, whole.y)
    rows.transform = lambda batch: Examples(batch.x / 20_000, batch.y)
    trainer, weights, streamed_result = learnt(rows)
    _, _, again = learnt(rows)
    _, _, in_memory = learnt(scaled)
    assert streamed_result.examples == in_memory.examples == 20_000
    assert streamed_result.steps == in_memory.steps == 160
    assert streamed_result.metrics["loss"] == pytest.approx(in_memory.metrics["loss"], abs=1e-5)
    for name, value in streamed_result.weights.parameters.items():
        assert torch.equal(value, again.weights.parameters[name])  # same seed, same bits
    here = trainer.evaluate(weights, rows, trainer.OPTIONS)
    there = trainer.evaluate(weights, scaled, trainer.OPTIONS)
    assert here.examples == 20_000 and here.metrics == pytest.approx(there.metrics, abs=1e-5)


def test_who_needs_all_rows_at_hand_says_so(tmp_path: Path) -> None:
    rows = streamed(tmp_path)
    full = TorchTrainer(lambda: nn.Linear(2, 5), batch_size=0)
    with pytest.raises(ConfigError, match="a batch of all of them was asked for; set batch-size"):
        full.train(full.initial(full.OPTIONS, 0), rows, Job(1, 3, full.OPTIONS))
    private = umbel.PrivateSgd(TorchTrainer(lambda: nn.Linear(2, 5)))
    options = {**private.OPTIONS, "rounds": 1}
    with pytest.raises(ConfigError, match=r"PrivateSgd takes every batch from all .*raise memory"):
        private.train(private.initial(options, 0), rows, Job(1, 3, options))


def test_texts_lists_and_tensors(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "v": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(24.0).reshape(4, 2, 3)),
            "l": pa.array([[1, 2], [3, 4], [5, 6], [7, 8]]),
            "u": pa.array([[1], [3, 4], [5, 6], [7, 8]]),
            "sick": pa.array(["no", "yes", "yes", "no"]).dictionary_encode(),
        }
    )
    pq.write_table(rows, tmp_path / "rows.parquet")
    more: dict[str, Any] = {"y": "sick", "classes": ("no", "yes")}
    tensors = umbel.Parquet(tmp_path, x=("v",), **more)
    assert tensors.read().x.shape == (4, 2, 3) and tensors.labels() == ("no", "yes")
    lists = umbel.Parquet(tmp_path, x=("l",), **more).read()
    np.testing.assert_array_equal(lists.x, [[1, 2], [3, 4], [5, 6], [7, 8]])
    np.testing.assert_array_equal(lists.y, [0, 1, 1, 0])
    with pytest.raises(ConfigError, match=r"lists of the column 'u' are unequal .* row 1 has 2"):
        umbel.Parquet(tmp_path, x=("u",), **more).read()
    with pytest.raises(ConfigError, match=r"target 'sick' is 'yes' .* none of the classes no, ill"):
        umbel.Parquet(tmp_path, x=("l",), y="sick", classes=("no", "ill")).read()
    with pytest.raises(ConfigError, match=r"target 'sick' of .* is a text; name the classes"):
        umbel.Parquet(tmp_path, x=("l",), y="sick").read()


def bad(tmp_path: Path, kind: str, rows: Any, **columns: Any) -> str:
    write(kind, tmp_path / f"rows.{kind}", rows)
    data = MAKE[kind](tmp_path, **{**COLUMNS, **columns})
    with pytest.raises(ConfigError) as error:
        data.check(1, {})
        data(Node(0, 1, {}), {})
    return str(error.value)


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_bad_columns_are_said_by_name(kind: str, tmp_path: Path) -> None:
    assert "has no column 'age'; its columns are id, half, user, y" in bad(
        tmp_path, kind, table(), x=("age",)
    )
    assert "the column 'user' of" in (said := bad(tmp_path, kind, table(), x=("user",)))
    assert "number its categories" in said
    assert "has no column 'ward'" in bad(tmp_path, kind, table(), by="ward")
    empty = table(3).set_column(0, "id", pa.array([1.0, None, 3.0], pa.float32()))
    assert "the column 'id' has 1 empty values in" in bad(tmp_path, kind, empty)


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_files_that_differ_are_said_by_name(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path / f"a.{kind}", table(9))
    other = table(9).set_column(1, "half", pa.array(["x"] * 9))
    said = bad(tmp_path, kind, other)
    assert (f"rows.{kind}" in said and "half" in said) or (kind == "csv" and "does not fit" in said)
    said = bad(tmp_path, kind, table(9).drop_columns(["half"]))
    assert "has no column 'half', which other files of" in said


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_an_empty_file_is_passed_over_and_no_rows_at_all_are_refused(
    kind: str, tmp_path: Path
) -> None:
    write(kind, tmp_path / "rows" / f"empty.{kind}", table(0))
    data = MAKE[kind](tmp_path / "rows", **COLUMNS)
    with pytest.raises(ConfigError, match="has 0 pieces with rows for 1 nodes"):
        data(Node(0, 1, {}), {})
    write(kind, tmp_path / "rows" / f"full.{kind}", table(10))
    assert len(MAKE[kind](tmp_path / "rows", **COLUMNS)(Node(0, 1, {}), {}).train) == 10


def test_more_nodes_than_there_is_to_divide(tmp_path: Path) -> None:
    write("parquet", tmp_path / "rows.parquet", table(600), group=100)
    with pytest.raises(ConfigError, match=r"'user' of .* has 3 values for 4 nodes; use at most 3"):
        umbel.Parquet(tmp_path, by="user", **COLUMNS).check(4, {})
    with pytest.raises(ConfigError, match="has 6 pieces with rows for 7 nodes; use at most 6"):
        umbel.Parquet(tmp_path, **COLUMNS).check(7, {})


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no Parquet at all, whatever the name says")
    for path, said in (
        (tmp_path / "nowhere", "there is no .*nowhere on .*; correct the path"),
        (tmp_path / "empty", "holds no file"),
        (tmp_path / "text.parquet", r"text\.parquet cannot be read"),
        ("gopher://host/rows", "is an address that fsspec does not know"),
    ):
        with pytest.raises(ConfigError, match=said):
            umbel.Parquet(path, **COLUMNS).check(1, {})
    with pytest.raises(ConfigError, match=r"storage has anon, but .* is a path of this machine"):
        umbel.Parquet(tmp_path, storage={"anon": True}, **COLUMNS).check(1, {})
    with pytest.raises(ConfigError, match="is compressed"):
        umbel.Csv(tmp_path / "rows.csv.gz", **COLUMNS).check(1, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "user", "partitioner": Dirichlet(1)}, "give one of them"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"memory": 10}, "memory is 10 bytes"),
        ({"x": "id"}, r"x is a text; give a tuple of names: \('id',\)"),
    ],
)
def test_values_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        umbel.Parquet("rows", **{**COLUMNS, **given})


def test_folders_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(300):
        user, label = USERS[number % 3], ("cat", "dog")[number % 2]
        file = tmp_path / user / label / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((4, 6), number % 256, np.uint8)).save(file)
    data = umbel.ImageFolder(tmp_path, by="folder", channels=1)
    parts = splits(data, 3)
    assert [len(split.train) for split in parts] == [100] * 3
    own = parts[1].train
    assert own.x.shape == (100, 1, 4, 6) and own.x.dtype == np.uint8
    numbers = own.x[:, 0, 0, 0]
    assert set((np.arange(300)[1::3] % 256).tolist()) == set(numbers.tolist())
    np.testing.assert_array_equal(own.y, numbers % 2)  # 256 is even
    scaled = umbel.ImageFolder(tmp_path / "ada", size=(2, 2), partitioner=Dirichlet(1))
    assert sum(len(split.train) for split in splits(scaled, 4)) == 100
    assert splits(scaled, 4)[0].train.x.shape[1:] == (3, 2, 2)
    image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "ada" / "dog" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png has 5 x 5 pixels, the first image 4 x 6; give"):
        umbel.ImageFolder(tmp_path / "ada").read()
    with pytest.raises(ConfigError, match="has the label 'dog', which is none of the classes cat"):
        umbel.ImageFolder(tmp_path / "ada", classes=("cat",)).check(1, {})
    with pytest.raises(ConfigError, match="does not lie as LABEL/image"):
        umbel.ImageFolder(tmp_path).check(1, {})
