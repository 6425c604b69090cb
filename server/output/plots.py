"""Drawing for reports: numbers in, one SVG that adapts to light and dark pages and one PNG out.

Matplotlib is imported when something is drawn, never when Umbel is imported, and without pyplot:
no window system, no global figure. Colours are Okabe and Ito's, which colour-blind readers can
tell apart; in the SVG each is a CSS variable that the page sets. Text from apps is drawn as it
is: neither `$` nor a leading underscore means anything.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

INK, MUTED, GRID = "#1c2430", "#5d6673", "#e2e6eb"
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
ORANGE, SKY, PINK, GREY = "#e69f00", "#56b4e9", "#cc79a7", "#949ca6"

_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", VERMILION: "vermilion",
    GREEN: "green", ORANGE: "orange", SKY: "sky", PINK: "pink", GREY: "grey",
}  # fmt: skip
_STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.linewidth": 0.8,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.axisbelow": True, "font.size": 9.5,
    "font.family": "DejaVu Sans", "grid.color": GRID, "grid.linewidth": 0.8,
    "legend.frameon": False, "legend.labelcolor": INK, "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "text.color": INK, "text.parse_math": False,
    "xtick.color": MUTED, "ytick.color": MUTED, "ytick.major.size": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 6),
}  # fmt: skip
_BUCKETS = 400  # of a line: each keeps its first, last, lowest and highest point
_BARS = 100
_DOTS = 1500
_NAMED_NODES = 30


@dataclass(frozen=True)
class Plot:
    """One drawing with what is said about it.

    Attributes:
        name: the stem of the PNG's file name.
        title: a few words.
        sentence: what can be seen, in plain words.
        svg: an `<svg>` element whose colours are CSS variables such as `--blue`.
        png: the same drawing on white, with its title.
        wide: takes the whole width of the page.
    """

    name: str
    title: str
    sentence: str
    svg: str
    png: bytes
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: its name in the legend.
        color: one of this module's colours.
        x: shape (points,), increasing.
        y: shape (points,), with a value that is `drawable`; others leave a gap.
        band: lower and upper edge of a shade around the line, shapes (points,).
        dashed: drawn dashed.
    """

    label: str
    color: str
    x: ArrayLike
    y: ArrayLike
    band: tuple[ArrayLike, ArrayLike] | None = None
    dashed: bool = False


