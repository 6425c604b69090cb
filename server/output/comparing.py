"""Runs side by side, as `umbel compare` shows them: what each reached, and in what they differ.

A run's values are those of the coordinator's evaluation; where it made none, the means over the
nodes that measured. Which of the two it is is said, for they are not the same examples.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from umbel.core.errors import ConfigError
from umbel.core.options import renamed
from umbel.core.text import plain
from umbel.server.evaluation import direction
from umbel.server.output import strict
from umbel.server.output.figures import Round, is_share, metric_text, size_text, title_text
from umbel.server.output.pages import Table, environment
from umbel.server.output.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    Line,
    Plot,
    draw_lines,
    drawable,
)
from umbel.server.output.progress import count, duration, headline, number
from umbel.server.output.rundir import RunDirectory

COLORS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, GREY)
DRAWN = 2 * len(COLORS)  # whole and dashed lines; of more, nobody can tell which is which
_SETTINGS = ("app", "engine", "nodes")  # of config.json, beside the options
MISSING = "-"


@dataclass(frozen=True)
class Target:
    """A value of a metric that a run is to reach."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """The target that `accuracy=0.8` says.

        Raises:
            ConfigError: it is no NAME=NUMBER, or the name does not tell which way is better.
        """
        name, _, value = (part.strip() for part in text.rpartition("="))
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not name or not math.isfinite(found):
            raise ConfigError(f"--target is {text!r}; give NAME=NUMBER, such as accuracy=0.8")
        if not direction(name):
            raise ConfigError(
                f"--target names {name!r}, of which the name does not tell whether more or less "
                "is better; name an accuracy, a loss or another such metric"
            )
        return cls(name, found)


@dataclass(frozen=True)
class Compared:
    """What one run says of itself.

    Attributes:
        run: its directory.
        name: the directory's name, with folders above it where two have that name.
        config: its `config.json`.
        rounds: what it wrote of each round.
        epsilon: what has been charged; None where nothing is.
    """

    run: Path
    name: str
    config: Mapping[str, Any]
    rounds: Sequence[Round]
    epsilon: float | None

    def values(self, metric: str | None) -> list[tuple[int, float]]:
        """Round and value wherever the metric was measured."""
        if self.measured(metric) == "nodes":
            means = [(one.number, one.federated.get(metric or "", {})) for one in self.rounds]
            return [(at, part["mean"]) for at, part in means if "mean" in part]
        return [(one.number, one.metrics[metric]) for one in self.rounds if metric in one.metrics]

    def measured(self, metric: str | None) -> str:
        """Who measured it: `coordinator`, `nodes`, or nobody, which is empty."""
        if any(metric in one.metrics for one in self.rounds):
            return "coordinator"
        return "nodes" if any(metric in one.federated for one in self.rounds) else ""

    def own(self, metric: str | None, what: str) -> float | None:
        """Of the nodes' last evaluation on their own test examples: `mean` or `worst_decile`."""
        found = [one.federated.get(metric or "", {}) for one in self.rounds]
        return next((part[what] for part in reversed(found) if what in part), None)

    @property
    def trained(self) -> list[Round]:
        """The rounds of training that ended."""
        return [one for one in self.rounds if one.number > 0]


