"""The plot of `umbel compress`: size against quality, the models that no other one beats joined."""

from collections.abc import Sequence
from pathlib import Path

from umbel.deliver.compression.compress import Variant


def front(variants: Sequence[Variant], metric: str, *, higher: bool) -> list[Variant]:
    """The variants that no smaller or equal one is better than, by size."""
    best: list[Variant] = []
    sign = 1 if higher else -1
    for one in sorted(variants, key=lambda v: (v.size, -sign * v.metrics[metric])):
        if not best or sign * one.metrics[metric] > sign * best[-1].metrics[metric]:
            best.append(one)
    return best


def draw(original: Variant, variants: Sequence[Variant], path: Path) -> Path | None:
    """Draw the plot; None where the model has no metric."""
    metric = next((m for m in ("accuracy", "rmse") if m in original.metrics), None)
    if metric is None:
        return None
    from matplotlib.figure import Figure

    made = [original, *(one for one in variants if not one.why_not)]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    joined = front(made, metric, higher=metric == "accuracy")
    axes.plot(
        [one.size / 1000 for one in joined], [one.metrics[metric] for one in joined],
        color="0.6", zorder=1,
    )  # fmt: skip
    for one in made:
        axes.scatter(one.size / 1000, one.metrics[metric], s=25, zorder=2)
        axes.annotate(
            str(one.recipe), (one.size / 1000, one.metrics[metric]), fontsize=8,
            xytext=(4, 4), textcoords="offset points",
        )  # fmt: skip
    axes.set(xlabel="size of the file (kB)", ylabel=metric, xscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