def draw_lines(
    name: str,
    title: str,
    sentence: str,
    lines: Sequence[Line],
    *,
    unit: str,
    zero: bool = False,
    logarithmic: bool = False,
    wide: bool = False,
    across: str = "round",
) -> Plot:
    """Lines over rounds, or over what else they are given.

    Args:
        name: see `Plot`; so are `title` and `sentence`.
        title: see `Plot`.
        sentence: see `Plot`.
        lines: at least one.
        unit: the label of the y axis.
        zero: the y axis starts at zero.
        logarithmic: the y axis may have a logarithmic scale; it gets one where the values are
            positive and spread over more than a factor of 50.
        wide: see `Plot`; there is room for many lines with long labels.
        across: the label of the x axis; rounds are whole numbers.
    """
    labels = [line.label for line in lines]
    columns = _columns(labels, wide)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        label = clean(unit)
        for number, line in enumerate(lines):
            _draw_line(axes, line, 3 - number / len(lines))
        drawn = np.concatenate([drawable(line.y) for line in lines])
        drawn = drawn[np.isfinite(drawn)]
        if zero:
            axes.set_ylim(bottom=0)
        elif logarithmic and drawn.min() > 0 and drawn.max() > 50 * drawn.min():
            _logarithmic(axes.yaxis, axes.set_yscale)
            label += ", logarithmic scale"
        axes.set_ylabel(label)
        if across == "round":
            _rounds_axis(axes)
        else:
            axes.set_xlabel(across)
            axes.grid(axis="y")
        if len(lines) > 1:
            _legend(axes, columns)

    size = (11.6, 3.4 + 0.2 * -(-len(lines) // columns)) if wide else (5.6, 3.1)
    return Plot(name, title, sentence, *_render(name, title, draw, size), wide=wide)


def draw_stack(
    name: str,
    title: str,
    sentence: str,
    rounds: ArrayLike,
    layers: Mapping[str, ArrayLike],
    *,
    unit: str,
) -> Plot:
    """Bars by round, made of layers on top of one another.

    Args:
        name: see `Plot`; so are `title` and `sentence`.
        title: see `Plot`.
        sentence: see `Plot`; where a bar stands for several rounds, that is added.
        rounds: shape (rounds,), increasing.
        layers: label to heights of shape (rounds,), from the bottom up.
        unit: the label of the y axis.
    """
    x = np.asarray(rounds, dtype=float)
    colors = [BLUE, ORANGE, GREEN, VERMILION, SKY, PINK]
    size = -(-len(x) // _BARS)
    if size > 1:
        sentence += f" Each bar is the mean of {size} rounds."

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        centers = _bucket_means(x, size)
        base = np.zeros(len(centers))
        for number, (label, values) in enumerate(layers.items()):
            heights = _bucket_means(np.nan_to_num(np.asarray(values, dtype=float)), size)
            color = GREY if label == "other" else colors[number % len(colors)]
            style = {"color": color, "label": clean(label), "linewidth": 0}
            if len(centers) <= 40:
                axes.bar(centers, heights, 0.82 * size, base, **style)
            else:  # one outline, or the page would show hairlines between the bars
                edges = np.append(centers - size / 2, centers[-1] + size / 2)
                axes.stairs(base + heights, edges, baseline=base.copy(), fill=True, **style)
            base += heights
        axes.set_ylabel(clean(unit))
        _rounds_axis(axes)
        if len(x) == 1:
            axes.set_xlim(x[0] - 3, x[0] + 3)
            axes.set_xticks(x)
        if len(layers) > 1:
            _legend(axes, _columns(list(layers)))

    return Plot(name, title, sentence, *_render(name, title, draw))


def draw_nodes(
    name: str,
    title: str,
    sentence: str,
    nodes: Sequence[str],
    values: ArrayLike,
    examples: ArrayLike | None,
    *,
    unit: str,
    marks: Mapping[str, float],
) -> Plot:
    """How one metric differs from node to node.

    Up to 30 nodes are drawn by name; more as a histogram, and against the number of examples.

    Args:
        name: see `Plot`; so are `title` and `sentence`.
        title: see `Plot`.
        sentence: see `Plot`.
        nodes: names, as many as values.
        values: shape (nodes,), finite.
        examples: shape (nodes,), positive, or None where it is not known.
        unit: what the values are.
        marks: label to value of the one or two lines that help to read the plot.
    """
    y = np.asarray(values, dtype=float)
    sizes = None if examples is None else np.asarray(examples, dtype=float)
    drawn = np.random.default_rng(0).permutation(len(y))[:_DOTS]
    if len(y) > _DOTS and sizes is not None:
        sentence += f" The dots are {_DOTS:,} of the {len(y):,} nodes, chosen at random."

    def draw(figure: Any) -> None:
        if len(y) <= _NAMED_NODES:
            axes = figure.add_subplot()
            _named_nodes(axes, nodes, y, sizes)
            axes.set_xlabel(clean(unit))
            _marks(axes, marks, axes.axvline)
            return
        left = figure.add_subplot(1, 1 if sizes is None else 2, 1)
        _histogram(left, y)
        left.set_xlabel(clean(unit))
        _marks(left, marks, left.axvline)
        if sizes is not None:
            right = figure.add_subplot(1, 2, 2)
            right.plot(sizes[drawn], y[drawn], "o", ms=3.5, mew=0, color=BLUE, alpha=0.55)
            if sizes.max() > 20 * sizes.min():
                _logarithmic(right.xaxis, right.set_xscale)
            right.set_xlabel("examples of the node")
            right.set_ylabel(clean(unit))
            right.grid(axis="both")
            _marks(right, marks, right.axhline)

    height = 1.1 + 0.24 * len(y) if len(y) <= _NAMED_NODES else 3.1
    size = (11.6, max(2.0, height))
    return Plot(name, title, sentence, *_render(name, title, draw, size), wide=True)


def clean(text: str, limit: int = 48) -> str:
    """`text` as one short line without control characters, safe as a label."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return f" {line}" if line.startswith("_") else line  # else matplotlib hides the label


def drawable(values: ArrayLike) -> Floats:
    """`values` with NaN in the place of what no axis can show: infinities and beyond 1e100."""
    numbers = np.asarray(values, dtype=float)
    return np.where(np.abs(numbers) <= 1e100, numbers, np.nan)


def thin(y: Floats, buckets: int = _BUCKETS) -> NDArray[np.intp]:
    """Indices of the points that a line needs to look as if all were drawn.

    Args:
        y: shape (points,).
        buckets: each keeps its first, last, lowest and highest point.

    Returns:
        Increasing indices, at most 4 × `buckets`; all of them where `y` is that short.
    """
    if len(y) <= 4 * buckets:
        return np.arange(len(y))
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(y)), buckets):
        kept.update((int(part[0]), int(part[-1])))
        finite = part[np.isfinite(y[part])]
        if len(finite):
            kept.update((int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])))
    return np.array(sorted(kept))


def _bucket_means(values: Floats, size: int) -> Floats:
    starts = np.arange(0, len(values), size)
    lengths = np.diff(np.append(starts, len(values)))
    means: Floats = np.add.reduceat(values, starts) / lengths
    return means


def _draw_line(axes: Any, line: Line, order: float) -> None:
    x, y = np.asarray(line.x, dtype=float), drawable(line.y)
    kept = thin(y)
    if line.band is not None:
        low, high = (drawable(edge)[kept] for edge in line.band)
        axes.fill_between(x[kept], low, high, color=line.color, alpha=0.16, linewidth=0)
        if len(x) == 1:  # a shade of no width
            axes.vlines(x, low, high, color=line.color, alpha=0.3, linewidth=6)
    axes.plot(
        x[kept],
        y[kept],
        color=line.color,
        label=clean(line.label),
        linestyle=(0, (4, 2)) if line.dashed else "-",
        linewidth=1.8 if len(x) <= 400 else 1.0,
        marker="o" if len(x) <= 41 else None,
        markersize=3.6 if len(x) > 1 else 6,
        markerfacecolor="none" if line.dashed else line.color,
        markeredgewidth=1.2 if line.dashed else 0,
        zorder=order,  # the first line of the legend lies on top
    )


def _named_nodes(axes: Any, nodes: Sequence[str], y: Floats, sizes: Floats | None) -> None:
    order = np.argsort(-y, kind="stable")
    axes.plot(y[order], np.arange(len(y)), "o", color=BLUE, markersize=6, markeredgewidth=0)
    labels = [clean(nodes[i], 32) for i in order]
    if sizes is not None:
        labels = [
            f"{label}  ({sizes[i]:,.0f} examples)" for label, i in zip(labels, order, strict=True)
        ]
    axes.set_yticks(np.arange(len(y)), labels)
    axes.set_ylim(len(y) - 0.4, -0.6)
    axes.margins(x=0.04)
    axes.grid(axis="both")


def _histogram(axes: Any, y: Floats) -> None:
    from matplotlib.ticker import MaxNLocator

    bins = int(np.clip(np.sqrt(len(y)), 10, 40))
    width = y.max() - y.min()
    margin = 0.0 if width > 1e-9 * max(1e-300, abs(y).max()) else 0.05 * max(1e-3, abs(y).max())
    counts, edges = np.histogram(y, bins, (y.min() - margin, y.max() + margin))
    axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=BLUE, linewidth=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel("nodes")
    axes.grid(axis="y")


def _marks(axes: Any, marks: Mapping[str, float], rule: Callable[..., Any]) -> None:
    shown = {label: value for label, value in marks.items() if np.isfinite(value)}
    for (label, value), color in zip(shown.items(), (INK, VERMILION), strict=False):
        rule(value, color=color, linewidth=1.2, linestyle=(0, (4, 2)), label=clean(label))
    if shown:
        _legend(axes, _columns(list(shown)))


def _columns(labels: Sequence[str], wide: bool = False) -> int:
    """Of a legend: one row where all fit, else as many as do."""
    widths = [len(clean(label)) + 6 for label in labels]
    room = 154 if wide else 74
    if sum(widths) <= room:
        return len(labels)
    return max(1, room // max(widths)) if wide else 3


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.015, 1.0),
        ncols=columns,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _rounds_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")


def _logarithmic(axis: Any, set_scale: Callable[[str], None]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    set_scale("log")
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _render(
    name: str, title: str, draw: Callable[[Any], None], size: tuple[float, float] = (5.6, 3.1)
) -> tuple[str, bytes]:
    """SVG and PNG of what `draw` puts on a figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(size, layout="constrained")
        draw(figure)
        vector = io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.suptitle(clean(title, 70), x=0.01, ha="left", size=11, weight="bold", color=INK)
        raster = io.BytesIO()
        figure.savefig(raster, format="png", dpi=144, facecolor="white")
    return _themed(vector.getvalue().decode()), raster.getvalue()


def _themed(svg: str) -> str:
    """The bare `<svg>` element: colours as CSS variables, nothing that reaches beyond it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
