"""Data sets by name: real contents, checked, cached, shared, and clear errors without them."""

import gzip
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from umbel.clients.data import datasets, fashion_mnist
from umbel.clients.data.datasets import CATALOGUE, DataSet
from umbel.clients.data.examples import Examples
from umbel.clients.data.fashion_mnist import FILES
from umbel.core.errors import ConfigError


@pytest.fixture(scope="module")
def fashion() -> DataSet:
    """The real thing, fetched at most once on a machine; fails where it cannot be had."""
    return datasets.load("fashion-mnist")


@pytest.fixture(scope="module")
def plain(fashion: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files as they were published, not compressed."""
    folder = tmp_path_factory.mktemp("plain")
    arrays = (fashion.train.x, fashion.train.y, fashion.test.x, fashion.test.y)
    for file, array in zip(FILES.values(), arrays, strict=True):
        (folder / file.idx).write_bytes(file.header + np.asarray(array).tobytes())
    return folder


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files compressed."""
    folder = tmp_path_factory.mktemp("packed")
    for file in plain.iterdir():
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No apt, no network, no system folder: what is left is what a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "system")


@pytest.fixture
def cache(plain: Path, tmp_path: Path) -> Path:
    """A cache in which someone placed the files by hand."""
    folder = tmp_path / "cache" / "fashion-mnist"
    folder.mkdir(parents=True)
    for file in plain.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder.parent


def test_fashion_mnist_is_the_published_one(fashion: DataSet) -> None:
    assert fashion_mnist.damaged(datasets.cache_folder() / "fashion-mnist") == []
    assert fashion.train.x.shape == (60_000, 28, 28)
    assert fashion.test.x.shape == (10_000, 28, 28)
    assert np.bincount(np.asarray(fashion.train.y)).tolist() == [6_000] * 10
    assert fashion.classes is not None
    assert len(fashion.classes) == 10


def test_fashion_mnist_is_mapped_and_loaded_once(fashion: DataSet) -> None:
    assert isinstance(fashion.train.x, np.memmap)
    assert not fashion.train.x.flags.writeable
    assert datasets.load("fashion-mnist") is fashion


def test_images_are_converted_for_the_chosen_rows_only(fashion: DataSet) -> None:
    rows = np.array([5, 7, 59_999])
    images = fashion.prepare(fashion.train.take(rows))
    assert images.x.shape == (3, 1, 28, 28)
    assert images.x.dtype == np.float32
    assert images.y.dtype == np.int64
    expected = (np.asarray(fashion.train.x[7], np.float64) / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(images.x[1, 0], expected, atol=1e-5)
    vectors = datasets.as_vectors(fashion.train.take(rows))
    np.testing.assert_array_equal(vectors.x, images.x.reshape(3, 784))


def test_pixels_are_scaled_by_their_own_mean_and_deviation(fashion: DataSet) -> None:
    pixels = np.asarray(fashion.train.x[::3]) / 255
    assert abs(pixels.mean() - datasets.FASHION_MEAN) < 2e-3
    assert abs(pixels.std() - datasets.FASHION_STD) < 2e-3


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "fashion-mnist"])
def test_tabular_sets_are_what_the_catalogue_says(name: str) -> None:
    data, entry = datasets.load(name), CATALOGUE[name]
    assert (len(data.train), len(data.test), data.task) == (entry.train, entry.test, entry.task)
    assert data.train.x.dtype == np.float32
    assert datasets.place(name) == "scikit-learn"
    if name == "digits":
        assert (data.train.x.min(), data.train.x.max()) == (0, 1)
    else:
        np.testing.assert_allclose(data.train.x.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(data.train.x.std(0), 1, atol=1e-5)
    if entry.task == "classification":
        assert data.classes is not None
        shares = [
            np.bincount(part.y, minlength=len(data.classes)) / len(part)
            for part in (data.train, data.test)
        ]
        np.testing.assert_allclose(*shares, atol=0.02)


def test_tabular_split_is_fixed() -> None:
    train = datasets.load("breast-cancer").train
    datasets._from_scikit_learn.cache_clear()
    again = datasets.load("breast-cancer").train
    assert again is not train
    np.testing.assert_array_equal(again.x, train.x)
    np.testing.assert_array_equal(again.y, train.y)


@pytest.mark.parametrize(
    ("wrong", "close"), [("fashon-mnist", "fashion-mnist"), ("Breast_Cancer", "breast-cancer")]
)
def test_an_unknown_name_is_answered_with_the_closest(wrong: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {close}"):
        datasets.load(wrong)


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"all that there are: digits, .*fashion-mnist"):
        datasets.load("zzz")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert datasets.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("UMBEL_CACHE")
    assert datasets.cache_folder() == Path("/shared/umbel")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/someone")
    assert datasets.cache_folder() == Path("/home/someone/.cache/umbel")


@pytest.mark.usefixtures("alone")
def test_files_placed_by_hand_are_taken(cache: Path, fashion: DataSet) -> None:
    assert datasets.place("fashion-mnist", cache=cache) is None
    data = datasets.load("fashion-mnist", cache=cache)
    np.testing.assert_array_equal(data.test.x, fashion.test.x)
    assert datasets.place("fashion-mnist", cache=cache) == str(cache / "fashion-mnist")
    leftovers = [path.name for path in (cache / "fashion-mnist").glob(".*")]
    assert leftovers == [".lock"]


@pytest.mark.usefixtures("alone")
def test_a_cut_cache_file_is_made_again(cache: Path) -> None:
    datasets.load("fashion-mnist", cache=cache)
    cut = cache / "fashion-mnist" / "test-images.npy"
    cut.write_bytes(cut.read_bytes()[:1_000])
    assert datasets.place("fashion-mnist", cache=cache) is None
    datasets.load("fashion-mnist", cache=cache)
    assert fashion_mnist.damaged(cache / "fashion-mnist") == []


@pytest.mark.usefixtures("alone")
def test_fetch_notices_a_changed_byte_and_repairs_it(cache: Path) -> None:
    datasets.fetch("fashion-mnist", cache=cache)
    changed = cache / "fashion-mnist" / "test-labels.npy"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert fashion_mnist.damaged(cache / "fashion-mnist") == ["test-labels.npy"]
    datasets.fetch("fashion-mnist", cache=cache)
    assert fashion_mnist.damaged(cache / "fashion-mnist") == []


@pytest.mark.usefixtures("alone")
def test_a_damaged_source_is_named_and_nothing_is_cached(cache: Path) -> None:
    path = cache / "fashion-mnist" / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # a link to a file that other tests read
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="t10k-labels-idx1-ubyte is damaged: its SHA-256"):
        datasets.load("fashion-mnist", cache=cache)
    assert not list((cache / "fashion-mnist").glob("*.npy"))


