"""`umbel runs`: what it says of runs that are at work, that ended, that were killed or damaged."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes import APPS, WarmCommand
from umbel.core.errors import ConfigError
from umbel.core.lock import locked
from umbel.server.output.flower_run import app_name, asked_from
from umbel.server.output.listing import listed, note, noted
from umbel.server.output.rundir import LOCK, RunDirectory


def run_of(folder: Path, app: str, rounds: int, *, ended: bool = True) -> RunDirectory:
    """A run as an engine leaves it, with so many rounds."""
    started = f"2026-01-0{1 + len(list(folder.glob('*')))}T00:00:00+00:00"
    run = RunDirectory.create(folder, app, {"app": app, "engine": "embedded", "started": started})
    for number in range(1, rounds + 1):
        metrics = {"accuracy": number / 10}
        run.append_round({"round": number, "metrics": metrics, "epsilon": None})
    if ended:
        found = {"rounds": rounds, "metrics": {"accuracy": 0.9}, "epsilon": 2.0, "delta": 1e-5}
        run.write_result({"run": str(run.path), **found, "stopped": "rounds", "seconds": 1.5})
    return run


def test_a_line_says_where_a_run_stands_and_what_it_has_reached(tmp_path: Path) -> None:
    ended = run_of(tmp_path, "one", 3)
    killed = run_of(tmp_path, "two", 2, ended=False)
    (tmp_path / "notes").mkdir()  # no run
    first, second = listed([tmp_path])
    assert (first["run"], first["state"], first["app"]) == (str(ended.path), "finished", "one")
    assert (first["rounds"], first["accuracy"], first["epsilon"]) == (3, 0.9, 2.0)
    assert (second["run"], second["state"]) == (str(killed.path), "unfinished")
    assert (second["rounds"], second["accuracy"], second["epsilon"]) == (2, 0.2, None)
    with locked(killed.path / LOCK, "busy"):
        assert [line["state"] for line in listed([tmp_path])] == ["finished", "running"]
    assert [line["state"] for line in listed([tmp_path])] == ["finished", "unfinished"]


def test_a_folder_is_of_runs_or_a_coordinators_or_a_run_itself(tmp_path: Path) -> None:
    run = run_of(tmp_path / "runs", "one", 1)
    for folder in (tmp_path, tmp_path / "runs", run.path):
        assert [line["run"] for line in listed([folder])] == [str(run.path)]
    assert len(listed([tmp_path, tmp_path / "runs"])) == 1, "the same run is listed once"
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; give one that holds"):
        listed([tmp_path / "nowhere"])


def test_a_damaged_run_is_named_and_hides_no_other(tmp_path: Path) -> None:
    run_of(tmp_path, "one", 1)
    damaged = run_of(tmp_path, "two", 1)
    damaged.config_path.write_text("{")
    states = {line["run"]: line["state"] for line in listed([tmp_path])}
    assert states.pop(str(damaged.path)) == "damaged"
    assert list(states.values()) == ["finished"]


def test_runs_of_flowers_processes_are_remembered_while_they_are_there(tmp_path: Path) -> None:
    one, two = run_of(tmp_path, "one", 1), run_of(tmp_path, "two", 1)
    for run in (one, two, one):
        note(run.path)
    assert noted() == [one.path, two.path]
    one.config_path.unlink()
    one.metrics_path.unlink()
    assert noted() == [two.path]


def test_the_command_prints_a_table_and_strict_json(umbel: WarmCommand, tmp_path: Path) -> None:
    nothing = umbel.command("runs", cwd=tmp_path)
    assert (nothing.status, nothing.out) == (0, "no runs in runs/; make one with: umbel run\n")
    run_of(tmp_path / "runs", "one", 3)
    run_of(tmp_path / "runs", "two", 2, ended=False)
    shown = umbel.command("runs", cwd=tmp_path).out.splitlines()
    titles = ["run", "state", "app", "engine", "rounds", "accuracy", "epsilon"]
    assert shown[0].split() == titles
    assert shown[1].split()[1:] == ["finished", "one", "embedded", "3", "90.0%", "2"]
    assert shown[2].split()[1:] == ["unfinished", "two", "embedded", "2", "20.0%", "-"]
    found = json.loads(umbel.command("runs", "--json", cwd=tmp_path).out)
    assert [line["app"] for line in found["runs"]] == ["one", "two"]
    missing = umbel.command("runs", "nowhere", cwd=tmp_path)
    assert (missing.status, missing.err.count("\n")) == (2, 1)


@contextmanager
def flwr_run(script: Path, folder: Path, *words: str) -> Iterator[None]:
    """A process that looks like somebody's `flwr run`, and waits."""
    script.write_text("import sys; print('up', flush=True); sys.stdin.read()")
    command = [sys.executable, str(script), "run", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield
        finally:
            process.communicate()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are seen in /proc")
def test_flower_runs_land_in_the_folder_of_the_flwr_run_that_waits(tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.mkdir()
    script = tmp_path / "flwr"
    assert asked_from("slope") is None
    with flwr_run(script, user, str(APPS / "slope"), "--stream"):
        assert asked_from("slope") == user
        assert asked_from("plain") is None, "somebody else's app"
    with flwr_run(script, APPS / "slope"):
        assert asked_from("slope") == APPS / "slope", "flwr run takes the folder it is typed in"
    assert asked_from("slope") is None


def test_the_apps_name_is_read_from_the_copy_that_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", ["/nowhere", str(APPS / "slope")])
    assert app_name() == "slope"
    monkeypatch.setattr(sys, "path", [str(APPS)])
    assert app_name() is None
