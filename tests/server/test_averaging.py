"""Runs over seeds: means and spreads are those of the runs, and groups those of their options."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import APPS, WarmCommand
from umbel.server.output.averaging import Average, averaged
from umbel.server.output.comparing import Target, compare, write_page
from umbel.server.output.rundir import RunDirectory


def written(folder: Path, name: str, values: list[float], **options: Any) -> Path:
    """A run with these accuracies, 100 bytes and two seconds a round."""
    run = RunDirectory.create(
        None, name, {"app": "some", "options": {"rounds": 3, **options}}, out=folder / name
    )
    for at, value in enumerate(values):
        line = {"bytes_up": 60, "bytes_down": 40, "seconds": 2.0 + value}
        run.append_round({"round": at, "metrics": {"accuracy": value}, **line})
    return run.path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two methods with two seeds each, the second of which fails to reach a half once."""
    return [
        written(tmp_path, "a0", [0.1, 0.4, 0.6], seed=0, method="fedavg"),
        written(tmp_path, "b0", [0.1, 0.2, 0.3], seed=0, method="scaffold"),
        written(tmp_path, "a1", [0.1, 0.5, 0.8], seed=1, method="fedavg"),
        written(tmp_path, "b1", [0.1, 0.3, 0.5], seed=1, method="scaffold"),
    ]


def test_groups_are_runs_that_differ_in_their_seed_alone(runs: list[Path]) -> None:
    found = averaged(compare(runs, Target("accuracy", 0.5)))
    assert list(found.groups) == ["method=fedavg", "method=scaffold"]
    first, second = found.lines()
    assert first["seeds"] == [0, 1] and first["runs"] == [str(runs[0]), str(runs[2])]
    assert first["last"]["mean"] == pytest.approx(0.7)
    assert first["last"]["spread"] == pytest.approx(statistics.stdev([0.6, 0.8]))
    assert first["target_round"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5), "runs": 2}
    assert second["target_round"] == {"mean": 2.0, "spread": None, "runs": 1}
    assert first["bytes_up"] == {"mean": 120.0, "spread": 0.0, "runs": 2}
    table = found.table()
    row = dict(zip(table.heads, table.rows[1], strict=True))
    assert row["runs"] == "method=scaffold" and row["seeds"] == "2"
    assert row["rounds to 50.0\u00a0%"].endswith("(1 of 2)")
    assert [line[0] for line in found.differing().rows] == ["method"]


def test_curves_are_by_round_by_bytes_and_by_seconds(runs: list[Path], tmp_path: Path) -> None:
    found = averaged(compare(runs), ["one", "two", "one", "two"])
    plots = found.plots()
    assert [plot.title for plot in plots] == [
        "Accuracy by round",
        "Accuracy by bytes",
        "Accuracy by seconds",
    ]
    page = write_page(found, tmp_path / "page.html").read_text()
    assert "4 runs in 2 groups, over seeds" in page and all(one.svg in page for one in plots)


def test_nothing_is_averaged_where_nothing_is_said() -> None:
    assert Average.of([None, float("nan")]) is None
    assert Average.of([None, 2.0]) == Average(2.0, None, 1)


def test_the_command_puts_seeds_together(umbel: WarmCommand, tmp_path: Path) -> None:
    for seed in (1, 2):
        options = {"rounds": 1, "seed": seed}
        keywords = {"app": APPS / "digits", "options": options, "workers": 0}
        assert umbel.run(cwd=tmp_path, **keywords, out=tmp_path / f"s{seed}").status == 0
    found = json.loads(
        umbel.command("compare", "s1", "s2", "--over-seeds", "--json", cwd=tmp_path).out
    )
    (group,) = found["groups"]
    assert group["seeds"] == [1, 2] and group["last"]["runs"] == 2