@dataclass(frozen=True)
class Comparison:
    """Runs, and the metric by which they are compared.

    Attributes:
        runs: at least two.
        metric: its name; None where no run has measured anything.
        target: of this metric.
    """

    runs: Sequence[Compared]
    metric: str | None
    target: Target | None = None

    def lines(self) -> list[dict[str, Any]]:
        """What the table says of each run, as numbers; None where there is nothing to say."""
        return [self._line(run) for run in self.runs]

    def _line(self, run: Compared) -> dict[str, Any]:
        values = run.values(self.metric)
        better = direction(self.metric or "")
        usable = [(at, value) for at, value in values if math.isfinite(value)] if better else []
        at, best = max(usable, key=lambda pair: better * pair[1], default=(None, None))
        goal = None if self.target is None else better * self.target.value
        reached = (at for at, value in usable if goal is not None and better * value >= goal)
        return {
            "run": str(run.run),
            "name": run.name,
            "rounds": len(run.trained),
            "measured": run.measured(self.metric) or None,
            "last": values[-1][1] if values else None,
            "best": best,
            "best_round": at,
            "target_round": next(reached, None),
            "bytes_down": _whole(_total(one.bytes_down for one in run.trained)),
            "bytes_up": _whole(_total(one.bytes_up for one in run.trained)),
            "seconds": _total(one.seconds for one in run.trained),
            "epsilon": run.epsilon,
            "own": run.own(self.metric, "mean"),
            "own_worst": run.own(self.metric, "worst_decile"),
        }

    def differences(self) -> dict[str, dict[str, list[Any]]]:
        """Under `settings` and `options`: a value a run of each in which the runs differ."""
        settings = [{key: run.config.get(key) for key in _SETTINGS} for run in self.runs]
        options = [options_of(run.config) for run in self.runs]
        return {"settings": _differing(settings), "options": _differing(options)}

    def as_json(self) -> dict[str, Any]:
        """All of it, for `umbel.server.output.strict`."""
        target = None if self.target is None else {self.target.metric: self.target.value}
        head = {"metric": self.metric, "target": target}
        return {**head, "runs": self.lines(), "differences": self.differences()}

    def table(self) -> Table:
        """A row a run."""
        metric = self.metric or "metric"
        heads = ["run", "rounds", f"last {metric}", f"best {metric}"]
        if self.target is not None:
            heads.append(f"rounds to {metric_text(metric, self.target.value)}")
        heads += ["bytes down", "bytes up", "time", "epsilon"]
        return Table(heads, [self._row(line) for line in self.lines()])

    def _row(self, line: Mapping[str, Any]) -> list[str]:
        def text(value: float | None) -> str:
            return MISSING if value is None else metric_text(self.metric or "", value)

        at, seconds = line["best_round"], line["seconds"]
        best = text(line["best"]) + ("" if at is None else f" (round {at:,})")
        reached = line["target_round"]
        goal = [] if self.target is None else [MISSING if reached is None else f"{reached:,}"]
        traffic = [line[name] for name in ("bytes_down", "bytes_up")]
        return [
            plain(line["name"]),
            f"{line['rounds']:,}",
            text(line["last"]),
            best,
            *goal,
            *(MISSING if amount is None else size_text(amount) for amount in traffic),
            MISSING if seconds is None else time_text(seconds),
            MISSING if line["epsilon"] is None else number(line["epsilon"]),
        ]

    def differing(self) -> Table:
        """A row for each setting and option in which the runs differ, a column a run."""
        found = self.differences()
        rows = [*found["settings"].items(), *found["options"].items()]
        heads = ["option", *(plain(run.name) for run in self.runs)]
        return Table(heads, [[plain(name), *map(_cell, values)] for name, values in rows])

    def notes(self) -> list[str]:
        """What one must know before one believes the table."""
        said = {run.measured(self.metric) for run in self.runs}
        if not {"coordinator", "nodes"} <= said:
            return []
        nodes = [plain(run.name) for run in self.runs if run.measured(self.metric) == "nodes"]
        return [
            f"{plain(self.metric)} is measured by the nodes, on their own examples, in "
            f"{', '.join(nodes)}, and by the coordinator elsewhere: compare the two with care."
        ]

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{count(len(self.runs), 'run')} compared"

    def plots(self) -> list[Plot]:
        """What can be drawn of them."""
        plot = self.plot()
        return [] if plot is None else [plot]

    def plot(self) -> Plot | None:
        """The metric by round, a line a run; None where there is nothing to draw."""
        name = self.metric or ""
        points = [(run.name, run.values(name)) for run in self.runs]
        points = [
            (label, pairs)
            for label, pairs in points
            if np.isfinite(drawable([value for _, value in pairs])).any()
        ]
        if not points:
            return None
        scale = 100.0 if is_share(name, [v for _, pairs in points for _, v in pairs]) else 1.0
        lines = []
        for order, (label, pairs) in enumerate(points[:DRAWN]):
            x, y = np.array(pairs, dtype=float).T
            color, dashed = COLORS[order % len(COLORS)], order >= len(COLORS)
            lines.append(Line(plain(label), color, x, y * scale, dashed=dashed))
        sentence = f"The {name} of each run by round."
        if len(points) > DRAWN:
            sentence += f" Drawn are the first {DRAWN} runs."
        unit = f"{name} (%)" if scale == 100 else name
        title = f"{title_text(name)} by round"
        logarithmic = direction(name) <= 0
        return draw_lines(
            "compared", title, sentence, lines, unit=unit, logarithmic=logarithmic, wide=True
        )


