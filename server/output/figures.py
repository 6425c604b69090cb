"""Which plots a run deserves: from its rounds to drawings, each with the sentence it needs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbel.server.evaluation import direction, words_of
from umbel.server.output.plots import (
    BLUE,
    GREEN,
    VERMILION,
    Floats,
    Line,
    Plot,
    draw_lines,
    draw_nodes,
    draw_stack,
    drawable,
)
from umbel.server.output.progress import headline, number

_PHASES = ("sample", "train", "aggregate", "evaluate", "federated")
_METRICS = 8  # more panels than this help nobody


@dataclass(frozen=True)
class Round:
    """One line of `metrics.jsonl` with everything in it checked; what is unusable is missing."""

    number: int
    seconds: float | None
    phases: Mapping[str, float]
    bytes_down: float | None
    bytes_up: float | None
    clients: float | None
    failed: Sequence[tuple[str, str]]
    metrics: dict[str, float]
    train: dict[str, float]
    federated: dict[str, dict[str, float]]
    epsilon: float | None
    simulated: float | None = None
    judged: Sequence[tuple[str, float, str]] = ()

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Round":
        """Read a line that any version of any app may have written."""
        failed, judged = line.get("failed"), line.get("judged")
        return cls(
            number=int(_number(line.get("round")) or 0),
            seconds=_amount(line.get("seconds")),
            phases={
                str(name): seconds
                for name, part in _mapping(line.get("phases")).items()
                if (seconds := _amount(part)) is not None
            },
            bytes_down=_amount(line.get("bytes_down")),
            bytes_up=_amount(line.get("bytes_up")),
            clients=_amount(line.get("clients")),
            failed=[
                (str(entry.get("node", "?")), str(entry.get("reason", "")))
                for entry in (failed if isinstance(failed, list) else [])
                if isinstance(entry, Mapping)
            ],
            metrics=_numbers(line.get("metrics")),
            train=_numbers(line.get("train")),
            federated={
                str(name): numbers
                for name, part in _mapping(line.get("federated")).items()
                if (numbers := _numbers(part))
            },
            epsilon=_number(line.get("epsilon")),
            simulated=_amount(line.get("simulated_s")),
            judged=[
                (str(entry.get("node", "?")), influence, str(entry.get("rule", "")))
                for entry in (judged if isinstance(judged, list) else [])
                if isinstance(entry, Mapping)
                and (influence := _amount(entry.get("influence"))) is not None
            ],
        )

    def has(self, name: str) -> bool:
        """Whether the central evaluation gave a finite `name`."""
        return math.isfinite(self.metrics.get(name, math.nan))


def plots_of(rounds: Sequence[Round], nodes: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Every plot for which there is something to show, most important first."""
    plots = [_metric(rounds, name, stem) for name, stem in _metrics(rounds)]
    plots += [_by_devices(rounds), _nodes(rounds, nodes)]
    trained = [one for one in rounds if one.number > 0]
    plots += [_epsilon(trained), _bytes(trained), _seconds(trained)]
    return [plot for plot in plots if plot is not None]


def is_share(name: str, values: Sequence[float]) -> bool:
    """Whether a metric is a share of one that reads best as a percentage."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(words_of(name) & {"accuracy", "acc"}) and all(0 <= value <= 1 for value in finite)


def metric_text(name: str, value: float) -> str:
    """A metric as one reads it: `81.2 %` for an accuracy, else three significant digits."""
    share = is_share(name, [value]) and math.isfinite(value)
    return f"{100 * value:.1f}\u00a0%" if share else number(value)


def title_text(name: str) -> str:
    """A metric's name as a title begins: `Accuracy`, `RMSE`, or as the app spells it."""
    if name in ("rmse", "mse", "mae", "auc", "f1", "r2"):
        return name.upper()
    return name.capitalize() if name.islower() else name


def size_text(amount: float) -> str:
    """Bytes in decimal units: `176 kB`, `1.41 GB`."""
    scale, unit = _size_unit(amount)
    return f"{amount:.0f}\u00a0B" if unit == "B" else f"{amount / scale:.3g}\u00a0{unit}"


def _size_unit(amount: float) -> tuple[float, str]:
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while power < len(units) - 1 and amount >= 999.5 * 1000.0**power:
        power += 1
    return 1000.0**power, units[power]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _amount(value: object) -> float | None:
    """A number of seconds, bytes or nodes: not negative and one that can be, or missing."""
    found = _number(value)
    return found if found is not None and 0 <= found <= 1e100 else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _numbers(value: object) -> dict[str, float]:
    found = {str(name): _number(part) for name, part in _mapping(value).items()}
    return {name: part for name, part in found.items() if part is not None}


