"""The command line as scripts and people meet it: status, one sentence, one JSON object."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import APPS, WarmCommand

KEYS = {"run", "rounds", "metrics", "epsilon", "delta", "epsilon_against", "seconds", "stopped"}
LINE = {"round", "seconds", "phases", "bytes_down", "bytes_up", "clients", "metrics", "epsilon"}


def test_json_is_the_last_line_with_the_keys_of_the_contract(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    ended = umbel.command(
        *("run", APPS / "slope", "-c", "rounds=3 seed=5", "--nodes", 4, "--workers", 0),
        *("--out", tmp_path / "run", "--json"),
        cwd=tmp_path,
    )
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") == 1, "nothing but the object is on standard output"
    result = ended.result
    assert set(result) >= KEYS
    assert (result["rounds"], result["stopped"]) == (3, "rounds")
    assert result["epsilon"] is result["delta"] is result["epsilon_against"] is None
    assert set(result["metrics"]) == {"loss", "visits"}
    run = Path(result["run"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert all(set(line) >= LINE for line in lines[1:])
    assert all(line["clients"] == 4 for line in lines[1:])
    assert lines[-1]["metrics"] == result["metrics"]
    assert json.loads((run / "result.json").read_text()) == result
    config = json.loads((run / "config.json").read_text())
    assert (config["options"]["seed"], config["nodes"]) == (5, 4)
    assert {"python", "torch", "flwr"} <= set(config["versions"])
    for name in ("model.safetensors", "report.html", "log.txt", "nodes.jsonl"):
        assert (run / name).stat().st_size >= 0
    assert "round 3/3" in ended.err, "progress is plain lines where nobody watches"


def test_an_app_of_flowers_own_gets_a_run_directory_too(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = umbel.command("run", APPS / "plain", "--workers", 0, "--json", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert ended.result["rounds"] == 3, "two of FedAvg, and the app's own trip to train"
    assert set(ended.result["metrics"]) == {"loss"}
    assert (tmp_path / ended.result["run"] / "report.html").is_file()


def test_a_new_app_runs_at_once(umbel: WarmCommand, tmp_path: Path) -> None:
    made = umbel.command("new", "my-app", cwd=tmp_path)
    assert (made.status, made.out) == (0, "made my-app; run it with: umbel run my-app\n")
    ended = umbel.command("run", "my-app", "-c", "rounds=4", "--workers", 0, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert re.search(r"^4 rounds in [\d.]+ s \(all rounds done\)\naccuracy \d", ended.out)
    *_, report, more = ended.out.splitlines()
    report = report.removeprefix("report: ")
    for command in ("predict", "export", "compress"):
        assert f"umbel {command} {Path(report).parent}" in more
    assert (tmp_path / report).is_file()


def broken(where: Path, task: str) -> Path:
    app = where / "broken"
    app.mkdir()
    for file in (APPS / "slope").glob("*.*"):
        (app / file.name).write_text(file.read_text())
    (app / "task.py").write_text(task)
    return app


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown option": (("-c", "roundss=5"), "no option 'roundss'; did you mean rounds?"),
    "an option of no one's": (("-c", "zzz=5"), "no option 'zzz'; known are "),
    "wrong type": (("-c", "rounds=many"), "rounds is 'many', but it must be a whole number"),
    "wrong value": (("-c", "rounds=0"), "rounds is 0; it must be at least 1"),
    "wrong choice": (("-c", "optimizer=adam"), "optimizer is 'adam'; it can be fedavg"),
    "no cohort": (("-c", "cohort=fixed"), "cohort=fixed needs cohort-size"),
    "not a pair": (("-c", "rounds"), "'rounds' is not name=value"),
    "no such app": (("../nowhere",), "there is no folder"),
    "no nodes": (("--nodes", 0), "--nodes"),
    "no such flag": (("--worker", 2), "--worker"),
    "both": (("--resume", "run", "--out", "x"), "leave out APP and --out"),
    "nothing to resume": (("--resume", "run"), "run is not a directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(
    name: str, umbel: WarmCommand, tmp_path: Path
) -> None:
    arguments, said = MISTAKES[name]
    app = (
        () if str(arguments[0]).startswith("../") or "--resume" in arguments else (APPS / "slope",)
    )
    ended = umbel.command("run", *app, *arguments, "--workers", 0, cwd=tmp_path)
    assert ended.status == 2, ended.err
    assert said in ended.err
    assert ended.err.startswith("umbel: ") and ended.err.count("\n") == 1
    assert (ended.out, "Traceback" in ended.err) == ("", False)
    assert not (tmp_path / "runs").exists(), "a run that cannot be leaves no directory"


def test_an_app_that_does_not_import_names_file_and_line(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    app = broken(tmp_path, "import numpy\n\nfederation = numpy.nothing()\n")
    ended = umbel.command("run", app, "--workers", 0, cwd=tmp_path)
    assert ended.status == 2
    assert re.fullmatch(r"umbel: .*AttributeError: .*task\.py, line 3.*\n", ended.err), ended.err
    shown = umbel.command("--debug", "run", app, "--workers", 0, cwd=tmp_path)
    assert shown.status == 2
    assert "Traceback (most recent call last)" in shown.err
    assert 'task.py", line 3' in shown.err


def test_nodes_that_fail_are_named_and_the_run_says_so(umbel: WarmCommand, tmp_path: Path) -> None:
    run = ("run", APPS / "slope", "--workers", 0, "--json")
    one = umbel.command(*run, "-c", "break-node=2 break-round=2", cwd=tmp_path)
    assert one.status == 0, one.err
    lines = (tmp_path / one.result["run"] / "metrics.jsonl").read_text().splitlines()
    failed = [json.loads(line).get("failed") for line in lines]
    (failure,) = failed[2]
    assert failure["node"] == "2"
    assert failure["reason"].startswith("OSError: the disk is on fire (")  # and where
    assert not failed[1] and not failed[3]
    log = (tmp_path / one.result["run"] / "log.txt").read_text()
    assert "Traceback" in log and "the disk is on fire" in log


def test_a_run_that_no_node_can_train_fails_with_status_1(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    arguments = ("-c", "break-node=0", "--nodes", 1, "--workers", 0)
    ended = umbel.command("run", APPS / "slope", *arguments, cwd=tmp_path)
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert "the disk is on fire" in ended.err.splitlines()[-1]


def test_help_and_version_and_nothing(umbel: WarmCommand, tmp_path: Path) -> None:
    assert "umbel 0." in umbel.command("--version", cwd=tmp_path).out
    said = umbel.command("--help", cwd=tmp_path)
    assert said.status == 0
    for name in ("run", "new", "report", "data"):
        assert re.search(rf"^ *{name} ", said.out, re.MULTILINE), name
    assert umbel.command("rum", cwd=tmp_path).status == 2


def test_help_has_a_short_name_and_reads_as_it_was_written(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    for words in ((), ("run",), ("runs",), ("nodes", "add"), ("privacy", "noise")):
        short = umbel.command(*words, "-h", cwd=tmp_path)
        assert short.status == 0 and short.out.startswith("Usage: umbel"), words
        assert short.out == umbel.command(*words, "--help", cwd=tmp_path).out
        assert "\\" not in short.out, "brackets are not escaped"


def test_a_shell_completes_commands_of_every_group() -> None:
    shell = {"_UMBEL_COMPLETE": "complete_bash", "COMP_WORDS": "umbel privacy ", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['umbel']; from umbel.commands.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | shell, capture_output=True, text=True)
    assert {"epsilon", "noise"} <= set(done.stdout.split()), done.stderr
