"""The example `private-fashion` end to end: real runs, from the command to the certificate.

Each recipe runs twice on two processes, with a cache that holds the data set alone and then with
the features that the first run left there. What is timed is the whole command.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from umbel.benchmarks.figures import Figure
from umbel.clients.data.datasets import cache_folder, load
from umbel.core.errors import RunError

DATA = "fashion-mnist"
WORKERS = 2
LIMITS = {("quick", "cold"): 180.0, ("best", "cold"): 480.0, ("best", "cached"): 120.0}
"""The most seconds that a recipe may take."""

_UMBEL = "from umbel.commands.cli import main; main()"


def measure(app: Path, *, quick: bool = False) -> list[Figure]:
    """Seconds of each recipe with and without features in the cache.

    Args:
        app: the folder of the example.
        quick: a few rounds of the recipe `quick` only, to see that it works.

    Raises:
        RunError: a run failed.
    """
    load(DATA)  # fetched before the clock runs
    figures = []
    for recipe in ("quick",) if quick else ("quick", "best"):
        with tempfile.TemporaryDirectory() as where:
            cache = Path(where) / "cache"
            cache.mkdir()
            if (cache_folder() / DATA).exists():
                (cache / DATA).symlink_to(cache_folder() / DATA)
            for state in ("cold", "cached"):
                seconds, result = run(app, recipe, cache, Path(where) / state, quick=quick)
                figures.append(
                    Figure(
                        "private-fashion",
                        f"recipe={recipe}, features {state}",
                        seconds,
                        "s",
                        None if quick else LIMITS.get((recipe, state)),
                        {
                            "accuracy": float(result["metrics"]["accuracy"]),
                            "epsilon": float(result["epsilon"]),
                        },
                    )
                )
    return figures


def run(
    app: Path, recipe: str, cache: Path, out: Path, *, quick: bool = False
) -> tuple[float, dict[str, Any]]:
    """One run as a process of its own: its seconds, and what it printed as JSON.

    Raises:
        RunError: it failed.
    """
    options = f"recipe='{recipe}'" + (" rounds=3" if quick else "")
    command = [sys.executable, "-P", "-c", _UMBEL, "run", str(app), "-c", options]
    command += ["--workers", str(WORKERS), "--out", str(out), "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | {"UMBEL_CACHE": str(cache), "FLWR_TELEMETRY_ENABLED": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RunError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seconds, result