def compare(folders: Sequence[Path], target: Target | None = None) -> Comparison:
    """The runs in these directories, side by side.

    Args:
        folders: at least two directories of runs, which may be going on.
        target: what they are to reach; without, the metric is the one that reports put first,
            of those that all runs have, or else that any has.

    Raises:
        ConfigError: fewer than two runs, one of them twice, a folder that is no run or is damaged,
            or a target of a metric that no run has.
    """
    if len(folders) < 2:
        raise ConfigError(
            f"{count(len(folders), 'run')} cannot be compared; give at least two, or see one with: "
            "umbel report RUN"
        )
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigError(f"{folder} is given twice; give each run once")
        seen.add(folder.resolve())
    runs = list(map(_read, folders, _names(folders)))
    return Comparison(runs, _metric(runs, target), target)


class Shown(Protocol):
    """What a page shows of runs side by side."""

    @property
    def title(self) -> str: ...

    def table(self) -> Table: ...

    def differing(self) -> Table: ...

    def notes(self) -> list[str]: ...

    def plots(self) -> list[Plot]: ...


def write_page(found: Shown, file: Path) -> Path:
    """Write the table, the plot and the differences as one page that needs nothing beside itself.

    Raises:
        ConfigError: the file's name does not end with `.html`, or it lies in a run's directory.
        RunError: it cannot be written.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out is {file}; the page is HTML, so name it such as compared.html")
    if file.is_dir():
        raise ConfigError(f"--out is {file}, which is a folder; name a file in it")
    if RunDirectory(file.parent).holds_run():
        raise ConfigError(f"--out is {file}, in a run's own directory; put the page elsewhere")
    page = (
        environment()
        .get_template("comparing.html")
        .render(
            title=found.title,
            notes=found.notes(),
            table=found.table(),
            differing=found.differing(),
            plots=found.plots(),
        )
    )
    return RunDirectory(file.parent).write_bytes(file.name, page.encode("utf-8", "replace"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes for each to have its own."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        names = [str(Path(*each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder.resolve()) for folder in folders]


def _read(folder: Path, name: str) -> Compared:
    run = RunDirectory.open(folder)
    lines, result = run.rounds(), run.result()
    rounds = [Round.of(line) for line in lines]
    spent = Round.of(result).epsilon if result else rounds[-1].epsilon if rounds else None
    return Compared(folder, name, run.config(), rounds, spent)


def _metric(runs: Sequence[Compared], target: Target | None) -> str | None:
    each = [
        dict.fromkeys(name for one in run.rounds for name in (*one.metrics, *one.federated))
        for run in runs
    ]
    names = {name: None for found in each for name in found}
    if target is None:
        shared = {name: None for name in names if all(name in found for found in each)}
        return headline(shared or names)
    if target.metric not in names:
        has = f"they have {plain(', '.join(names))}" if names else "they have measured nothing"
        raise ConfigError(f"no run has the metric {target.metric!r} of --target; {has}")
    return target.metric


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a run's `config.json`, by their names of today."""
    options = config.get("options")
    return renamed(options) if isinstance(options, Mapping) else {}


def _differing(each: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = sorted({name for values in each for name in values})
    found = {name: [values.get(name) for values in each] for name in names}
    return {name: values for name, values in found.items() if len(set(map(same_text, values))) > 1}


def same_text(value: Any) -> str:
    """The same text for the same value: 1 and 1.0 are one, 1 and true are not."""
    whole = isinstance(value, float) and value.is_integer()
    return strict.canonical(int(value) if whole else value)


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    return plain(value if value and isinstance(value, str) else strict.dumps(value))


def _total(amounts: Iterable[float | None]) -> float | None:
    """The sum of those that are known; None where none is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _whole(amount: float | None) -> int | None:
    return None if amount is None else round(amount)


def time_text(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
