"""`umbel bench privacy --utility`: what privacy costs in accuracy, by real private runs.

Every point is the test accuracy of whole runs of the example `private-fashion`, each with fresh
noise and fresh cohorts from the operating system, the private preliminary sums redrawn as well.
Results are written after every run, so that a run that is cut short has its table too.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from umbel.server.output import strict

CAVEAT = (
    "The recipes were tuned beforehand on public data; the privacy cost of that tuning is not "
    "counted."
)

Run = Callable[..., Mapping[str, Any]]
"""`umbel.run`."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        recipe: an option of the example.
        epsilons: budgets.
        repeats: runs of each, which differ in nothing but noise and cohorts.
        users: nodes; the images are divided equally.
    """

    recipe: str
    epsilons: tuple[float, ...]
    repeats: int
    users: int = 60_000

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.recipe}, {self.users:,} users"


FEW = 6_000
"""Users of the recipe `few`, with ten images each."""

QUICK = (
    Setting("quick", (1.0, 2.7), 2),
    Setting("best", (1.0, 2.7), 2),
    Setting("cnn", (2.7,), 1),
    Setting("few", (1.0, 2.0, 4.0, 8.0), 2, FEW),
)
"""About twenty minutes on two cores."""

FULL = (
    Setting("quick", (1.0, 2.7, 8.0), 3),
    Setting("best", (1.0, 2.7, 8.0), 3),
    Setting("cnn", (1.0, 2.7, 8.0), 3),
    Setting("few", (1.0, 2.0, 2.7, 4.0, 8.0), 3, FEW),
)
"""About an hour and a half."""


def plan(
    full: bool,
    *,
    recipes: Sequence[str] = (),
    epsilons: Sequence[float] = (),
    repeats: int | None = None,
) -> list[Setting]:
    """What is run; what is left out is as the plan has it.

    Raises:
        ValueError: there is no such recipe.
    """
    known = {setting.recipe: setting for setting in (FULL if full else QUICK)}
    for name in recipes:
        if name not in known:
            raise ValueError(f"recipes has {name!r}; it can have {', '.join(known)}")
    return [
        replace(
            known[name],
            epsilons=tuple(epsilons) or known[name].epsilons,
            repeats=repeats or known[name].repeats,
        )
        for name in recipes or known
    ]


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

    def plus(self, result: Mapping[str, Any]) -> "Point":
        """This point with one more run."""
        return Point(
            self.setting,
            max(self.epsilon, float(result["epsilon"])),
            (*self.accuracies, float(result["metrics"]["accuracy"])),
            (*self.seconds, float(result["seconds"])),
        )


def measure(
    run: Run,
    app: Path,
    settings: Sequence[Setting],
    out: Path,
    note: Callable[[str], None],
    about: Mapping[str, Any],
) -> list[Point]:
    """Run every setting at every epsilon; see `write` for the files.

    Args:
        run: runs an app; `umbel.run`.
        app: the folder of the example.
        settings: what to run.
        out: where the runs and the results are written.
        note: told what begins.
        about: machine, versions and the like, for the results.
    """
    points: dict[tuple[str, float], Point] = {}
    began = time.monotonic()
    for setting in settings:
        for epsilon in setting.epsilons:
            for i in range(1, setting.repeats + 1):
                note(f"{setting.label}, epsilon {epsilon:g}, run {i} of {setting.repeats}")
                name = f"{setting.recipe}-{setting.users}-{epsilon:g}-{i}"
                changes = {"recipe": setting.recipe, "epsilon": epsilon}
                result = run(app, options=changes, nodes=setting.users, out=out / "runs" / name)
                place = (setting.label, epsilon)
                before = points.get(place, Point(setting.label, 0.0, (), ()))
                points[place] = before.plus(result)
                seconds = round(time.monotonic() - began, 1)
                write(list(points.values()), out, {**about, "seconds": seconds})
    return list(points.values())


def write(points: Sequence[Point], out: Path, about: Mapping[str, Any]) -> list[Path]:
    """`utility.json` and `utility.png` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "utility.json"
    rows = [{**asdict(point), "mean": point.mean, "spread": point.spread} for point in points]
    content = {**about, "points": rows, "caveat": CAVEAT}
    file.write_text(strict.dumps(content, indent=1) + "\n", "utf-8")
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
        spread = f"{100 * point.spread:.2f}" if len(point.accuracies) > 1 else "-"
        rows.append(
            f"{point.setting:<24}  {point.epsilon:>7.3f}   {100 * point.mean:>6.2f} %   "
            f"{spread:>6}   {len(point.accuracies):>4}   "
            f"{statistics.median(point.seconds):>13.0f}"
        )
    return [*rows, "spread: standard deviation over runs, in percentage points", CAVEAT]
