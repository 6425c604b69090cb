"""`umbel bench privacy --utility`: what privacy costs in accuracy, by real private runs.

Every point is the test accuracy of whole runs of the example `private-fashion`, each with fresh
noise and fresh cohorts from the operating system, the private preliminary sums redrawn as well.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CAVEAT = (
    "The recipes were chosen on a validation split of public data; the privacy cost of that "
    "tuning is not counted."
)

Run = Callable[..., Mapping[str, Any]]
"""`umbel.run.run`."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        recipe: an option of the example.
        users: nodes; the images are divided equally.
        options: further ones.
    """

    recipe: str
    users: int = 60_000
    options: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.recipe}, {self.users:,} users"


@dataclass(frozen=True)
class Point:
    """Accuracy at one epsilon.

    Attributes:
        setting: its label.
        epsilon: what the ledger says was spent, at most what was asked.
        accuracies: of each run.
        seconds: of each run.
    """

    setting: str
    epsilon: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracies; 0 for a single run."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


FEW_USERS: Mapping[str, Any] = {
    "cohort-size": 1000.0,
    "rounds": 100,
    "server-learning-rate": 10.0,
    "average-from": 50,
}
"""For 6,000 users: the last model is unstable under that much noise, so models are averaged."""


def settings_named(name: str) -> Setting:
    """`quick`, `best`, or `few`: 6,000 users of ten images."""
    if name == "few":
        return Setting("quick", 6_000, FEW_USERS)
    return Setting(name)


def measure(
    run: Run,
    app: Path,
    settings: Sequence[Setting],
    epsilons: Sequence[float],
    repeats: int,
    out: Path,
    note: Callable[[str], None],
) -> list[Point]:
    """Run every setting at every epsilon `repeats` times.

    Args:
        run: runs an app; `umbel.run.run`.
        app: the folder of the example.
        settings: what to run.
        epsilons: budgets.
        repeats: runs of each, which differ in nothing but noise and cohorts.
        out: where the runs are written.
        note: told what begins.
    """
    points = []
    for setting in settings:
        for epsilon in epsilons:
            results = []
            for i in range(repeats):
                note(f"{setting.label}, epsilon {epsilon:g}, run {i + 1} of {repeats}")
                changes = {"recipe": setting.recipe, "epsilon": epsilon, **(setting.options or {})}
                where = out / "runs" / f"{setting.recipe}-{setting.users}-{epsilon:g}-{i + 1}"
                results.append(run(app, options=changes, nodes=setting.users, out=where))
            points.append(
                Point(
                    setting.label,
                    max(float(result["epsilon"]) for result in results),
                    tuple(float(result["metrics"]["accuracy"]) for result in results),
                    tuple(float(result["seconds"]) for result in results),
                )
            )
    return points


def write(points: Sequence[Point], out: Path) -> list[Path]:
    """`utility.json` and `utility.png` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "utility.json"
    rows = [{**asdict(point), "mean": point.mean, "spread": point.spread} for point in points]
    file.write_text(json.dumps({"points": rows, "caveat": CAVEAT}, indent=1) + "\n", "utf-8")
    return [file, draw(points, out / "utility.png")]


def draw(points: Sequence[Point], path: Path) -> Path:
    """Accuracy against epsilon, a line a setting, with a bar of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for label in dict.fromkeys(point.setting for point in points):
        own = sorted((p for p in points if p.setting == label), key=lambda p: p.epsilon)
        axes.errorbar(
            [p.epsilon for p in own],
            [100 * p.mean for p in own],
            yerr=[100 * p.spread for p in own],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel("epsilon of a user, delta 1e-5, against model users")
    axes.set_ylabel("test accuracy, per cent")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("Fashion-MNIST, user-level privacy")
    figure.savefig(path, dpi=150)
    return path


def lines(points: Sequence[Point]) -> list[str]:
    """The table as text, and what it does not count."""
    rows = ["setting                   epsilon   accuracy   spread   runs   seconds a run"]
    for point in points:
        rows.append(
            f"{point.setting:<24}  {point.epsilon:>7.3f}   {100 * point.mean:>6.2f} %   "
            f"{100 * point.spread:>5.2f}   {len(point.accuracies):>4}   "
            f"{statistics.median(point.seconds):>8.0f}"
        )
    return [*rows, CAVEAT]
