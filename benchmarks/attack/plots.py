"""Plots of a privacy report, each with its chance level and its theoretical ceiling."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    """Accuracy against the best membership attack, with intervals and the ceilings."""
    points = [(row, row.accuracy(), worst_auc(row)) for row in rows]
    found = [(row, a, m) for row, a, m in points if a is not None and m is not None]
    if not found:
        return None
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.add_subplot()
    for at, (row, accuracy, (value, low, high, ceiling)) in enumerate(found):
        colour = COLOURS[at % len(COLOURS)]
        axes.errorbar(
            value,
            accuracy[0],
            xerr=[[value - low], [high - value]],
            yerr=[[accuracy[0] - accuracy[1]], [accuracy[2] - accuracy[0]]],
            fmt="o",
            color=colour,
            label=_label(row),
        )
        if ceiling is not None:
            axes.plot([ceiling], [accuracy[0]], marker="|", ms=14, color=colour)
    axes.axvline(0.5, color=INK, lw=0.8, ls=":")
    axes.annotate("chance", (0.5, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    axes.set_xlim(min(0.45, axes.get_xlim()[0]), 1.01)
    axes.set_xlabel("AUC of the strongest attack (95 % interval; | is the ceiling of the claim)")
    axes.set_ylabel("accuracy (95 % interval)")
    axes.set_title(f"Privacy and usefulness, {rows[0].data}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


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
    """Originals above what each attack made of them, a pair of rows for each defence."""
    found = [
        (row.name, picture)
        for row in rows
        for part in row.measured.values()
        for picture in part.pictures
    ]
    side = round(float(np.sqrt(found[0][1].originals.shape[1]))) if found else 0
    if not found or side * side != found[0][1].originals.shape[1]:
        return None
    figure = Figure(figsize=(columns * 0.8 + 2.2, 1.7 * len(found)))
    blind = next(
        (one.chance for row in rows for _, one in row.findings if one.measure == "PSNR in dB"),
        0.0,
    )
    figure.suptitle(
        f"{rows[0].data}: originals above, reconstructions below with their PSNR. The mean of all "
        f"images, which needs no attack, has {blind:.1f} dB; an exact copy has no limit.",
        fontsize=9,
        y=1.0,
    )
    for line, (name, picture) in enumerate(found):
        originals = torch.from_numpy(picture.originals)
        for half, images in enumerate((picture.originals, picture.guesses)):
            for at in range(columns):
                axes = figure.add_subplot(
                    2 * len(found), columns, (2 * line + half) * columns + at + 1
                )
                axes.axis("off")
                if at < len(images):
                    axes.imshow(
                        images[at].reshape(side, side).clip(0, 1), cmap="gray", vmin=0, vmax=1
                    )
                if at < len(images) and half == 1:
                    quality = min(psnr(originals[at], torch.from_numpy(images[at])), 200.0)
                    axes.set_title(f"{quality:.0f} dB", fontsize=7, pad=2)
                if at == 0:
                    text = f"{name}\n{picture.attack}" if half == 0 else "reconstructed"
                    axes.text(
                        -0.2, 0.5, text, fontsize=7, ha="right", va="center",
                        transform=axes.transAxes,
                    )  # fmt: skip
    return figure


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
