"""Runs that differ in nothing but their seed, as one line: means over seeds, and their spread.

The spread is the standard deviation of the runs (with one fewer than there are below the fraction);
a mean of rounds to a target is over the runs that reached it, and how many did is said.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from umbel.core.text import plain
from umbel.server.output import strict
from umbel.server.output.comparing import (
    COLORS,
    DRAWN,
    MISSING,
    Compared,
    Comparison,
    options_of,
    time_text,
)
from umbel.server.output.figures import is_share, metric_text, size_text, title_text
from umbel.server.output.pages import Table
from umbel.server.output.plots import Floats, Line, Plot, draw_lines
from umbel.server.output.progress import count

SEED = "seed"
_AMOUNTS = (
    *("last", "best", "target_round", "own", "own_worst"),
    *("bytes_down", "bytes_up", "seconds"),
)


@dataclass(frozen=True)
class Average:
    """What several runs say together.

    Attributes:
        mean: over those that say it.
        spread: their standard deviation; None of fewer than two.
        runs: how many say it.
    """

    mean: float
    spread: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Average | None":
        """Of those that are numbers; None where none is."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        spread = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), spread, len(known))

    def text(self, shown: Callable[[float], str]) -> str:
        """The mean, and how far runs are from it."""
        return shown(self.mean) + ("" if self.spread is None else f" ± {shown(self.spread)}")


@dataclass(frozen=True)
class Averaged:
    """Groups of runs, each of which differ in nothing but their seed.

    Attributes:
        whole: all runs side by side.
        groups: runs by the group's name, in the order in which they were given.
    """

    whole: Comparison
    groups: Mapping[str, Sequence[Compared]]

    def lines(self) -> list[dict[str, Any]]:
        """What the table says of each group, as numbers; None where there is nothing to say."""
        return [self._line(name, runs) for name, runs in self.groups.items()]

    def _line(self, name: str, runs: Sequence[Compared]) -> dict[str, Any]:
        each = replace(self.whole, runs=runs).lines()
        found = {key: Average.of([line[key] for line in each]) for key in _AMOUNTS}
        said = {key: None if one is None else vars(one) for key, one in found.items()}
        seeds = [options_of(run.config).get(SEED) for run in runs]
        return {"name": name, "runs": [line["run"] for line in each], "seeds": seeds, **said}

    def as_json(self) -> dict[str, Any]:
        """All of it, for `umbel.server.output.strict`."""
        return {"metric": self.whole.metric, "groups": self.lines()}

    def table(self) -> Table:
        """A row a group."""
        whole, metric = self.whole, self.whole.metric or "metric"
        heads = ["runs", "seeds", f"last {metric}", f"best {metric}"]
        if whole.target is not None:
            heads.append(f"rounds to {metric_text(metric, whole.target.value)}")
        heads += [f"{metric} on the nodes' own tests", "worst tenth of nodes"]
        heads += ["bytes down", "bytes up", "time"]
        return Table(heads, [self._row(name, runs) for name, runs in self.groups.items()])

    def _row(self, name: str, runs: Sequence[Compared]) -> list[str]:
        each = replace(self.whole, runs=runs).lines()

        def cell(key: str, shown: Callable[[float], str]) -> str:
            found = Average.of([line[key] for line in each])
            return MISSING if found is None else found.text(shown)

        def metric(value: float) -> str:
            return metric_text(self.whole.metric or "", value)

        goal = []
        if self.whole.target is not None:
            reached = sum(line["target_round"] is not None for line in each)
            some = "" if reached in (0, len(each)) else f" ({reached} of {len(each)})"
            goal = [cell("target_round", lambda value: f"{value:.0f}") + some]
        return [
            plain(name),
            f"{len(runs)}",
            *(cell(key, metric) for key in ("last", "best")),
            *goal,
            *(cell(key, metric) for key in ("own", "own_worst")),
            *(
                cell(key, lambda value: size_text(round(value)))
                for key in ("bytes_down", "bytes_up")
            ),
            cell("seconds", time_text),
        ]

    @property
    def title(self) -> str:
        """Of the page."""
        runs = count(len(self.whole.runs), "run")
        return f"{runs} in {count(len(self.groups), 'group')}, over seeds"

    def notes(self) -> list[str]:
        """What one must know before one believes the table."""
        return [*self.whole.notes(), "After ± stands the standard deviation of the runs."]

    def differing(self) -> Table:
        """The options in which groups differ, a column a group."""
        firsts = replace(self.whole, runs=[runs[0] for runs in self.groups.values()])
        found = firsts.differing()
        rows = [row for row in found.rows if row[0] != SEED]
        return Table([found.heads[0], *map(plain, self.groups)], rows)

    def plots(self) -> list[Plot]:
        """The metric by round, by bytes and by seconds, a line and its spread a group."""
        kinds = (
            ("round", "by round", lambda _: 1.0),
            ("megabytes, both ways", "by bytes", _megabytes),
            ("seconds", "by seconds", lambda one: one.seconds),
        )
        drawn = [self._plot(across, title, cost) for across, title, cost in kinds]
        return [plot for plot in drawn if plot is not None]

    def _plot(self, across: str, title: str, cost: Callable[[Any], float | None]) -> Plot | None:
        name = self.whole.metric or ""
        curves = {
            group: found
            for group, runs in self.groups.items()
            if (found := _curve(runs, name, cost)) is not None
        }
        if not curves:
            return None
        values = [float(v) for _, mean, _ in curves.values() for v in mean]
        scale = 100.0 if is_share(name, values) else 1.0
        lines = []
        for order, (group, (x, mean, spread)) in enumerate(list(curves.items())[:DRAWN]):
            band = ((mean - spread) * scale, (mean + spread) * scale)
            color, dashed = COLORS[order % len(COLORS)], order >= len(COLORS)
            lines.append(Line(plain(group), color, x, mean * scale, band, dashed))
        sentence = f"The mean {name} over seeds {title}; the shade is one standard deviation."
        if len(curves) > DRAWN:
            sentence += f" Drawn are the first {DRAWN} groups."
        return draw_lines(
            f"averaged-{title.split()[-1]}",
            f"{title_text(name)} {title}",
            sentence,
            lines,
            unit=f"{name} (%)" if scale == 100 else name,
            wide=True,
            across=across,
        )


