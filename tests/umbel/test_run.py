"""A whole run: killed at any instant and resumed, stopped, and the same on any workers."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fakes import APPS, Ended, WarmCommand
from umbel.core.lock import locked
from umbel.server.output.rundir import RunDirectory

OPTIONS = {"rounds": 6, "optimizer": "fedadam", "server-learning-rate": 0.02}
KEPT = ("round", "metrics", "train", "federated", "clients", "failed", "bytes_up", "bytes_down")


def trace(run: Path) -> list[dict[str, Any]]:
    """What a run wrote down, without the clock."""
    return [{key: line.get(key) for key in KEPT} for line in RunDirectory.open(run).rounds()]


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits and wrote the same numbers."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert list(first) == list(second)
    bits = all(first[k].numpy().tobytes() == second[k].numpy().tobytes() for k in first)
    nodes = (one / "nodes.jsonl").read_bytes() == (other / "nodes.jsonl").read_bytes()
    return bits and nodes and trace(one) == trace(other)


@pytest.fixture(scope="module")
def whole(umbel: WarmCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that all others must equal."""
    where = tmp_path_factory.mktemp("whole")
    ended = umbel.run(cwd=where, app=APPS / "digits", options=OPTIONS, workers=0, out=where / "run")
    assert ended.status == 0, ended.err
    return where / "run"


def begin(umbel: WarmCommand, where: Path, **more: Any) -> Ended:
    keywords = {"app": APPS / "digits", "options": OPTIONS, "workers": 0, "out": where / "run"}
    return umbel.run(cwd=where, **{**keywords, **more})


def resume(umbel: WarmCommand, where: Path, **more: Any) -> Ended:
    return umbel.run(cwd=where, resume=where / "run", **{"workers": 0, **more})


CHECKPOINT, RUNDIR = "umbel.server.checkpoint", "umbel.server.output.rundir:RunDirectory"
DEATHS = {
    "before the first line": (f"{RUNDIR}.append_round", 1, "before"),
    "before the first checkpoint": (f"{CHECKPOINT}:save", 1, "before"),
    "with the nodes of the first checkpoint saved": (f"{CHECKPOINT}:_save_nodes", 1, "after"),
    "with the nodes of the fourth saved": (f"{CHECKPOINT}:_save_nodes", 4, "after"),
    "with the position written but not in place": (f"{CHECKPOINT}:save_file", 3, "after"),
    "between line and checkpoint": (f"{RUNDIR}.append_round", 5, "after"),
    "in the middle of training": ("umbel.clients.handler:ClientHandler.train", 11, "before"),
    "before the model is written": (f"{RUNDIR}.write_model", 1, "before"),
}


@pytest.mark.parametrize("when", DEATHS)
def test_a_run_killed_at_any_instant_ends_like_one_that_was_not(
    when: str, umbel: WarmCommand, whole: Path, tmp_path: Path
) -> None:
    killed = begin(umbel, tmp_path, deaths=[DEATHS[when]])
    assert killed.status == -signal.SIGKILL, killed.err
    ended = resume(umbel, tmp_path)
    assert ended.status == 0, ended.err
    assert ended.result["rounds"] == OPTIONS["rounds"]
    assert same(whole, tmp_path / "run")


@pytest.mark.parametrize("method", ["scaffold", "ditto"])
def test_what_nodes_remember_of_a_method_survives_a_kill(
    method: str, umbel: WarmCommand, tmp_path: Path
) -> None:
    options = {"rounds": 5, "method": method}
    begun = begin(umbel, tmp_path, options=options, out=tmp_path / "whole")
    assert begun.status == 0, begun.err
    death = DEATHS["with the nodes of the fourth saved"]
    assert begin(umbel, tmp_path, options=options, deaths=[death]).status == -signal.SIGKILL
    ended = resume(umbel, tmp_path)
    assert ended.status == 0, ended.err
    assert same(tmp_path / "whole", tmp_path / "run")


def test_a_run_killed_again_and_again(umbel: WarmCommand, whole: Path, tmp_path: Path) -> None:
    deaths = [DEATHS["with the nodes of the first checkpoint saved"]]
    assert begin(umbel, tmp_path, deaths=deaths).status == -signal.SIGKILL
    for _ in range(3):
        where = (f"{CHECKPOINT}:_save_nodes", 2, "after")
        assert resume(umbel, tmp_path, deaths=[where]).status == -signal.SIGKILL
    assert resume(umbel, tmp_path).status == 0
    assert same(whole, tmp_path / "run")


def test_a_run_killed_from_outside_while_it_writes(
    umbel: WarmCommand, whole: Path, tmp_path: Path
) -> None:
    def kill(pid: int) -> None:
        for _ in lines_of(tmp_path / "run" / "metrics.jsonl", 3):
            pass
        os.kill(pid, signal.SIGKILL)

    killed = begin(umbel, tmp_path, options={**OPTIONS, "rounds": 500}, during=kill)
    assert killed.status == -signal.SIGKILL
    done = RunDirectory.open(tmp_path / "run").rounds()[-1]["round"]
    assert resume(umbel, tmp_path, options={"rounds": done + 2}).status == 0
    lines = trace(tmp_path / "run")
    assert [line["round"] for line in lines] == list(range(done + 3))
    assert [line["train"] for line in lines[:4]] == [line["train"] for line in trace(whole)[:4]]


def lines_of(file: Path, count: int) -> Iterator[int]:
    """Look at a file until it has so many lines."""
    seen, deadline = 0, time.monotonic() + 60
    while seen < count and time.monotonic() < deadline:
        seen = file.read_bytes().count(b"\n") if file.is_file() else 0
        yield seen
        time.sleep(0.005)
    assert seen >= count, "the run did not get there within a minute"


