"""What memory a run of the embedded engine takes, in models, and how long a large round takes.

Measured is the process tree of `umbel run`: the largest sum of proportional set sizes, so pages
that processes share count once, less that of the same run of a tiny model. The trainer adds a
number to its arrays: what is left is what the engine, the node's half and the rounds hold.
"""

import sys
import tempfile
from pathlib import Path

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.apps import write_federation
from umbel.benchmarks.speed.processes import Watched, watch

LARGE = 10_000_000
"""Float32 parameters."""
TINY = 1000
NODES = 4
ROUNDS = 4
MODELS = {0: 6.0, 2: 8.0}
"""The most models above base, by worker processes."""
HUGE = (100_000_000, 300_000_000)
HUGE_ROUND_S = 30.0
"""Seconds for a round of the largest model."""

_TASK = """\
import numpy as np

from umbel import Federation, FunctionTrainer


def initial(options):
    return {"w": np.zeros(int(options["size"]), np.float32)}


def train(arrays, examples, job):
    arrays["w"] += 0.01
    return arrays, 1, {}


federation = Federation(
    trainer=FunctionTrainer(initial, train, options={"size": 1000}),
    data=lambda node, options: [node.partition],
)
"""


def measure(*, quick: bool = False, size: int = LARGE) -> list[Figure]:
    """Models above base with and without worker processes.

    Args:
        quick: a tenth of the size: a check that it works, not a measurement.
        size: float32 parameters of the model.
    """
    return [figure for figure, _ in _measured(size // 10 if quick else size)]


def measure_large(*, quick: bool = False) -> list[Figure]:
    """The same of models of 100 and 300 million parameters, and the seconds of their rounds.

    Args:
        quick: a hundredth of the sizes: a check that it works, not a measurement.
    """
    figures = []
    for size in (size // 100 if quick else size for size in HUGE):
        for figure, seen in _measured(size):
            bar = HUGE_ROUND_S if size == HUGE[-1] else None
            pace = Figure("memory", f"{figure.what}: a round", seen.round_s, "s", bar)
            figures += [figure, pace]
    return figures


def _measured(size: int) -> list[tuple[Figure, Watched]]:
    found = []
    with tempfile.TemporaryDirectory() as where:
        app = write_federation(Path(where) / "app", _TASK, name="memory", config="")
        for workers, most in MODELS.items():
            base = run(app, TINY, workers)
            seen = run(app, size, workers)
            models = (seen.peak_bytes - base.peak_bytes) / (4 * size)
            where_ = f"{workers} workers" if workers else "in process"
            figure = Figure(
                "memory",
                f"{size / 1e6:g} M float32, {NODES} nodes, {where_}",
                models,
                "models",
                most,
                {"seconds a round": seen.round_s, "base in MB": base.peak_bytes / 1e6},
            )
            found.append((figure, seen))
    return found


def run(app: Path, size: int, workers: int) -> Watched:
    """Run the app with a model of this size; what was seen of it."""
    options = f"size={size} rounds={ROUNDS} client-eval-every=-1"
    command = [
        *(sys.executable, "-P", "-c", "from umbel.commands.cli import main; main()"),
        *("run", str(app), "--nodes", str(NODES), "--workers", str(workers), "-c", options),
    ]
    return watch(command, app, memory=True)
