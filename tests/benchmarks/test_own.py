"""Somebody's own federation under attack, and the attack of the documentation."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from umbel.benchmarks.attack import own
from umbel.benchmarks.attack.defences import quarter_noise, skip_clip, unbounded_weights
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.core.options import Options
from umbel.federation import Federation
from umbel.server.training_spec import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


FEDERATION = Federation(
    trainer=TorchTrainer(model, loss="cross-entropy"), data=Partitioned("digits"), name="digits"
)
OPTIONS = {"rounds": 3, "cohort": "fixed", "cohort-size": 8.0}


def test_an_open_app_is_attacked_all_round() -> None:
    report = own.attack(FEDERATION, 20, OPTIONS, name="digits", canaries=200)
    assert report.problems() == []
    row = report.rows[0]
    assert row.notes == []
    assert set(row.measured) == {"training", "crowd", "pictures"}
    found = {(one.attack, one.adversary, one.measure): one for _, one in row.findings}
    assert found["iDLG labels", "server", "labels found"].value == 1.0
    assert found["closed form", "server", "examples recovered"].value == 1.0
    assert ("loss threshold", "model-user", "AUC") in found
    assert ("participation: likelihood ratio", "other-node", "AUC") in found
    assert row.claimed("model-user") is None
    assert row.accuracy() is not None


def test_an_app_with_a_budget_is_held_to_it_and_caught_where_it_lies() -> None:
    options = {"epsilon": 1.0, "delta": 1e-5, "rounds": 2}
    honest = own.audit(FEDERATION, options, name="digits", canaries=400)
    users = next(audit for audit in honest if audit.adversary == "model-user")
    assert users.claimed == pytest.approx(1.0, rel=1e-2)
    assert not users.refuted


@pytest.mark.parametrize("noise", [{"noise-multiplier": 3.7307}, {"epsilon": 1.0}])
def test_a_fault_in_an_app_is_a_problem(noise: dict[str, float]) -> None:
    options = {**noise, "delta": 1e-5, "rounds": 2}
    report = own.attack(FEDERATION, 20, options, name="digits", canaries=1000, fault=quarter_noise)
    assert any("epsilon 1.00 is claimed" in problem for problem in report.problems())


@pytest.mark.parametrize("fault", [skip_clip, unbounded_weights])
def test_every_fault_can_be_put_into_an_app(fault: own.Fault) -> None:
    options = {"epsilon": 1.0, "delta": 1e-5, "rounds": 2}
    report = own.attack(FEDERATION, 20, options, name="digits", canaries=1000, fault=fault)
    assert any("epsilon 1.00 is claimed" in problem for problem in report.problems())


def test_what_an_app_adds_to_its_results_is_left_aside() -> None:
    def compare(outcome: Outcome, options: Options) -> dict[str, float]:  # noqa: ARG001
        return {"accuracy": outcome.metrics["accuracy"]}  # canaries have none

    app = replace(FEDERATION, summary=compare)
    found = own.audit(app, {"epsilon": 4.0, "delta": 1e-5}, name="digits", canaries=50)
    assert {audit.adversary for audit in found} == {"model-user", "server"}


def test_the_documented_attack_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"<!-- tested by .*?-->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) < 40
    exec(compile(code[1], str(PAGE), "exec"), {})
    assert re.fullmatch(r"AUC [01]\.\d\d \(.*\)\n", capsys.readouterr().out)
