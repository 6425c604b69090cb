"""Work for other machines: by digest, unpacked once, refused where versions differ."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import APPS
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.server.pools import shipping
from umbel.server.pools.base import Work
from umbel.server.pools.shipping import Shipment, shipped


@pytest.fixture
def shipment() -> Shipment:
    return pickle.loads(pickle.dumps(shipped(Work(APPS / "digits", {"seed": 1}, 3))))


def test_where_the_folder_is_the_same_it_is_used(shipment: Shipment) -> None:
    assert shipment.unpacked().app == APPS / "digits"


def test_elsewhere_the_files_are_unpacked_once(
    shipment: Shipment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping.tempfile, "gettempdir", lambda: str(tmp_path))
    away = replace(shipment, path="/nowhere/digits")
    app = away.unpacked().app
    assert isinstance(app, Path) and tmp_path in app.parents
    assert open_app(app).digest() == shipment.digest
    made = (app / "task.py").stat().st_mtime_ns
    assert away.unpacked().app == app and (app / "task.py").stat().st_mtime_ns == made
    changed = {**shipment.files, "more.csv": b"1,2\n"}
    assert replace(away, files=changed).unpacked().app != app


def test_a_folder_that_has_changed_there_is_not_used(
    shipment: Shipment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping.tempfile, "gettempdir", lambda: str(tmp_path))
    other = tmp_path / "digits"
    other.mkdir()
    for name, data in shipment.files.items():
        (other / name).write_bytes(data)
    moved = replace(shipment, path=str(other))
    assert moved.unpacked().app == other
    (other / "task.py").write_text("federation = None\n")
    assert moved.unpacked().app != other


def test_other_versions_are_refused(shipment: Shipment) -> None:
    other = replace(shipment, versions={**shipment.versions, "torch": "1.0"})
    with pytest.raises(ConfigError, match=r"has torch .* here and 1\.0 at the coordinator"):
        other.unpacked()


def test_a_folder_full_of_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "LARGEST_APP", 1 << 20)
    for file in (APPS / "digits").glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(ConfigError, match="more than 1 MiB, which is too much to send"):
        shipped(Work(tmp_path, {}, 1))
    (tmp_path / "data.bin").rename(tmp_path / ".data.bin")
    assert "data.bin" not in " ".join(shipped(Work(tmp_path, {}, 1)).files)


def test_the_log_stays_at_the_coordinator(tmp_path: Path) -> None:
    work = Work(APPS / "digits", {}, 1, log=tmp_path / "log.txt")
    assert shipped(work).work.log is None
