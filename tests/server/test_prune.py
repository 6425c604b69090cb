"""Making room: finished runs go, oldest first; everything else stays."""

import os
from pathlib import Path

import pytest

from umbel.core.errors import ConfigError
from umbel.server.output.rundir import RunDirectory
from umbel.server.upkeep.prune import candidates, remove


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four finished runs, the first the oldest; one unfinished; one folder that is no run."""
    for number in range(4):
        run = RunDirectory.create(tmp_path, "app", {}, out=tmp_path / f"run-{number}")
        run.checkpoint_path.mkdir()
        (run.checkpoint_path / "position").write_bytes(b"x" * 1000)
        run.write_result({"rounds": 1})
        os.utime(run.result_path, (1e9 + number, 1e9 + number))
    RunDirectory.create(tmp_path, "app", {}, out=tmp_path / "unfinished")
    (tmp_path / "notes").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run-0")
    return tmp_path


def names(found: list[object]) -> list[str]:
    return [candidate.path.name for candidate in found]  # type: ignore[attr-defined]


def test_the_newest_stay(runs: Path) -> None:
    assert names([*candidates(runs, keep=3)]) == ["run-0"]
    assert names([*candidates(runs, keep=0)]) == ["run-3", "run-2", "run-1", "run-0"]
    assert candidates(runs, keep=4) == []
    assert candidates(runs, keep=0, older_than_days=365 * 100) == []


def test_what_is_removed_is_gone_and_nothing_else(runs: Path) -> None:
    remove(candidates(runs, keep=2))
    left = {path.name for path in runs.iterdir()}
    assert left == {"run-2", "run-3", "unfinished", "notes", "link"}


def test_only_checkpoints(runs: Path) -> None:
    found = candidates(runs, keep=1, checkpoints=True)
    assert [candidate.bytes for candidate in found] == [1000] * 3
    remove(found, checkpoints=True)
    for number in range(3):
        assert RunDirectory(runs / f"run-{number}").result() == {"rounds": 1}
        assert not RunDirectory(runs / f"run-{number}").checkpoint_path.exists()
    assert RunDirectory(runs / "run-3").checkpoint_path.exists()
    assert candidates(runs, keep=1, checkpoints=True) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        candidates(tmp_path / "nowhere", keep=1)
