"""The example on stored data: written, trained on, and refused before the first round."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.fakes import WarmCommand
from umbel.opening import example

pytest.importorskip("pyarrow")


def test_wards_train_on_their_own_records(
    umbel: WarmCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, place = example("wards"), tmp_path / "wards-data"
    monkeypatch.setattr(sys, "argv", ["write.py", str(place)])
    runpy.run_path(str(app / "write.py"))
    run = ("run", app, "-c", "rounds=2", "--workers")
    models = []
    for number in (0, 1):
        out = tmp_path / f"run-{number}"
        done = umbel.command(*run, number * 2, "--out", out, "--json", cwd=tmp_path)
        assert done.status == 0, done.err
        models.append((out / "model.safetensors").read_bytes())
        assert done.result["metrics"]["accuracy"] > 0.8
    assert models[0] == models[1]  # streamed by one process and by two: the same bits
    done = umbel.command(*run, 0, "--nodes", "5", "--out", tmp_path / "five", cwd=tmp_path)
    assert done.status != 0 and "has 4 values for 5 nodes; use at most 4 nodes" in done.err
    assert "round 1:" not in done.err and "Traceback" not in done.err
    assert not (tmp_path / "five").exists()
