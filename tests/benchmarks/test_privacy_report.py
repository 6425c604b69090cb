"""The report: what counts as a problem, and that files hold what was measured."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from umbel.benchmarks.attack import checks
from umbel.benchmarks.attack import report as privacy_report
from umbel.benchmarks.attack.audits import Audit
from umbel.benchmarks.attack.checks import Check
from umbel.benchmarks.attack.findings import Finding, Reconstruction, guaranteed, roc_findings
from umbel.benchmarks.attack.scenes import Measured
from umbel.benchmarks.attack.suite import Report, Row, stamp
from umbel.commands.bench import app
from umbel.core.errors import ConfigError

runner = CliRunner()
RNG = np.random.default_rng(0)


def audit(claimed: float | None, measured: float, confidence: float | None = 0.95) -> Audit:
    return Audit(
        subject="stack",
        adversary="model-user",
        unit="client",
        method="one-run",
        claimed=claimed,
        measured=measured,
        delta=1e-5,
        confidence=confidence,
        canaries=100,
    )


def row(*audits: Audit, excess: float = 0.0, shift: float = 0.5) -> Row:
    findings, curve = roc_findings(
        "loss threshold", "model-user", shift + RNG.normal(size=1000), RNG.normal(size=1000)
    )
    curves = {"loss threshold": curve}
    findings = guaranteed(findings, curves, 2.0, 1e-5)
    findings[0] = replace(findings[0], excess=excess)
    images = RNG.random((3, 16)).astype(np.float32)
    training = Measured(
        findings=findings,
        curves=curves,
        accuracy=(0.8, 1000),
        claimed={"model-user": 2.0},
        bytes_up=1000.0,
        seconds=0.5,
    )
    pictures = Measured(
        findings=[
            Finding("closed form", "server", "examples recovered", 1.0, 0.9, 1.0, 0.0, 40),
        ],
        pictures=[Reconstruction("closed form", images, images)],
    )
    return Row(
        "images", "central <DP>", "Noise.", {"training": training, "pictures": pictures}, audits, []
    )


def test_a_report_without_contradiction_has_no_problem() -> None:
    report = Report([row(audit(2.0, 1.0), audit(None, 9.0), audit(2.0, 5.0, confidence=None))])
    assert report.problems() == []


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report([row(audit(2.0, 2.1))]), "epsilon 2.00 is claimed"),
        (Report([row(audit(2.0, 1.0), excess=3.4)]), "3.4 standard errors"),
        (Report([], faults=[audit(1.0, 0.5)]), "was not noticed"),
        (Report([], mechanisms=[audit(1.0, 1.5)]), "at least 1.50"),
        (Report([], checks=[Check("a value", 5.0, 1.0, 2.0)]), "a value is 5"),
    ],
)
def test_each_contradiction_is_a_problem(report: Report, words: str) -> None:
    problems = report.problems()
    assert len(problems) == 1
    assert words in problems[0]


def test_a_noticed_fault_is_none() -> None:
    assert Report([], faults=[audit(1.0, 1.5)]).problems() == []


def test_a_roc_curve_above_its_ceiling_is_found() -> None:
    findings, curve = roc_findings(
        "x", "model-user", 3 + RNG.normal(size=1000), RNG.normal(size=1000)
    )
    broken = guaranteed(findings, {"x": curve}, 0.5, 1e-5)
    assert broken[0].excess is not None
    assert broken[0].excess > 3
    assert broken[0].ceiling == pytest.approx(0.6225, abs=1e-3)


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    report = Report(
        [row(audit(2.0, 1.0))],
        faults=[audit(1.0, 1.5)],
        checks=[Check("open end", 150.0, 100.0, np.inf)],
        about={"seed": 0, "repetitions": 1, "canaries": 10, "versions": {}, "machine": {}},
    )
    files = privacy_report.write(report, tmp_path)
    names = {path.name for path in files}
    assert {"report.json", "findings.csv", "audits.csv", "results.md", "report.html"} <= names
    assert {"frontier-images.png", "roc-images.png", "pictures-images.png"} <= names
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["ok"] is True
    assert content["rows"][0]["accuracy"]["value"] == 0.8
    assert content["checks"][0]["most"] == "Infinity"
    with (tmp_path / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["attack"] == "loss threshold"
    assert float(rows[0]["value"]) == report.rows[0].findings[0][1].value
    page = (tmp_path / "report.html").read_text()
    assert "central &lt;DP&gt;" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_table_names_its_run_and_holds_the_reports_numbers(tmp_path: Path) -> None:
    about = stamp(7, 1000, seconds=12.0)
    report = Report([row(audit(2.0, 1.25)), replace(row(), name="none")], about=about)
    privacy_report.write(report, tmp_path)
    shown = runner.invoke(app, ["privacy", "--table", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    table, _, legend = shown.stdout.partition("\n\n")
    assert "central" not in table  # not among the brief ones
    cells = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    auc = report.rows[1].findings[0][1].value
    assert cells[:2] == ["none", "80.0%"]
    assert cells[5].startswith(f"{auc:.2f} (")
    assert cells[6:] == ["1,000", "0.50"]
    assert about["id"] in legend
    assert about["date"] in legend
    assert "seed 7" in legend
    whole = (tmp_path / "results.md").read_text()
    assert "| 2.00 / none | 1.25 / - |" in whole


def test_the_terminal_shows_both_adversaries_and_no_empty_column() -> None:
    console = Console(width=80, file=io.StringIO())
    server = replace(audit(1.5, 1.31), adversary="server")
    for table in privacy_report.tables(Report([row(audit(2.0, 1.25), server)])):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.25" in shown
    assert "1.31" in shown
    assert shown.count("measured") == 3  # a title and two heads
    assert "imprint" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_a_folder_without_a_report_has_no_table(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["privacy", "--table", str(tmp_path)])
    assert isinstance(shown.exception, ConfigError)


def test_membership_at_small_epsilon_and_of_overfitted_models_is_checked() -> None:
    found, _ = roc_findings(
        "RMIA offline", "model-user", RNG.normal(size=50) + 3, RNG.normal(size=50)
    )
    low, high = checks.memberships([(8.0, found), (9.0, found), (None, found)])
    assert "of 1 membership AUCs" in low.name
    assert not low.ok
    assert not high.ok
    assert checks.memberships([(None, found)]) == []
    assert checks.memberships([(8.0, [replace(found[0], low=0.4, high=0.6)])]) == []
    loss, _ = roc_findings(
        "loss threshold", "model-user", RNG.normal(size=50) + 1, RNG.normal(size=50)
    )
    assert all(check.ok for check in checks.overfitted([*found, *loss]))
    assert not all(check.ok for check in checks.overfitted([replace(found[0], value=0.5), *loss]))


def test_reference_values_are_reproduced() -> None:
    found = checks.estimators()
    assert len(found) == 11
    assert all(check.ok for check in found), [check.sentence for check in found if not check.ok]
