"""The loop that someone would write with PyTorch alone: what a framework is measured against.

    python -m umbel.benchmarks.speed.bare '{"model": "cnn", "nodes": 100, ...}'

The same nodes, data, model and local training as the app it stands beside; plain
`multiprocessing`, plain averaging, no messages, no checkpoints, no report.
"""

import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from umbel.clients.data import datasets
from umbel.clients.data.partition import Dirichlet

State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What is trained. `processes` 0 trains in this process; `evaluate` tests every round."""

    dataset: str = "fashion-mnist"
    model: str = "cnn"
    nodes: int = 100
    cohort: int = 10
    rounds: int = 10
    alpha: float = 0.5
    kept: float = 0.0  # the share of a node's examples that it does not train on
    learning_rate: float = 0.05
    momentum: float = 0.0
    batch: int = 32
    epochs: int = 1
    processes: int = 0
    evaluate: bool = False


def model_named(name: str) -> nn.Module:
    """The models of the apps that this is compared with."""
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    if name == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    if name == "perceptron":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Loop:
    """The data and the model of one process."""

    def __init__(self, plan: Plan) -> None:
        data = datasets.load(plan.dataset)
        train, test = data.prepare(data.train), data.prepare(data.test)
        self.plan, self.model = plan, model_named(plan.model)
        self.x, self.y = _inputs(train.x), torch.from_numpy(np.asarray(train.y)).long()
        self.test_x, self.test_y = _inputs(test.x), torch.from_numpy(np.asarray(test.y)).long()
        self.rows = [
            torch.from_numpy(rows[int(len(rows) * plan.kept + 0.5) :])
            for rows in Dirichlet(plan.alpha).split(np.asarray(train.y), plan.nodes, 0)
        ]

    def train(self, state: State, node: int, seed: int) -> tuple[State, int]:
        """One node's training."""
        plan, model = self.plan, self.model
        torch.manual_seed(seed)
        model.load_state_dict(state)
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=plan.learning_rate, momentum=plan.momentum
        )
        rows = self.rows[node]
        for _ in range(plan.epochs):
            for batch in torch.split(rows[torch.randperm(len(rows))], plan.batch):
                optimizer.zero_grad()
                cross_entropy(model(self.x[batch]), self.y[batch]).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
                optimizer.step()
        return {k: v.detach().clone() for k, v in model.state_dict().items()}, len(rows)

    def accuracy(self, state: State) -> float:
        """On the held-out examples."""
        self.model.load_state_dict(state)
        self.model.eval()
        right = 0
        with torch.inference_mode():
            for x, y in zip(
                torch.split(self.test_x, 512), torch.split(self.test_y, 512), strict=True
            ):
                right += int((self.model(x).argmax(1) == y).sum())
        return right / len(self.test_y)


def _inputs(x: Any) -> Tensor:
    """Pixels from 0 to 1."""
    inputs = torch.from_numpy(np.array(x))
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs.float()


_loop: Loop


def _work(task: tuple[dict[str, Any], int, int]) -> tuple[dict[str, Any], int]:
    torch.set_num_threads(1)
    state, node, seed = task
    trained, count = _loop.train({k: torch.from_numpy(v) for k, v in state.items()}, node, seed)
    return {k: v.numpy() for k, v in trained.items()}, count


def average(results: Sequence[tuple[State, int]]) -> State:
    """Mean of the states, by number of examples."""
    total = sum(count for _, count in results)
    mean = {name: torch.zeros_like(value) for name, value in results[0][0].items()}
    for state, count in results:
        for name, value in state.items():
            mean[name].add_(value, alpha=count / total)
    return mean


def main(plan: Plan) -> None:
    """Train, and print a line a round."""
    global _loop
    _loop = loop = Loop(plan)
    random = np.random.default_rng(0)
    pool = None
    if plan.processes:
        pool = multiprocessing.get_context("fork").Pool(plan.processes)
    else:
        torch.set_num_threads(1)
    state: State = {k: v.clone() for k, v in loop.model.state_dict().items()}
    for number in range(1, plan.rounds + 1):
        chosen = random.choice(plan.nodes, plan.cohort, replace=False).tolist()
        seeds = random.integers(1 << 31, size=plan.cohort).tolist()
        if pool is None:
            results = [loop.train(state, *pair) for pair in zip(chosen, seeds, strict=True)]
        else:
            arrays = {k: v.numpy() for k, v in state.items()}
            tasks = [(arrays, *pair) for pair in zip(chosen, seeds, strict=True)]
            results = [
                ({k: torch.from_numpy(v) for k, v in trained.items()}, count)
                for trained, count in pool.imap_unordered(_work, tasks)
            ]
        state = average(results)
        said = f"  accuracy {loop.accuracy(state):.3f}" if plan.evaluate else ""
        print(f"round {number}/{plan.rounds}{said}", flush=True)
    if pool is not None:
        pool.terminate()


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])))
