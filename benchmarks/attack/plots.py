"""Plots of a privacy report, each with its chance level and its theoretical ceiling."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from umbel.benchmarks.attack.suite import Report, Row
from umbel.privacy.attacks.audit import true_positive_ceiling
from umbel.privacy.attacks.inversion import psnr
from umbel.privacy.attacks.roc import Roc

matplotlib.use("Agg")

INK = "#222222"
COLOURS = (
    "#0b6e99",
    "#d9730d",
    "#448361",
    "#9065b0",
    "#c14c8a",
    "#8a6d3b",
    "#787774",
    "#d44c47",
    "#2a9d8f",
    "#b5838d",
    "#264653",
    "#e9c46a",
    "#6a4c93",
    "#3d5a80",
)

NO_CLAIM = 16.0
"""Where stacks stand that promise nothing, right of all that do."""


def draw(report: Report, folder: Path) -> list[Path]:
    """Write every plot that the report has data for, as PNG.

    Returns:
        The files: `frontier-DATA.png`, `roc-DATA.png` and `pictures-DATA.png`.
    """
    made: list[Path] = []
    for data in dict.fromkeys(row.data for row in report.rows):
        rows = [row for row in report.rows if row.data == data]
        for name, figure in (
            ("frontier", frontier(rows)),
            ("roc", curves(rows)),
            ("pictures", pictures(rows)),
        ):
            if figure is not None:
                path = folder / f"{name}-{data}.png"
                figure.savefig(path, dpi=110, bbox_inches="tight")
                made.append(path)
    return made


def frontier(rows: Sequence[Row]) -> Figure | None:
    """Accuracy against what is claimed and measured, and against the best membership attack."""
    known = [row for row in rows if row.accuracy() is not None and worst_auc(row) is not None]
    if not known:
        return None
    figure = Figure(figsize=(11.5, 4.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for at, row in enumerate(known):
        colour = COLOURS[at % len(COLOURS)]
        accuracy, worst = row.accuracy(), worst_auc(row)
        assert accuracy is not None
        assert worst is not None
        _claim(left, row, accuracy[0], colour)
        value, low, high, ceiling = worst
        right.errorbar(
            value,
            accuracy[0],
            xerr=[[value - low], [high - value]],
            yerr=[[accuracy[0] - accuracy[1]], [accuracy[2] - accuracy[0]]],
            fmt="o",
            color=colour,
            label=_label(row),
        )
        if ceiling is not None:
            right.plot([ceiling], [accuracy[0]], marker="|", ms=14, color=colour)
    left.set_xscale("symlog", linthresh=0.25)
    ticks = [0, 0.25, 0.5, 1, 2, 4, 8, NO_CLAIM]
    left.set_xticks(ticks, [*(f"{tick:g}" for tick in ticks[:-1]), "no\nclaim"])
    left.set_xlabel("epsilon: o claimed to model users, | measured at least")
    left.set_ylabel("accuracy (95 % interval)")
    right.axvline(0.5, color=INK, lw=0.8, ls=":")
    right.annotate("chance", (0.5, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    right.set_xlim(min(0.45, right.get_xlim()[0]), 1.01)
    right.set_xlabel("AUC of the strongest attack (95 % interval), | ceiling")
    figure.suptitle(f"Privacy and usefulness, {rows[0].data}")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _claim(axes: Axes, row: Row, accuracy: float, colour: str) -> None:
    """What a row claims, and the lower bounds that canaries measured of it."""
    claimed = row.claimed("model-user")
    place = NO_CLAIM if claimed is None or not np.isfinite(claimed) else claimed
    bound = row.measured_bound("model-user")
    if bound is not None:
        axes.plot([bound, place], [accuracy, accuracy], color=colour, lw=0.8)
        axes.plot([bound], [accuracy], marker="|", ms=12, color=colour)
    full = "none" if place == NO_CLAIM else colour
    axes.plot([place], [accuracy], "o", color=colour, markerfacecolor=full)


def curves(rows: Sequence[Row]) -> Figure | None:
    """ROC curves of membership attacks in logarithmic scale."""
    found: list[tuple[Row, str, str, Roc]] = [
        (row, scene, name, curve)
        for row in rows
        for scene, part in row.measured.items()
        for name, curve in part.curves.items()
        if scene in ("training", "hospitals")
    ]
    if not found:
        return None
    scenes = list(dict.fromkeys(scene for _, scene, _, _ in found))
    figure = Figure(figsize=(6.2 * len(scenes), 4.8))
    for at, scene in enumerate(scenes, start=1):
        axes = figure.add_subplot(1, len(scenes), at)
        own = [item for item in found if item[1] == scene]
        strongest: dict[str, tuple[str, Roc, Row]] = {}
        for row, _, name, curve in own:
            best = strongest.get(row.name)
            if best is None or _area(curve) > _area(best[1]):
                strongest[row.name] = (name, curve, row)
        for colour, (label, (name, curve, row)) in zip(
            COLOURS * 3, strongest.items(), strict=False
        ):
            axes.plot(
                np.maximum(curve.false_positives, 1e-4),
                np.maximum(curve.true_positives, 1e-4),
                color=colour,
                lw=1.3,
                label=f"{label} ({name})",
            )
            _ceiling(axes, row, colour)
        grid = np.logspace(-4, 0, 50)
        axes.plot(grid, grid, color=INK, lw=0.8, ls=":", label="chance")
        axes.set(xscale="log", yscale="log", xlim=(5e-4, 1), ylim=(5e-4, 1))
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_title(f"{rows[0].data}, {scene}: strongest attack (dashed: ceiling)")
        axes.legend(fontsize=7)
    return figure


def pictures(rows: Sequence[Row], columns: int = 8) -> Figure | None:
    """The originals, and below them what each attack made of them under each defence."""
    found = [
        (row.name, picture)
        for row in rows
        for part in row.measured.values()
        for picture in part.pictures
    ]
    side = round(float(np.sqrt(found[0][1].originals.shape[1]))) if found else 0
    if not found or side * side != found[0][1].originals.shape[1]:
        return None
    originals = max((picture.originals for _, picture in found), key=len)[:columns]
    figure = Figure(figsize=(0.75 * columns + 2, 0.85 * (len(found) + 1) + 0.5))
    grid = figure.add_gridspec(len(found) + 1, columns, wspace=0.05, hspace=0.3)
    _pictures(figure, grid[0, :], originals, [""] * len(originals), "originals")
    for line, (name, picture) in enumerate(found, start=1):
        shown = picture.guesses[:columns]
        texts = [
            f"{min(psnr(torch.from_numpy(a), torch.from_numpy(b)), 200.0):.0f} dB"
            for a, b in zip(picture.originals, shown, strict=False)
        ]
        _pictures(figure, grid[line, :], shown, texts, f"{name}\n{picture.attack}", columns)
    blind = next(
        (one.chance for row in rows for _, one in row.findings if one.measure == "PSNR in dB"),
        0.0,
    )
    figure.text(
        0.5, 0.9,
        f"{rows[0].data}: what the server makes of an update. Guessing the mean of all images\n"
        f"has {blind:.1f} dB: chance. The ceiling is an exact copy; 200 dB stands for it.",
        ha="center", fontsize=9,
    )  # fmt: skip
    return figure


def _pictures(
    figure: Figure,
    place: Any,
    images: NDArray[np.float32],
    texts: Sequence[str],
    label: str,
    columns: int = 8,
) -> None:
    """A line of square images with texts above them and a label at its left."""
    side = round(float(np.sqrt(images.shape[1])))
    line = place.subgridspec(1, columns, wspace=0.05)
    for at, (image, text) in enumerate(zip(images, texts, strict=True)):
        axes = figure.add_subplot(line[0, at])
        axes.axis("off")
        axes.imshow(image.reshape(side, side).clip(0, 1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(text, fontsize=6, pad=1)
        if at == 0:
            axes.text(
                -0.15, 0.5, label, fontsize=7, ha="right", va="center", transform=axes.transAxes
            )


def _ceiling(axes: Axes, row: Row, colour: str) -> None:
    claimed = row.claimed("model-user")
    delta = next((audit.delta for audit in row.audits), None)
    if claimed is None or delta is None or not np.isfinite(claimed):
        return
    rates = np.logspace(-4, 0, 100)
    axes.plot(rates, true_positive_ceiling(rates, claimed, delta), color=colour, lw=0.8, ls="--")


def worst_auc(row: Row) -> tuple[float, float, float, float | None] | None:
    """Of the attack that comes furthest on the trained model."""
    own = [] if row.main is None else [one for one in row.main.findings if one.measure == "AUC"]
    if not own:
        return None
    worst = max(own, key=lambda one: one.value)
    return worst.value, worst.low, worst.high, worst.ceiling


def _area(curve: Roc) -> float:
    return float(np.trapezoid(curve.true_positives, curve.false_positives))


def _label(row: Row) -> str:
    claimed = row.claimed("model-user")
    return row.name if claimed is None else f"{row.name} (epsilon {claimed:.2g})"
