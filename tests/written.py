"""Apps of a federation that a test writes: one file of its own, the rest is always the same."""

from pathlib import Path

HALVES = {
    f"{side}_app.py": f"from task import federation\n\napp = federation.{side}_app()\n"
    for side in ("server", "client")
}
"""The files of both apps, by name."""

_PROJECT = """
[project]
name = "{name}"
version = "1"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
{options}
"""


def write_app(folder: Path, task: str, options: str) -> Path:
    """Write an app, called as its folder.

    Args:
        folder: is made.
        task: the text of `task.py`, which makes the `federation`.
        options: lines of TOML.
    """
    folder.mkdir()
    project = _PROJECT.format(name=folder.name, options=options)
    for name, text in {**HALVES, "task.py": task, "pyproject.toml": project}.items():
        (folder / name).write_text(text)
    return folder


NORMED = """
import numpy as np
import torch
from torch import nn
from umbel import Examples, Federation, Split, TorchTrainer

class Norm(nn.BatchNorm1d):
    # A node whose inputs are above 1e5 gets statistics that are no numbers.
    def forward(self, x):
        out = super().forward(x)
        if self.training and float(x.detach().abs().max()) > 1e5:
            self.running_var.data.fill_(float("nan"))  # unseen by autograd
        return out

def net():
    return nn.Sequential(nn.Linear(4, 16), Norm(16), nn.ReLU(), nn.Linear(16, 3))

def make(seed, n):
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, n)
    return Examples((random.normal(size=(n, 4)) * 3 + 20 + 5 * y[:, None]).astype("float32"), y)

def data(node, options):
    train = make(node.partition, 64 + 8 * node.partition)
    if node.partition == options["huge"]:
        train = Examples(train.x * np.float32(1e6), train.y)
    return Split(train, make(100 + node.partition, 40))

federation = Federation(
    TorchTrainer(net, learning_rate=0.5), data, HELD,
    options={"batch-size": 16, "huge": -1}, name="normed",
)
"""
"""A task with batch normalisation. `HELD` stands for the held-out examples; node `huge` has inputs
from which its running statistics become NaN, while what it trains stays finite."""