def _metrics(rounds: Sequence[Round]) -> list[tuple[str, str]]:
    """Names of metrics, the main one first, each with a file stem of its own."""
    names: dict[str, None] = {}
    for one in rounds:
        names |= dict.fromkeys([*one.metrics, *one.federated])
    for one in rounds:
        names |= dict.fromkeys(one.train)
    first = headline(names)
    ordered = [name for name in (first, "loss") if name is not None and name in names]
    stems: dict[str, str] = {}
    for name in dict.fromkeys([*ordered, *names]):
        stem = "metric-" + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "plot")
        while stem in stems.values():
            stem += "-2"
        stems[name] = stem
    return list(stems.items())[:_METRICS]


def _metric(rounds: Sequence[Round], name: str, stem: str) -> Plot | None:
    """One metric over the rounds: central, over the nodes, and while training."""
    central = [(one.number, one.metrics[name]) for one in rounds if name in one.metrics]
    fair = [(one.number, one.federated[name]) for one in rounds if name in one.federated]
    train = [(one.number, one.train[name]) for one in rounds if name in one.train]
    values = [value for _, value in [*central, *train]] + [
        value for _, part in fair for key, value in part.items() if key != "nodes"
    ]
    broken = np.isnan(drawable(values)).sum()
    if broken == len(values):
        return None
    scale = 100.0 if is_share(name, values) else 1.0
    lines, says = [], []
    if central:
        lines.append(_line("coordinator", BLUE, central, scale))
        says.append("The coordinator measures the model on its own data.")
    if fair:
        lines += _federated(fair, scale, bool(np.nanmin(drawable(values)) >= 0))
        says.append("The nodes measure it on theirs." if central else "The nodes measure it.")
        if any("spread" in part for _, part in fair):
            says.append("The shade is one standard deviation around their mean.")
        if any("worst_decile" in part for _, part in fair):
            says.append("“Worst tenth” is the mean of the worst tenth of the nodes.")
    if train:
        lines.append(_line("training", GREEN, train, scale))
        says.append("Training is the mean that the nodes report while they train.")
    sentence = " ".join(says)
    if broken:
        sentence += f" {broken:,} values are not finite and are left out."
    unit = f"{name} (%)" if scale == 100 else name
    return draw_lines(
        stem, title_text(name), sentence, lines, unit=unit, logarithmic=direction(name) <= 0
    )


def _by_devices(rounds: Sequence[Round]) -> Plot | None:
    """The main metric over the time of simulated devices."""
    timed = [(one.simulated, {**_means(one), **one.metrics}) for one in rounds]
    name = headline({name: 0 for at, found in timed if at is not None for name in found})
    points = [(at, found[name]) for at, found in timed if at is not None and name in found]
    values = [value for _, value in points]
    if name is None or not np.isfinite(drawable(values)).any():
        return None
    scale = 100.0 if is_share(name, values) else 1.0
    return draw_lines(
        "device-time",
        f"{title_text(name)} by the time of devices",
        f"What a virtual clock said when each model was made; it ended at {points[-1][0]:.3g} s.",
        [_line("model", BLUE, points, scale)],
        unit=f"{name} (%)" if scale == 100 else name,
        logarithmic=direction(name) <= 0,
        across="seconds of simulated devices",
    )


def _means(one: Round) -> dict[str, float]:
    """What the nodes measured, where they did."""
    return {name: part["mean"] for name, part in one.federated.items() if "mean" in part}


def _line(
    label: str,
    color: str,
    points: Sequence[tuple[float, float]],
    scale: float,
    dashed: bool = False,
) -> Line:
    x, y = np.array(points, dtype=float).T
    return Line(label, color, x, y * scale, dashed=dashed)


def _federated(
    points: Sequence[tuple[int, Mapping[str, float]]], scale: float, positive: bool
) -> list[Line]:
    x = np.array([at for at, _ in points], dtype=float)
    mean, spread, worst = (
        scale * drawable([part.get(key, math.nan) for _, part in points])
        for key in ("mean", "spread", "worst_decile")
    )
    low, high = mean - spread, mean + spread
    if scale == 100:  # a share cannot leave 0 to 100 %, whatever mean and deviation say
        low, high = np.clip(low, 0, 100), np.clip(high, 0, 100)
    elif positive:
        low = np.clip(low, 0, None)
    lines = [Line("nodes, mean", VERMILION, x, mean, band=(low, high))]
    if np.isfinite(worst).any():
        lines.append(Line("nodes, worst tenth", VERMILION, x, worst, dashed=True))
    return lines


