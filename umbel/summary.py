"""What a person reads at the end of a run."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umbel.core.text import plain

_WHY = {
    "rounds": "all rounds done",
    "early-stop": "stopped early, no more improvement",
    "budget": "stopped, the privacy budget is spent",
}


def lines(result: Mapping[str, Any], report: Path) -> Iterator[str]:
    """The result of a run in a few lines: the report's place, and what one may do next, last."""
    metrics = ", ".join(
        f"{plain(name, 80)} {_number(name, value)}" for name, value in metrics_of(result)
    )
    why = _WHY.get(str(result.get("stopped")), str(result.get("stopped")))
    done = int(result.get("rounds", 0))
    yield f"{done} {'round' if done == 1 else 'rounds'} in {result['seconds']:.1f} s ({why})"
    if metrics:
        yield metrics + (" (on the nodes' own tests)" if result.get("measured") == "nodes" else "")
    for warning in result.get("warnings", ()):
        yield f"warning: {warning}"
    if result.get("epsilon") is not None:
        yield from _privacy(result)
    if result.get("record_epsilon") is not None:
        yield (
            f"records: at every node epsilon {result['record_epsilon']:.4g} or less, at delta "
            f"{result['record_delta']:g}, by the nodes' own statements"
        )
    yield from _summary(result.get("summary"))
    yield f"report: {report}"
    yield from _next(result)


def _next(result: Mapping[str, Any]) -> Iterator[str]:
    """Commands that use the model, where Umbel knows what it is."""
    if "measured" in result:  # an app of a Federation: others keep their model as they like
        run = result["run"]
        yield f"next: umbel predict {run} INPUT | umbel export {run} | umbel compress {run}"


def _privacy(result: Mapping[str, Any]) -> Iterator[str]:
    """What was promised, and against whom nothing was."""
    if result.get("privacy"):
        yield f"privacy: {result['privacy']}"
    against = result.get("epsilon_against") or {}
    open_to = [who for who, epsilon in against.items() if math.isinf(epsilon)]
    others = f" (no protection against the {' or '.join(open_to)})" if open_to else ""
    yield f"epsilon {result['epsilon']:.4g} at delta {result['delta']:g}{others}"
    together = result.get("epsilon_in_total") or {}
    total = max((together.get(who, 0.0) for who in against if who not in open_to), default=0.0)
    if total > result["epsilon"] * 1.01:
        yield f"epsilon {total:.4g} over all runs about the population {result['population']}"


def metrics_of(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The final metrics, accuracy first."""
    return sorted(result.get("metrics", {}).items(), key=lambda item: (item[0] != "accuracy", item))


def _summary(summary: Any) -> Iterator[str]:
    """An app's own summary: a text, or rows of named numbers."""
    if isinstance(summary, str):
        yield from map(plain, summary.splitlines())
    elif isinstance(summary, Mapping):
        width = max((len(str(name)) for name in summary), default=0)
        for name, value in summary.items():
            if isinstance(value, Mapping):
                value = "  ".join(f"{key} {_number(key, number)}" for key, number in value.items())
            yield plain(f"{name!s:<{width}}  {value}")


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return plain(value)
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"
