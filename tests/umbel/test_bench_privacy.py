"""`umbel bench privacy` as a command: exit status, JSON, files."""

import json
import sys
from pathlib import Path

import pytest

from tests.server.tiny_private_app import write_app
from umbel.benchmarks.attack.plans import full, quick
from umbel.commands.bench_privacy import opened
from umbel.commands.cli import main
from umbel.core.errors import ConfigError
from umbel.opening import example


def umbel(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["umbel", "bench", "privacy", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("fault", ["clip", "weights"])
def test_a_fault_is_caught_with_exit_status_3(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert umbel(monkeypatch, "--inject", fault, "--json", "--out", str(tmp_path)) == 3
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["ok"] is False
    assert len(result["problems"]) == 1
    assert "epsilon 1.00 is claimed" in said.err
    assert Path(result["report"]).is_file()
    assert json.loads((tmp_path / "report.json").read_text())["about"]["command"].startswith(
        "umbel bench privacy --inject"
    )


UNTESTED = """
from dataclasses import replace
from torch import nn
from umbel import Federation, Partitioned, TorchTrainer


class Own:
    \"\"\"A trainer of the app's own that promises privacy for records.\"\"\"

    OPTIONS = {}

    def __init__(self):
        self.inner = TorchTrainer(lambda: nn.Linear(64, 10))

    def privacy(self, options):
        return 1.0

    def initial(self, options, seed):
        return self.inner.initial(options, seed)

    def train(self, weights, examples, job):
        return replace(self.inner.train(weights, examples, job), metrics={})

    def evaluate(self, weights, examples, options):
        return self.inner.evaluate(weights, examples, options)


federation = Federation(trainer=Own(), data=Partitioned("digits", test_fraction=0.2))
"""


def test_a_promise_that_was_not_tested_is_said_and_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app")
    (app / "task.py").write_text(UNTESTED)
    (app / "client_app.py").write_text(
        "from task import federation\napp = federation.client_app()\n"
    )
    (app / "server_app.py").write_text(
        "from task import federation\napp = federation.server_app()\n"
    )
    words = ("--app", str(app), "-c", "rounds=1", "--json", "--out", str(tmp_path / "out"))
    assert umbel(monkeypatch, *words) == 3
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["ok"] is False
    assert result["problems"] == []
    assert any(
        "records (against server): not tested: Own is not a" in t for t in result["untested"]
    )
    assert "not tested" in said.err
    assert "not tested" in (tmp_path / "out" / "report.html").read_text()


def test_options_without_an_app_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert umbel(monkeypatch, "-c", "rounds=1") == 2
    assert "name the app with --app" in capsys.readouterr().err


def test_an_app_is_opened_with_its_options() -> None:
    federation, options, nodes, name = opened(example(), ["rounds=2"])
    assert (options["rounds"], nodes, name) == (2, 100, "fashion")
    assert callable(federation.data)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no option"):
        opened(example(), ["nonsense=1"])


def test_plans_have_every_kind_of_defence() -> None:
    for plan in (quick(), full()):
        images, medical = plan.tasks
        kinds = {(row.unit, row.noise, row.secure) for row in plan.defences[images.data]}
        assert kinds == {
            ("none", "none", False),
            ("client", "nodes", False),
            ("client", "server", False),
            ("none", "none", True),
            ("client", "nodes", True),
            ("example", "nodes", False),
        }
        names = [row.name for row in plan.defences[images.data]]
        assert len(names) == len(set(names))
        assert medical.data == "breast-cancer"
        assert plan.defences[medical.data]
    cohorts = {row.cohort for row in full().defences["fashion-mnist"] if row.unit == "none"}
    assert {5, 20, 50} <= cohorts


@pytest.mark.slow
def test_accuracy_against_epsilon_of_whole_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "coordinator.pem"))
    app, out = write_app(tmp_path / "app"), tmp_path / "out"
    task = (app / "task.py").read_text()
    task = task.replace('"rounds": 3', '"rounds": 1, "recipe": "quick", "cohort-size": 20.0')
    (app / "task.py").write_text(task.replace('{"loss"', '{"accuracy": 0.5, "loss"'))
    words = ("--utility", "--app", str(app), "--recipes", "few", "--epsilons", "8")
    assert umbel(monkeypatch, *words, "--repeats", "1", "--out", str(out), "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result == json.loads((out / "utility.json").read_text())
    assert [point["accuracies"] for point in result["points"]] == [[0.5]]
    assert 7.2 < result["points"][0]["epsilon"] <= 8
    assert result["machine"]["cpus"] >= 1
    assert "tuning is not counted" in said.out
    assert (out / "utility.png").stat().st_size > 1000
    assert len(list((out / "runs").glob("*/certificate.json"))) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--recipes", "quack"), "it can have quick, best, cnn, few"),
        (("--epsilons", "many"), "give numbers"),
        (("--epsilons", "-1", "--recipes", "few"), "epsilon is -1"),
    ],
)
def test_bad_plans_of_accuracy_are_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert umbel(monkeypatch, "--utility", *words, "--out", str(tmp_path / "out")) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
