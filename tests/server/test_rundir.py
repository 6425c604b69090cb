"""What a run directory promises: whole files, lines that survive a kill, errors with a cure."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import ConfigError, RunError
from umbel.server.output.rundir import RunDirectory, machine, versions
from umbel.server.output.strict import WORDS

# The texts that stand for numbers which JSON does not have come back as those.
texts = st.text().filter(lambda text: text not in WORDS)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
lines = st.lists(st.dictionaries(st.text(), scalars, max_size=4), max_size=6)


def make(path: Path, **config: Any) -> RunDirectory:
    return RunDirectory.create(None, "test", config, out=path)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk looks like to the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_new_run_gets_an_id_of_its_own(tmp_path: Path) -> None:
    runs = [RunDirectory.create(tmp_path, "My App!", {"app": "x"}) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == tmp_path and "my-app" in run.path.name for run in runs)
    config = RunDirectory.open(runs[0].path).config()
    assert config["app"] == "x"
    assert config["started"].endswith("+00:00")


def test_runs_go_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.create(None, "a", {}).path.parent == Path("runs")


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match=r"already holds a run.*--out.*--resume"):
        make(tmp_path / "run", seed=2)
    assert RunDirectory.open(tmp_path / "run").config()["seed"] == 1


def test_a_directory_with_other_files_takes_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no run"):
        make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_no_run_is_opened_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunDirectory.open(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        RunDirectory.open(tmp_path / "missing")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*--out"):
        RunDirectory.create(tmp_path / "file", "a", {})
    with pytest.raises(ConfigError, match="cannot be written"):
        make(tmp_path / "file")


@settings(max_examples=50, deadline=None)
@given(lines)
def test_rounds_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    run = make(tmp_path_factory.mktemp("run") / "run")
    for value in values:
        run.append_round(value)
    assert repr(RunDirectory.open(run.path).rounds()) == repr(values)  # repr: NaN equals NaN


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=1), st.data())
def test_a_line_cut_anywhere_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory, seconds: int, data: st.DataObject
) -> None:
    run = make(tmp_path_factory.mktemp("run") / "run")
    run.append_round({"round": 1})
    whole = run.metrics_path.stat().st_size
    run.append_round({"round": 2, "seconds": seconds})
    end = run.metrics_path.stat().st_size
    cut = data.draw(st.integers(whole, end))
    os.truncate(run.metrics_path, cut)
    before = run.metrics_path.read_bytes()
    kept = [1, 2] if cut >= end - 1 else [1]  # only the line feed is missing: nothing is lost
    assert [line["round"] for line in run.rounds()] == kept
    assert run.metrics_path.read_bytes() == before, "reading must not change the file"
    run.append_round({"round": 3})
    assert [line["round"] for line in run.rounds()] == [*kept, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.metrics_path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(ConfigError, match="line 2"):
        run.rounds()


def test_numbers_of_every_kind_are_written(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.append_round(
        {"a": np.float32(0.5), "b": torch.tensor(3), "c": math.inf, "d": math.nan, "e": np.int64(7)}
    )
    (line,) = run.rounds()
    assert (line["a"], line["b"], line["c"], line["e"]) == (0.5, 3, math.inf, 7)
    assert math.isnan(line["d"])
    with pytest.raises(TypeError, match="cannot be written"):
        run.append_round({"a": object()})
    assert len(run.rounds()) == 1


def test_a_resumed_run_forgets_the_rounds_after_its_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for number in range(6):
        run.append_round({"round": number})
    run.truncate_rounds(3)
    run.append_round({"round": 4, "again": True})
    assert [line["round"] for line in run.rounds()] == [0, 1, 2, 3, 4]
    assert run.rounds()[-1]["again"]


def test_a_full_disk_leaves_the_old_file_and_one_sentence(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.write_result({"rounds": 1})
    run.append_round({"round": 1})
    with disk_of(4096):
        with pytest.raises(RunError, match=r"result\.json cannot be written .*make room"):
            run.write_result({"summary": "x" * 100_000})
        with pytest.raises(RunError, match="cannot be written"):
            run.append_round({"round": 2, "text": "x" * 100_000})
        with pytest.raises(RunError, match="cannot be written"):
            run.write_model({"w": torch.zeros(100_000)})
    assert run.result() == {"rounds": 1}
    assert not run.model_path.exists()
    assert not list(run.path.glob(".*")), "no temporary file stays behind"
    run.append_round({"round": 2})
    assert [line["round"] for line in run.rounds()] == [1, 2]


def test_a_model_comes_back(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    flat = torch.arange(10.0)
    tied = torch.ones(2, 2, dtype=torch.float64)
    frozen = np.arange(3)
    frozen.flags.writeable = False
    tensors: dict[str, torch.Tensor | np.ndarray[Any, Any]] = {
        "a": flat[:4].view(2, 2).requires_grad_(),
        "b": flat[4:],
        "tied": tied,
        "tied_again": tied,
        "turned": torch.arange(6).view(2, 3).T,
        "array": frozen,
        "scalar": np.array(2.5),
    }
    assert run.write_model(tensors, {"app": "test"}) == run.model_path
    found = run.read_model()
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = torch.tensor(value) if isinstance(value, np.ndarray) else value.detach()
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_a_model_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        run.read_model()
    run.model_path.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        run.read_model()


def test_nodes_and_other_json(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert run.nodes() == [] and run.result() == {}
    run.write_nodes([{"node": "a", "accuracy": 0.5}, {"node": "b", "accuracy": math.nan}])
    assert [node["node"] for node in run.nodes()] == ["a", "b"]
    assert json.loads(run.write_json("extra.json", {"x": run.path}).read_text()) == {
        "x": str(run.path)
    }
    run.result_path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds list"):
        run.result()
    run.result_path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        run.result()


def test_rounds_survive_a_kill(tmp_path: Path) -> None:
    """A process that is killed without warning loses no round that it finished writing."""
    code = (
        "import sys, pathlib, umbel.server.output.rundir as r\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "run = r.RunDirectory.create(None, 'k', {}, out=path)\n"
        "for n in range(1, 100_000_000):\n"
        "    run.append_round({'round': n, 'pad': 'x' * 200})\n"
        "    n == 20 and print('go', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "go\n"
        finally:
            child.kill()
    run = RunDirectory.open(tmp_path / "run")
    numbers = [line["round"] for line in run.rounds()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 20


def test_where_and_with_what() -> None:
    assert {"umbel", "python", "flwr", "torch", "numpy"} <= versions().keys()
    found = machine()
    assert found["cpus"] >= 1 and found["memory_gb"] > 0 and found["platform"]


def test_an_infinite_option_stays_a_number_in_strict_json(tmp_path: Path) -> None:
    options = {"epsilon": math.inf, "name": "Infinity", "rate": -math.inf, "list": [math.inf]}
    run = RunDirectory.create(None, "x", {"options": options}, out=tmp_path / "run")
    text = run.config_path.read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["options"] == options
    assert run.config()["options"]["epsilon"] == math.inf
