"""`umbel bench privacy` as a command: exit status, JSON, files."""

import json
import sys
from pathlib import Path

import pytest

from umbel.bench_privacy import opened
from umbel.benchmarks.attack.plans import full, quick
from umbel.cli import main
from umbel.run import example
from umbel.strategies.errors import ConfigError


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