def _nodes(rounds: Sequence[Round], nodes: Sequence[Mapping[str, Any]]) -> Plot | None:
    """How the nodes differed in the last federated evaluation."""
    rows = [(str(node.get("node", "?")), _numbers(node)) for node in nodes]
    name = headline(
        {key: 0 for _, row in rows for key in row if key not in ("node", "examples", "round")}
    )
    rows = [row for row in rows if name is not None and abs(row[1].get(name, math.nan)) <= 1e100]
    if name is None or len(rows) < 2:
        return None
    values = np.array([row[name] for _, row in rows])
    examples = np.array([row.get("examples", math.nan) for _, row in rows])
    scale = 100.0 if is_share(name, list(values)) else 1.0
    last = next((one.federated for one in reversed(rounds) if name in one.federated), {})
    marks = {
        label: scale * last[name][key]
        for label, key in (("mean", "mean"), ("worst tenth", "worst_decile"))
        if key in last.get(name, {})
    }
    sentence = (
        f"The {name} of the last model on the data of each of {len(rows):,} nodes: "
        f"from {metric_text(name, values.min())} to {metric_text(name, values.max())}, "
        f"half of the nodes between {metric_text(name, np.quantile(values, 0.25))} "
        f"and {metric_text(name, np.quantile(values, 0.75))}."
    )
    return draw_nodes(
        "nodes",
        f"{title_text(name)} by node",
        sentence,
        [node for node, _ in rows],
        scale * values,
        examples if np.isfinite(examples).all() and (examples > 0).all() else None,
        unit=f"{name} (%)" if scale == 100 else name,
        marks=marks,
    )


def _epsilon(trained: Sequence[Round]) -> Plot | None:
    points = [(one.number, one.epsilon) for one in trained if one.epsilon is not None]
    if np.isnan(drawable([value for _, value in points])).all():
        return None
    return draw_lines(
        "epsilon",
        "Epsilon",
        "What had been charged against whoever sees the models, after each round; the box above "
        "says whom it protects, and when.",
        [_line("epsilon", BLUE, points, 1.0)],
        unit="epsilon spent",
        zero=True,
    )


def _bytes(trained: Sequence[Round]) -> Plot | None:
    down, up = (_column(trained, name) for name in ("bytes_down", "bytes_up"))
    total = np.nan_to_num(down) + np.nan_to_num(up)
    if not total.any():
        return None
    scale, unit = _size_unit(float(total.max()))
    return draw_stack(
        "bytes",
        "Traffic by round",
        f"What went to the nodes and came back: {size_text(np.nansum(down))} down and "
        f"{size_text(np.nansum(up))} up in all.",
        [one.number for one in trained],
        {"to the nodes": down / scale, "from the nodes": up / scale},
        unit=f"{unit} a round",
    )


def _seconds(trained: Sequence[Round]) -> Plot | None:
    whole = np.nan_to_num(_column(trained, "seconds"))
    names = dict.fromkeys(name for one in trained for name in one.phases)
    ordered = [*(n for n in _PHASES if n in names), *(n for n in names if n not in _PHASES)]
    layers = {
        name: np.nan_to_num([one.phases.get(name, 0.0) for one in trained]) for name in ordered
    }
    layers = {name: values for name, values in layers.items() if values.any()}
    if not whole.any() and not layers:
        return None
    rest = np.clip(whole - sum(layers.values(), np.zeros(len(trained))), 0, None)
    if rest.sum() > 0.005 * whole.sum():
        layers["other" if layers else "whole round"] = rest
    times = whole if whole.any() else sum(layers.values(), np.zeros(len(trained)))
    return draw_stack(
        "seconds",
        "Time by round",
        f"Where the time of a round went; the median round took {np.median(times):.3g} s.",
        [one.number for one in trained],
        layers,
        unit="seconds a round",
    )


def _column(rounds: Sequence[Round], name: str) -> Floats:
    values = [getattr(one, name) for one in rounds]
    return np.array([math.nan if value is None else value for value in values], dtype=float)
