"""What privacy adds to a round: one app with and without it, in turns, as real runs.

A hundred nodes with a model of a million parameters, all of them in every round, evaluation and
ledger included. Nodes that train make one epoch over their fourteen images of digits, which is
one step of the ordinary trainer. Nodes that do not train send an update that they have at hand,
so that a round is nothing but the engine and, with it, the privacy.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed.apps import write_federation
from umbel.benchmarks.speed.processes import Watched, watch

NODES = 100
RATIO = 1.3
"""The most that a private round may cost, in rounds without privacy."""

PLAIN: Mapping[str, object] = {"cohort": "all"}
PRIVATE: Mapping[str, object] = {
    "noise-multiplier": 1.0,
    "clipping-norm": 0.01,
    "sampling": "all",
}
"""As many nodes as without; the norm is below what nodes send, so that all are clipped."""

_UMBEL = "from umbel.commands.cli import main; main()"

_CONFIG = """\
work = "training"
client-eval-every = -1
"""

_TASK = """\
import torch
from torch import nn

from umbel import Federation, Iid, Partitioned, TorchTrainer
from umbel.clients.trainers.base import Evaluated, Trained, Weights


def net(options):
    return nn.Sequential(
        nn.Linear(64, 960), nn.ReLU(), nn.Linear(960, 960), nn.ReLU(), nn.Linear(960, 10)
    )


class AtHand:
    \"\"\"Gives every node the same other model, which costs it nothing.\"\"\"

    def __init__(self):
        self.model = {}

    def initial(self, options, seed):
        return Weights({"vector": torch.zeros(SIZE)})

    def train(self, weights, examples, job):
        if not self.model:
            self.model["vector"] = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
        return Trained(Weights(self.model), 1, {"loss": 0.0})

    def evaluate(self, weights, examples, options):
        return Evaluated(1, {"loss": 0.0})


WORK, SIZE = "%s", 1_000_000
federation = Federation(
    trainer=TorchTrainer(net) if WORK == "training" else AtHand(),
    data=Partitioned("digits", Iid()),
)
"""


@dataclass(frozen=True)
class Work:
    """What nodes do in a round.

    Attributes:
        name: `training` or `nothing`.
        what: what the figures call it.
        target: the most that the ratio should be; None where nothing is promised.
    """

    name: str
    what: str
    target: float | None = None

    def folder(self, path: Path) -> Path:
        """Make the app in `path`."""
        return write_federation(path, _TASK % self.name, name="round", config=_CONFIG)


WORKS = (
    Work("training", "nodes train one step on 14 images", RATIO),
    Work("nothing", "nodes do not train"),
)


def measure(*, quick: bool = False, workers: int = 2) -> list[Figure]:
    """The ratio of a private round to the same round without privacy, for both kinds of work.

    Args:
        quick: few rounds, to see that it works.
        workers: processes of the embedded engine.
    """
    repeats, rounds = (1, 4) if quick else (3, 12)
    figures = []
    with tempfile.TemporaryDirectory() as where:
        for work in WORKS:
            app = work.folder(Path(where) / work.name)
            seen = _in_turns(app, Path(where), repeats, rounds, workers)
            medians = {
                name: statistics.median(run.round_s for run in runs) for name, runs in seen.items()
            }
            figures.append(
                Figure(
                    "private-round",
                    f"{work.what}: private over plain, {NODES} x 1 M",
                    medians["private"] / medians["plain"],
                    "x",
                    None if quick else work.target,
                    {f"{name} round s": seconds for name, seconds in medians.items()},
                )
            )
    return figures


def _in_turns(
    app: Path, where: Path, repeats: int, rounds: int, workers: int
) -> dict[str, list[Watched]]:
    seen: dict[str, list[Watched]] = {"plain": [], "private": []}
    for _ in range(repeats):
        for name, options in (("plain", PLAIN), ("private", PRIVATE)):
            seen[name].append(watch(command(app, {"rounds": rounds, **options}, workers), where))
    return seen


def command(app: Path, options: Mapping[str, object], workers: int) -> list[str]:
    """`umbel run` of the app on the embedded engine."""
    text = " ".join(f"{name}={value!r}" for name, value in options.items())
    start = [sys.executable, "-P", "-c", _UMBEL, "run", str(app), "-c", text]
    return [*start, "--nodes", str(NODES), "--workers", str(workers)]
