# ruff: noqa: ARG001, ARG002
"""One line through the origin: tiny, seeded, with a counter that stays on its node."""

from typing import ClassVar

import torch

from umbel import Examples, Federation, Split
from umbel.clients.trainers.base import Evaluated, Trained, Weights

TRUE = torch.tensor([1.0, 2.0, 3.0])


class Slope:
    """Gradient steps with seeded noise; counts its visits in a buffer and in its memory."""

    OPTIONS: ClassVar = {"learning-rate": 0.1, "break-node": -1, "break-round": 0, "how": ""}

    def initial(self, options, seed):
        generator = torch.Generator().manual_seed(seed)
        return Weights({"slope": torch.randn(3, generator=generator)}, {"visits": torch.zeros(1)})

    def train(self, weights, examples, job):
        if job.options["break-node"] == job.node["partition-id"]:
            self._break(job)
        slope = weights.parameters["slope"]
        error = examples.x @ slope - examples.y
        noise = torch.randn(3, generator=torch.Generator().manual_seed(job.seed)) * 0.01
        after = slope - job.learning_rate * (examples.x.T @ error / len(error) + noise)
        visits = weights.buffers["visits"] + 1
        metrics = {"loss": float(error.square().mean()), "visits": float(visits)}
        return Trained(Weights({"slope": after}, {"visits": visits}), len(error), metrics)

    def evaluate(self, weights, examples, options):
        error = examples.x @ weights.parameters["slope"] - examples.y
        metrics = {"loss": float(error.square().mean()), "visits": float(weights.buffers["visits"])}
        return Evaluated(len(error), metrics)

    def _break(self, job):
        if job.options["break-round"] not in (0, job.round):
            return
        if job.options["how"] == "exit":
            raise SystemExit("a node has had enough")
        raise OSError("the disk is on fire")


def line(node, options):
    """Ten points for each of partition % 5 + 1, near the line with the slope 1, 2, 3."""
    generator = torch.Generator().manual_seed(int(options["seed"]) * 1000 + node.partition)
    x = torch.randn(10 * (node.partition % 5 + 1), 3, generator=generator)
    return Split(Examples(x, x @ TRUE), Examples(x[:5], x[:5] @ TRUE))


def held_out(options):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(99))
    return Examples(x, x @ TRUE)


federation = Federation(trainer=Slope(), data=line, test=held_out, name="slope")
