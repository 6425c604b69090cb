"""Accuracy against epsilon: the table, the plot and the caveat; and DP-SGD's rates."""

import json
from pathlib import Path
from typing import Any

from umbel.benchmarks.speed import private_sgd, utility


def _played(app: Path, *, options: dict[str, Any], nodes: int, out: Path) -> dict[str, Any]:
    """Stands for `umbel.run.run`: more epsilon, more accuracy."""
    assert app.name == "app"
    right = 0.8 + 0.01 * options["epsilon"] + (0.001 if out.name.endswith("-2") else 0.0)
    return {"epsilon": options["epsilon"] - 1e-4, "metrics": {"accuracy": right}, "seconds": nodes}


def test_every_point_is_several_runs_and_the_tuning_is_confessed(tmp_path: Path) -> None:
    said: list[str] = []
    settings = [utility.settings_named("quick"), utility.settings_named("few")]
    points = utility.measure(_played, Path("app"), settings, [1.0, 2.7], 2, tmp_path, said.append)
    assert len(said) == 8
    assert [point.setting for point in points] == [
        "quick, 60,000 users", "quick, 60,000 users", "quick, 6,000 users", "quick, 6,000 users"
    ]  # fmt: skip
    assert points[0].spread > 0
    assert points[1].mean > points[0].mean
    text = "\n".join(utility.lines(points))
    assert "not counted" in text
    assert "2.700" in text
    files = utility.write(points, tmp_path)
    assert json.loads(files[0].read_text())["points"][0]["accuracies"] == list(points[0].accuracies)
    assert files[1].stat().st_size > 1000


def test_dp_sgd_is_measured_beside_no_privacy() -> None:
    (figure,) = private_sgd.measure(quick=True)
    assert figure.value > 0
    assert figure.target == 1e6 / 7000
    assert "no privacy" in figure.beside