@pytest.mark.usefixtures("alone")
def test_without_any_source_the_cure_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        datasets.load("fashion-mnist", cache=tmp_path)
    assert "127.0.0.1:9" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert f"train-images-idx3-ubyte.gz from a machine that has them into {tmp_path}" in str(
        caught.value
    ).replace(
        ", train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz", ""
    )


@pytest.mark.usefixtures("alone")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written .* set UMBEL_CACHE"):
        datasets.load("fashion-mnist", cache=tmp_path / "file")


@pytest.fixture
def mirror(packed: Path) -> Iterator[str]:
    """The compressed files on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(packed))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("alone")
def test_files_come_over_the_web_after_a_dead_mirror(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/", mirror))
    seen: list[float] = []
    data = datasets.load(
        "fashion-mnist", cache=tmp_path, progress=lambda _, done: seen.append(done)
    )
    assert len(data.train) == 60_000
    assert seen[-1] > 0.9
    assert max(seen) <= 1
    assert fashion_mnist.damaged(tmp_path / "fashion-mnist") == []


def test_processes_that_come_together_share_one_cache(cache: Path) -> None:
    folder = cache / "fashion-mnist"
    program = (
        "from pathlib import Path; from umbel.clients.data.fashion_mnist import ensure;"
        f"print(ensure(Path({str(folder)!r}), lambda *_: None)['test-images'].sum())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    sums = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(sums) == 1
    assert fashion_mnist.damaged(cache / "fashion-mnist") == []


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is another system's")
def test_apt_is_asked_before_the_web(tmp_path: Path) -> None:
    order = list(fashion_mnist.sources(tmp_path))
    assert order[:3] == [str(tmp_path), str(fashion_mnist.SYSTEM), "apt-get"]
    assert len(order) == 3 + len(fashion_mnist.MIRRORS)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is another system's")
def test_a_dead_network_makes_apt_give_up_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt.conf").write_text('Acquire::http::Proxy "http://127.0.0.1:9";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(fashion_mnist.SourceError, match=r"Failed to fetch|Unable to locate"):
        fashion_mnist._from_apt(tmp_path, lambda *_: None)


def test_groups_must_be_as_many_as_the_examples() -> None:
    few = Examples(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(ConfigError, match="2 groups for 3 training examples"):
        DataSet("mine", few, few, groups=np.array([0, 1]))
