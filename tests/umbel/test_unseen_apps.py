"""Apps that are not ours: what their authors meet, from a first mistake to a whole run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import WarmCommand
from umbel.scaffold import new_app

HEAD = """
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from umbel import Examples, Federation, FunctionTrainer, Partitioned, Split, TorchTrainer

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)


def data(node, options):
    mine = slice(node.partition, 600, node.partitions)
    return Split(Examples(X[mine], Y[mine]), Examples(X[mine][:9], Y[mine][:9]))


def test(options):
    return Examples(X[600:900], Y[600:900])


def net():
    return nn.Linear(64, 10)


"""
PLAIN = "federation = Federation(trainer=TorchTrainer(net), data=data, test=test)\n"
CONFIG = "rounds = 2\nlearning-rate = 0.5\nbatch-size = 32\n"


def make(folder: Path, task: str = PLAIN, config: str = CONFIG, nodes: int = 4) -> Path:
    """An app from the template, with a task and options of its own."""
    new_app(folder)
    (folder / "task.py").write_text(HEAD + task)
    project = (folder / "pyproject.toml").read_text()
    before, _, rest = project.partition("[tool.flwr.app.config]\n")
    after = rest[rest.index("\n\n") :].replace("nodes = 10", f"nodes = {nodes}")
    (folder / "pyproject.toml").write_text(f"{before}[tool.flwr.app.config]\n{config}{after}")
    return folder


def run(umbel: WarmCommand, where: Path, *words: str, task: str = PLAIN, **more: Any) -> Any:
    """Run an app with this task in this process's stead; how it ended."""
    app = make(where / "app", task, **more)
    return umbel.command("run", app, "--workers", "0", "--json", *words, cwd=where)


def said(ended: Any) -> str:
    """The one sentence with which a command refused."""
    lines = [line for line in ended.err.splitlines() if line.startswith("umbel: ")]
    assert len(lines) == 1, ended.err
    assert "Traceback" not in ended.err
    assert lines[0] == ended.err.splitlines()[-1]
    return lines[0]


@pytest.mark.parametrize("options", ["keep-model=best", "early-stop-patience=2", "average-from=1"])
def test_the_latest_model_may_be_the_best(umbel: WarmCommand, tmp_path: Path, options: str) -> None:
    ended = run(umbel, tmp_path, "-c", f"{options} rounds=3")
    assert ended.status == 0, ended.err
    assert ended.result["rounds"] == 3


@pytest.mark.parametrize("option", ["keep-model=best", "early-stop-patience=2"])
def test_what_watches_the_evaluation_needs_one(
    umbel: WarmCommand, tmp_path: Path, option: str
) -> None:
    task = "federation = Federation(trainer=TorchTrainer(net), data=data)\n"
    ended = run(umbel, tmp_path, "-c", option, task=task)
    assert ended.status == 2
    assert "held-out examples" in said(ended)


def test_a_metric_that_nobody_measures(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = run(umbel, tmp_path, "-c", "keep-model=best early-stop-metric=f1")
    assert ended.status == 2
    assert "choose one of loss, accuracy" in said(ended)


def test_a_failing_node_is_counted_once_and_its_reason_is_said_once(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    task = """
def broken(node, options):
    if node.partition == 2:
        raise RuntimeError("disk on fire")
    return data(node, options)


federation = Federation(trainer=TorchTrainer(net), data=broken, test=test)
"""
    ended = run(umbel, tmp_path, "-c", "client-eval-every=1", task=task)
    assert ended.status == 0
    assert ended.err.count("disk on fire") == 1
    lines = (tmp_path / ended.result["run"] / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[1:]):
        (failure,) = line["failed"]
        assert failure["node"] == "2"
        assert failure["reason"].startswith("RuntimeError: disk on fire (")  # and where


def test_a_run_that_cannot_train_says_where_its_log_is(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = run(umbel, tmp_path, "-c", "learning-rate=1e30")
    assert ended.status == 1
    sentence = said(ended)
    assert "lower learning-rate" in sentence
    assert (tmp_path / sentence.rpartition("in ")[2]).is_file()


def test_a_draw_of_no_node_is_no_failure(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = run(umbel, tmp_path, "-c", "cohort=poisson cohort-size=0.01 rounds=6")
    assert ended.status == 0, ended.err
    assert "the draw chose no node" in ended.err


DYING = """
import os


def dying(node, options):
    if node.partition == 2:
        os.kill(os.getpid(), 9)
    return data(node, options)


federation = Federation(trainer=TorchTrainer(net), data=dying, test=test)
"""
HANGING = """
import threading


def hanging(node, options):
    if node.partition == 2:
        threading.Event().wait()
    return data(node, options)


federation = Federation(trainer=TorchTrainer(net), data=hanging, test=test)
"""


def test_a_node_that_kills_its_process_costs_none_of_its_group(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    app = make(tmp_path / "app", DYING)
    ended = umbel.command("run", app, "--workers", "1", "--json", cwd=tmp_path)
    assert ended.status == 0, ended.err
    lines = (tmp_path / ended.result["run"] / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[1:]):
        assert line["clients"] == 3
        assert [failure["node"] for failure in line["failed"]] == ["2"]


@pytest.mark.slow
def test_nodes_that_hung_together_are_tried_one_by_one(umbel: WarmCommand, tmp_path: Path) -> None:
    app = make(tmp_path / "app", HANGING)
    options = "round-timeout=4.0 rounds=3 client-eval-every=-1"
    ended = umbel.command("run", app, "--workers", "2", "--json", "-c", options, cwd=tmp_path)
    assert ended.status == 0, ended.err
    lines = (tmp_path / ended.result["run"] / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["clients"] == 3


@pytest.mark.parametrize(
    ("status", "what", "task", "config"),
    [
        (
            2,
            "the model or its loss fails on a batch",
            PLAIN.replace("TorchTrainer(net)", "TorchTrainer(lambda: nn.Linear(63, 10))"),
            CONFIG,
        ),
        (
            2,
            "return a tensor with one number",
            PLAIN.replace("(net)", '(net, loss=nn.CrossEntropyLoss(reduction="none"))'),
            CONFIG,
        ),
        (2, "give it the class", PLAIN.replace("(net)", "(net())"), CONFIG),
        (2, "did you mean learning-rate?", PLAIN, "rounds = 2\nlearnig-rate = 0.5\n"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_cure(
    umbel: WarmCommand, tmp_path: Path, status: int, what: str, task: str, config: str
) -> None:
    ended = run(umbel, tmp_path, task=task, config=config)
    assert ended.status == status
    assert what in said(ended)


def test_debug_is_understood_at_the_end_of_the_line(umbel: WarmCommand, tmp_path: Path) -> None:
    ended = run(umbel, tmp_path, "--debug", task="import nowhere\n")
    assert ended.status == 2
    assert "Traceback" in ended.err
