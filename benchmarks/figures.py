"""Measured figures beside their targets: the table, the JSON and the plot of a benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLUE, GREY, RED = "#2a6f97", "#b8c0c8", "#c0392b"


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        part: of the benchmark that it belongs to.
        what: it says, in a few words.
        value: the median.
        unit: of `value` and of `beside`.
        target: the most it should be; None where nothing is promised.
        beside: what else was measured in the same run, by name.
    """

    part: str
    what: str
    value: float
    unit: str
    target: float | None = None
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        """The figure as JSON's types."""
        return {
            "part": self.part,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "met": self.met,
            "beside": dict(self.beside),
        }


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rows(figures: Sequence[Figure]) -> list[tuple[str, str, str, str, str]]:
    """The cells of a table: part, what, measured, target, beside."""
    verdict = {True: "met", False: "missed"}
    return [
        (
            figure.part,
            figure.what,
            f"{short(figure.value)} {figure.unit}",
            "" if figure.met is None else f"<= {short(figure.target or 0)}  {verdict[figure.met]}",
            ", ".join(f"{name} {short(value)}" for name, value in figure.beside.items()),
        )
        for figure in figures
    ]


def plot(figures: Sequence[Figure], path: Path) -> Path:
    """Bars for every figure with something beside it, one panel each; the dash is the target."""
    from matplotlib.figure import Figure as Canvas

    drawn = [figure for figure in figures if figure.beside or figure.target is not None]
    if not drawn:
        return path
    heights = [1 + len(figure.beside) for figure in drawn]
    canvas = Canvas(figsize=(9, 0.6 * len(drawn) + 0.28 * sum(heights) + 0.4), layout="constrained")
    panels = canvas.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, figure in zip(panels, drawn, strict=True):
        bars = {"umbel": figure.value, **figure.beside}
        panel.barh(list(bars), list(bars.values()), color=[BLUE] + [GREY] * len(figure.beside))
        panel.invert_yaxis()
        panel.margins(x=0.15)
        for place, value in enumerate(bars.values()):
            panel.annotate(
                f"{short(value)} {figure.unit}",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        if figure.target is not None:
            panel.axvline(figure.target, color=RED, linestyle="--", linewidth=1)
        panel.set_title(f"{figure.part}: {figure.what}", loc="left", fontsize=9)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(labelsize=8)
    canvas.savefig(path, dpi=140)
    return path
