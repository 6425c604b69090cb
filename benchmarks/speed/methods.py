"""What a method adds to a round of the bundled example: drift corrections beside FedAvg.

The same nodes take the same local steps; a correction is two additions to every gradient, and
SCAFFOLD sends twice as much both ways.
"""

import statistics
from pathlib import Path

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.bare import Plan
from umbel.benchmarks.speed.training import Case, in_turns

SLOWER = 1.15
"""So much of FedAvg's round may a round take."""

PLAIN = "fedavg"
CORRECTIONS = ("scaffold", "feddyn")


def measure(example: Path, *, quick: bool = False) -> list[Figure]:
    """A round of each method beside one of FedAvg, in turns."""
    plan = Plan(rounds=4 if quick else 10, momentum=0.9, epochs=2, processes=2)
    case = Case("bundled example", example, plan)
    contestants = {name: case.umbel(method=name) for name in (PLAIN, *CORRECTIONS)}
    seen = in_turns(contestants, repeats=1 if quick else 5)
    times = {n: statistics.median(run.round_s for run in runs) for n, runs in seen.items()}
    plain = times[PLAIN]
    return [
        Figure("methods", f"{name}: a round", times[name], "s", SLOWER * plain, {PLAIN: plain})
        for name in CORRECTIONS
    ]