def averaged(found: Comparison, names: Sequence[str] | None = None) -> Averaged:
    """Runs grouped by all of their options but the seed.

    Args:
        found: the runs.
        names: of each run's group; left out, a group is called by the options in which it differs
            from most.
    """
    if names is not None:
        groups: dict[str, list[Compared]] = {}
        for name, run in zip(names, found.runs, strict=True):
            groups.setdefault(name, []).append(run)
        return Averaged(found, groups)
    keyed: dict[str, list[Compared]] = {}
    for run in found.runs:
        keyed.setdefault(_key(run), []).append(run)
    runs = list(keyed.values())
    options = replace(found, runs=[group[0] for group in runs]).differences()["options"]
    return Averaged(found, dict(zip(_named(options, len(runs)), runs, strict=True)))


def _key(run: Compared) -> str:
    options = {name: value for name, value in options_of(run.config).items() if name != SEED}
    settings = {name: run.config.get(name) for name in ("app", "engine", "nodes")}
    return strict.canonical({"options": options, "settings": settings})


def _named(options: Mapping[str, Sequence[Any]], groups: int) -> list[str]:
    """A name for each group: its values of the options in which it is not like most."""
    names = []
    for place in range(groups):
        own = [
            f"{name}={values[place]}"
            for name, values in options.items()
            if name != SEED and 2 * sum(v == values[place] for v in values) <= len(values)
        ]
        names.append(", ".join(own) or "as most")
    twice = {name for name in names if names.count(name) > 1}
    return [f"{name} ({n + 1})" if name in twice else name for n, name in enumerate(names)]


def _megabytes(one: Any) -> float | None:
    known = [amount for amount in (one.bytes_down, one.bytes_up) if amount is not None]
    return sum(known) / 1e6 if known else None


def _curve(
    runs: Sequence[Compared], metric: str, cost: Callable[[Any], float | None]
) -> tuple[Floats, Floats, Floats] | None:
    """What had been spent, the mean and the spread, at the rounds that all runs measured."""
    each = [dict(run.values(metric)) for run in runs]
    shared = sorted(set.intersection(*map(set, each)))
    values = np.array([[one[at] for at in shared] for one in each], dtype=float)
    if not shared or not np.isfinite(values).any():
        return None
    spent = np.array([_spent(run, shared, cost) for run in runs], dtype=float)
    spread = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(shared))
    return spent.mean(0), values.mean(0), spread


def _spent(
    run: Compared, rounds: Sequence[int], cost: Callable[[Any], float | None]
) -> list[float]:
    """The cost of all trained rounds up to each of these."""
    return [sum(cost(one) or 0.0 for one in run.trained if one.number <= at) for at in rounds]