def test_a_finished_run_may_be_resumed_to_more_rounds(
    umbel: WarmCommand, whole: Path, tmp_path: Path
) -> None:
    assert begin(umbel, tmp_path, options={**OPTIONS, "rounds": 4}).status == 0
    ended = resume(umbel, tmp_path, options={"rounds": 6})
    assert ended.status == 0, ended.err
    one, other = (load_file(p / "model.safetensors") for p in (whole, tmp_path / "run"))
    assert all(one[k].numpy().tobytes() == other[k].numpy().tobytes() for k in one)
    again = resume(umbel, tmp_path, options={"rounds": 6})
    assert again.result["metrics"] == ended.result["metrics"]


def test_a_run_has_one_process_at_a_time(umbel: WarmCommand, tmp_path: Path) -> None:
    assert begin(umbel, tmp_path, options={**OPTIONS, "rounds": 2}).status == 0
    with locked(tmp_path / "run" / ".lock", "held by the test"):
        ended = resume(umbel, tmp_path, options={"rounds": 3})
    assert ended.status and "ConfigError: another process is at work" in ended.err, ended.err
    assert resume(umbel, tmp_path, options={"rounds": 3}).status == 0


def test_worker_processes_change_nothing(umbel: WarmCommand, whole: Path, tmp_path: Path) -> None:
    ended = begin(umbel, tmp_path, workers=2)
    assert ended.status == 0, ended.err
    assert same(whole, tmp_path / "run")


def test_another_seed_is_another_run(umbel: WarmCommand, whole: Path, tmp_path: Path) -> None:
    assert begin(umbel, tmp_path, options={**OPTIONS, "seed": 2}).status == 0
    assert not same(whole, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_cleanly_and_the_run_goes_on(
    workers: int, umbel: WarmCommand, whole: Path, tmp_path: Path
) -> None:
    """To the whole process group, as a terminal sends it."""

    def interrupt(pid: int) -> None:
        for _ in lines_of(tmp_path / "run" / "metrics.jsonl", 3):
            pass
        os.killpg(pid, signal.SIGINT)

    change = " ".join(f"{name}={value}" for name, value in {**OPTIONS, "rounds": 5000}.items())
    stopped = umbel.command(
        *("run", APPS / "digits", "-c", change, "--workers", workers, "--out", "run"),
        cwd=tmp_path,
        during=interrupt,
    )
    assert stopped.status == 130, stopped.err
    assert stopped.out == ""
    assert stopped.err.count("umbel run --resume run") == 1
    assert "Traceback" not in stopped.err
    done = RunDirectory.open(tmp_path / "run").rounds()[-1]["round"]
    ended = resume(umbel, tmp_path, workers=workers, options={"rounds": done + 1})
    assert ended.status == 0, ended.err
    lines = trace(tmp_path / "run")
    assert [line["train"] for line in lines[:3]] == [line["train"] for line in trace(whole)[:3]]


def test_what_a_node_keeps_to_itself_survives(umbel: WarmCommand, tmp_path: Path) -> None:
    """The buffer `visits` never leaves its node, but nodes report it as a metric."""
    keywords: dict[str, Any] = {"app": APPS / "slope", "options": {"rounds": 5}, "workers": 0}
    killed = umbel.run(
        cwd=tmp_path,
        out=tmp_path / "run",
        deaths=[(f"{CHECKPOINT}:_save_nodes", 3, "after")],
        **keywords,
    )
    assert killed.status == -9
    assert umbel.run(cwd=tmp_path, resume=tmp_path / "run", workers=0).status == 0
    visits = [line["train"]["visits"] for line in trace(tmp_path / "run")[1:]]
    assert visits == [1.0, 2.0, 3.0, 4.0, 5.0]


# ---- what cannot be resumed


def test_a_run_of_another_engine_cannot_be_resumed_here(umbel: WarmCommand, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"app": "x", "engine": "flower"}))
    ended = umbel.command("run", "--resume", run, cwd=tmp_path)
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err and ended.err.count("\n") == 1
    assert "engine" in ended.err


def test_an_app_with_rounds_of_its_own_is_not_said_to_be_resumable(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    def interrupt(pid: int) -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "log.txt").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(pid, signal.SIGINT)

    stopped = umbel.command(
        *("run", APPS / "plain", "-c", "num-server-rounds=100000", "--workers", 0, "--out", "run"),
        cwd=tmp_path,
        during=interrupt,
    )
    assert stopped.status == 130
    assert "--resume" not in stopped.err
    ended = umbel.command("run", "--resume", "run", cwd=tmp_path)
    assert ended.status == 2
    assert "keeps its own rounds, so Umbel cannot continue it" in ended.err


def test_a_changed_default_of_the_app_does_not_change_a_resumed_run(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    """A run goes on with the options that it began with, whatever the app says by now."""
    app = tmp_path / "app"
    app.mkdir()
    for file in (APPS / "slope").iterdir():
        if file.is_file():
            (app / file.name).write_text(file.read_text())
    keywords: dict[str, Any] = {"workers": 0, "cwd": tmp_path}
    assert umbel.run(app=app, out=tmp_path / "whole", **keywords).status == 0
    deaths = [(f"{CHECKPOINT}:save", 2, "after")]
    assert umbel.run(app=app, out=tmp_path / "run", deaths=deaths, **keywords).status == -9
    project = app / "pyproject.toml"
    project.write_text(project.read_text().replace("seed = 0", "seed = 0\nlearning-rate = 0.5"))
    ended = umbel.run(resume=tmp_path / "run", **keywords)
    assert ended.status == 0, ended.err
    assert same(tmp_path / "whole", tmp_path / "run")
