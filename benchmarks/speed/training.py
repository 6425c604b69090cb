"""Rounds of training: apps on the embedded engine beside bare PyTorch loops and Flower on Ray.

Each runs as a process of its own, timed from the outside by the lines that it prints; the
contestants take turns, and what is reported are medians over all their rounds.
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed import ray_side
from umbel.benchmarks.speed.bare import Plan
from umbel.benchmarks.speed.processes import Watched, watch
from umbel.core.options import Options

SLOWER = 1.10
START_UP_S = 2.0
MEMORY = 1.3
BARE = "bare loop"

_UMBEL = "from umbel.commands.cli import main; main()"

_TASK = """\
from torch import nn

from umbel import Dirichlet, Federation, Partitioned, TorchTrainer
from umbel.benchmarks.speed.bare import model_named


def net(options):
    return model_named(options["model"])


federation = Federation(
    trainer=TorchTrainer(net),
    data=Partitioned("fashion-mnist", Dirichlet(1e6)),
    options={"model": "logistic"},
)
"""


@dataclass(frozen=True)
class Case:
    """An app, and the bare loop that does the same.

    Attributes:
        name: what the figures call it.
        app: the app's folder.
        plan: of the bare loop.
        options: of the app.
        workers: of the embedded engine.
    """

    name: str
    app: Path
    plan: Plan
    options: Options = field(default_factory=dict)
    workers: int = 2

    def bare(self) -> list[str]:
        """The command of the bare loop."""
        plan = json.dumps(asdict(self.plan))
        return [sys.executable, "-P", "-m", "umbel.benchmarks.speed.bare", plan]

    def umbel(self, **changes: str) -> list[str]:
        """The command of the embedded engine."""
        options = {**self._options(), **changes}
        text = " ".join(f"{name}={value!r}" for name, value in options.items())
        command = [sys.executable, "-P", "-c", _UMBEL, "run", str(self.app), "-c", text]
        return [*command, "--nodes", str(self.plan.nodes), "--workers", str(self.workers)]

    def ray(self) -> list[str]:
        """The command of Flower's simulation."""
        return ray_side.app_command(self.app, self.plan.nodes, self._options())

    def _options(self) -> dict[str, bool | int | float | str]:
        plan = self.plan
        every = 1 if plan.evaluate else plan.rounds
        return {
            "rounds": plan.rounds,
            "cohort": "fixed",
            "cohort-size": plan.cohort,
            "learning-rate": plan.learning_rate,
            "momentum": plan.momentum,
            "local-epochs": plan.epochs,
            "batch-size": plan.batch,
            "evaluate-every": every,
            "client-eval-every": -1,
            **self.options,
        }


def measure_example(example: Path, *, quick: bool = False, flower: bool = False) -> list[Figure]:
    """The bundled example, and the same model on 1,000 nodes with 60 images each."""
    rounds = 4 if quick else 10
    plan = Plan(rounds=rounds, momentum=0.9, epochs=2, processes=2, evaluate=True)
    many = replace(plan, nodes=1000, cohort=100, alpha=1e6, epochs=1)
    bundled = Case("bundled example", example, plan)
    thousand = Case("100 of 1,000 nodes of 60 images", example, many, {"alpha": 1e6})
    figures = []
    for case in (bundled, thousand):
        contestants = {BARE: case.bare(), "umbel": case.umbel()}
        if flower:
            contestants["Flower under Ray"] = case.ray()
        seen = in_turns(contestants, repeats=1 if quick else 3)
        figures.append(_rounds(case.name, seen, SLOWER))
        if case is bundled:
            figures += [_start_up(case.name, seen), _memory(case.name, contestants)]
    return figures


def measure_small(digits: Path, *, quick: bool = False) -> list[Figure]:
    """Small models: one by one and batched, in one process, and over two.

    Args:
        digits: the app that `umbel new` makes.
        quick: few rounds.
    """
    figures = []
    with tempfile.TemporaryDirectory() as where:
        images = Path(where) / "images"
        shutil.copytree(digits, images)
        (images / "task.py").write_text(_TASK, encoding="utf-8")
        rounds = 8 if quick else 40
        hundred = Plan(nodes=1000, cohort=100, rounds=rounds, alpha=1e6)
        small = Plan("digits", "digits", 10, 10, rounds, 1.0, 0.2, 0.1, batch=16, epochs=2)
        cases = [
            Case(
                f"{model}, 100 nodes of 60 images",
                images,
                replace(hundred, model=model),
                {"model": model},
            )
            for model in ("logistic", "perceptron")
        ]
        for case in [*cases, Case("app of `umbel new`, 10 nodes", digits, small)]:
            alone = replace(case, workers=0)
            contestants = {
                BARE: case.bare(),
                "umbel": alone.umbel(),
                "batched=off": alone.umbel(batched="off"),
                "2 workers": case.umbel(),
            }
            seen = in_turns(contestants, repeats=1 if quick else 3)
            figures.append(_rounds(case.name, seen, 1.0, unit="ms"))
    return figures


def in_turns(contestants: Mapping[str, Sequence[str]], *, repeats: int) -> dict[str, list[Watched]]:
    """Run every command `repeats` times, in turns."""
    seen: dict[str, list[Watched]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as where:
        for _ in range(repeats):
            for name, command in contestants.items():
                seen[name].append(watch(command, Path(where)))
    return seen


def _rounds(
    name: str, seen: Mapping[str, Sequence[Watched]], limit: float, unit: str = "s"
) -> Figure:
    scale = 1e3 if unit == "ms" else 1.0
    times = {
        who: scale * statistics.median(run.round_s for run in runs) for who, runs in seen.items()
    }
    ours = times.pop("umbel")
    return Figure("training", f"{name}: a round", ours, unit, limit * times[BARE], times)


def _start_up(name: str, seen: Mapping[str, Sequence[Watched]]) -> Figure:
    times = {who: statistics.median(run.start_up_s for run in runs) for who, runs in seen.items()}
    ours = times.pop("umbel")
    return Figure("training", f"{name}: start-up", ours, "s", times[BARE] + START_UP_S, times)


def _memory(name: str, contestants: Mapping[str, Sequence[str]]) -> Figure:
    """Watched in runs of their own, because watching takes processor time."""
    with tempfile.TemporaryDirectory() as where:
        peaks = {
            who: watch(command, Path(where), memory=True).peak_bytes / 1e6
            for who, command in contestants.items()
        }
    ours = peaks.pop("umbel")
    return Figure("training", f"{name}: peak memory", ours, "MB", MEMORY * peaks[BARE], peaks)
