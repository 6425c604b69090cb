"""Accuracy against epsilon: the table, the plot and the caveat; and DP-SGD's rates."""

import json
from pathlib import Path
from typing import Any

import pytest

from umbel.benchmarks.speed import private_sgd, utility


def _played(app: Path, *, options: dict[str, Any], nodes: int, out: Path) -> dict[str, Any]:
    """Stands for `umbel.run`: more epsilon, more accuracy."""
    assert app.name == "app"
    right = 0.8 + 0.01 * options["epsilon"] + (0.001 if out.name.endswith("-2") else 0.0)
    return {"epsilon": options["epsilon"] - 1e-4, "metrics": {"accuracy": right}, "seconds": nodes}


def test_every_point_is_several_runs_and_the_tuning_is_confessed(tmp_path: Path) -> None:
    said: list[str] = []
    settings = utility.plan(False, recipes=["quick", "few"], epsilons=[1.0, 2.7], repeats=2)
    about = {"machine": {"cpus": 2}}
    points = utility.measure(_played, Path("app"), settings, tmp_path, said.append, about)
    assert len(said) == 8
    assert [point.setting for point in points] == [
        "quick, 60,000 users", "quick, 60,000 users", "few, 6,000 users", "few, 6,000 users"
    ]  # fmt: skip
    assert points[0].spread > 0
    assert points[1].mean > points[0].mean
    text = "\n".join(utility.lines(points))
    assert "not counted" in text
    assert "2.700" in text
    content = json.loads((tmp_path / "utility.json").read_text())
    assert content["points"][0]["accuracies"] == list(points[0].accuracies)
    assert content["machine"] == {"cpus": 2}
    assert "not counted" in content["caveat"]
    assert (tmp_path / "utility.png").stat().st_size > 1000


def test_a_run_that_is_cut_short_leaves_what_it_found(tmp_path: Path) -> None:
    runs: list[Path] = []

    def cut(app: Path, *, options: dict[str, Any], nodes: int, out: Path) -> dict[str, Any]:
        runs.append(out)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return _played(app, options=options, nodes=nodes, out=out)

    with pytest.raises(KeyboardInterrupt):
        utility.measure(cut, Path("app"), utility.plan(False), tmp_path, print, {})
    (point,) = json.loads((tmp_path / "utility.json").read_text())["points"]
    assert len(point["accuracies"]) == 1


def test_what_is_run_is_a_plan_with_changes() -> None:
    for full in (False, True):
        everything = utility.plan(full)
        assert [setting.recipe for setting in everything] == ["quick", "best", "cnn", "few"]
        assert {1.0, 2.0, 4.0, 8.0} <= set(everything[-1].epsilons)
        assert everything[-1].users == 6000
    runs = [sum(len(s.epsilons) * s.repeats for s in utility.plan(full)) for full in (False, True)]
    assert runs[0] < runs[1]
    with pytest.raises(ValueError, match="quick, best, cnn, few"):
        utility.plan(False, recipes=["quack"])


def test_dp_sgd_is_measured_beside_no_privacy() -> None:
    (figure,) = private_sgd.measure(quick=True)
    assert figure.value > 0
    assert figure.target == 1e6 / 7000
    assert "no privacy" in figure.beside
