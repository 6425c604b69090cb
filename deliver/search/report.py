"""What a search found: `search.json`, and a drawing with one slice for each option."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_slices(
    trials: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str, path: Path
) -> None:
    """Draw the score of every finished trial against each option.

    Args:
        trials: each with `options`, `score` and `state`.
        names: of the options.
        metric: that the score is.
        path: of the drawing.
    """
    from matplotlib.figure import Figure

    done = [one for one in trials if one["state"] == "complete"]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(all_axes, names, strict=True):
        values = [one["options"][name] for one in done]
        texts = any(isinstance(value, str | bool) for value in values)
        axes.scatter(
            list(map(str, values)) if texts else values, [one["score"] for one in done], s=18
        )
        numbers = [] if texts else values
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > 30:
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"{metric} on the validation half")
    figure.savefig(path, dpi=120)
