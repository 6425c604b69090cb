"""Least squares on nodes with different optima and curvature, in float64, where all is known.

Node i minimises f_i(w) = |X_i w - y_i|^2 / m with full batches, so its gradient is
2 / m X_i' (X_i w - y_i) and everything that a method should reach has a closed form. `rounds` plays
both halves of a stack over gradient descent, without messages; that the trainers take the same
steps is tested beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from umbel.clients.data.examples import Examples
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.strategies.collect import Sum
from umbel.strategies.contexts import Memory, NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.objective import Correction
from umbel.strategies.stack import Stack, own_context

SIZE, NODES, ROWS = 4, 5, 40
RATE = 0.03


def line() -> nn.Module:
    return nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)


TRAINER = TorchTrainer(line, loss="mse", batch_size=0, learning_rate=RATE)


def nodes(seed: int = 0) -> list[Examples]:
    """Each with its own solution and its own curvature."""
    generator = np.random.default_rng(seed)
    made = []
    for place in range(NODES):
        x = generator.normal(size=(ROWS, SIZE)) * (1.0 + 0.4 * place)
        w = generator.normal(size=(SIZE, 1)) * 2
        made.append(Examples(torch.from_numpy(x), torch.from_numpy(x @ w)))
    return made


def curvature(part: Examples) -> Tensor:
    """The Hessian of one node's loss."""
    return 2 * part.x.T @ part.x / len(part.x)


def slope(part: Examples) -> Tensor:
    """The gradient of one node's loss at zero, negated."""
    found: Tensor = (2 * part.x.T @ part.y / len(part.x))[:, 0]
    return found


def optimum(parts: Sequence[Examples], weights: Sequence[float] | None = None) -> Tensor:
    """Where the weighted mean of the nodes' gradients is zero."""
    w = [1.0] * len(parts) if weights is None else weights
    hessian = torch.stack([curvature(p) * a for p, a in zip(parts, w, strict=True)]).sum(0)
    right = torch.stack([slope(p) * a for p, a in zip(parts, w, strict=True)]).sum(0)
    return torch.linalg.solve(hessian, right)


def near(found: Tensor, wanted: Tensor, within: float = 1e-8) -> bool:
    """Whether every coordinate is where it should be."""
    return float((found - wanted).abs().max()) < within


def descended(
    part: Examples,
    start: Tensor,
    steps: int,
    rate: float,
    correction: Correction | None,
    momentum: float = 0.0,
) -> Tensor:
    """The model after gradient descent on one node's loss and a correction."""
    hessian, right, model = curvature(part), slope(part), start
    velocity = torch.zeros_like(start)
    trained = torch.ones_like(start)
    if correction is not None and correction.trains is not None:
        trained = sum((_among(start, *place) for place in correction.trains), 0 * start)
    ahead = 0.0 if correction is None else correction.ahead
    for _ in range(steps):
        there = model - ahead * (hessian @ model - right)
        gradient = hessian @ there - right
        if correction is not None:
            anchor = start if correction.anchor is None else correction.anchor
            gradient = gradient + correction.strength * (model - anchor)
            gradient = gradient if correction.offset is None else gradient + correction.offset
        velocity = momentum * velocity + gradient * trained
        model = model - rate * velocity
    return model


def _among(like: Tensor, begin: int, end: int) -> Tensor:
    places = torch.arange(len(like))
    return ((begin <= places) & (places < end)).to(like)


@dataclass
class Run:
    """Both halves of a stack over local training.

    Attributes:
        stack: whose layers are tried.
        parts: each node's examples.
        steps: each node's local steps.
        weights: what each update counts.
        rate: of the nodes' steps.
        momentum: of them.
    """

    stack: Stack
    parts: Sequence[Examples]
    steps: Sequence[int]
    weights: Sequence[float] | None = None
    rate: float = RATE
    momentum: float = 0.0
    model: Tensor = field(default_factory=lambda: torch.zeros(SIZE, dtype=torch.float64))
    number: int = 0
    states: Any = None
    memories: list[RecordDict] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = self.stack.init(SIZE)
        self.memories = [RecordDict() for _ in self.parts]

    def rounds(self, count: int, sampled: Sequence[Sequence[int]] | None = None) -> Tensor:
        """The model after so many rounds; with `sampled`, of these nodes only, in turn."""
        for place in range(count):
            everyone = range(len(self.parts))
            self._round(everyone if sampled is None else sampled[place % len(sampled)])
        return self.model

    def own(self, node: int) -> Tensor:
        """A node's own model."""
        return self.stack.own(self.model, NodeContext(), self.memories[node])

    def memory(self, node: int, layer: str) -> Memory:
        """What a layer remembers on a node."""
        return Memory(self.memories[node], layer)

    def _round(self, cohort: Sequence[int]) -> None:
        self.number += 1
        before = Facts(
            SIZE,
            round=self.number,
            expected_replies=len(cohort),
            max_replies=len(cohort),
            population=len(self.parts),
        )
        bottom = self.stack.check(before, self.states)
        sent = self.stack.broadcast(self.states, before)
        told = NodeContext(sent.scalars, sent.vectors, round=self.number, learning_rate=self.rate)
        total, weight = torch.zeros(bottom.size, dtype=torch.float64), 0.0
        for node in cohort:
            own = 1.0 if self.weights is None else self.weights[node]
            total += own * self._update(node, told)
            weight += own
        ctx = RoundContext(
            self.number,
            len(cohort),
            len(cohort),
            weight,
            bottom,
            torch.Generator(),
            learning_rate=self.rate,
        )
        average, self.states, self.metrics = self.stack.decode(
            Sum(total, weight, len(cohort), weight), self.states, ctx, before
        )
        assert average is not None
        self.model = self.model + average

    def _update(self, node: int, told: NodeContext) -> Tensor:
        memory = self.memories[node]
        part = self.parts[node]
        start = self.stack.starts(self.model, told, memory)
        correction = self.stack.begin(start, told, memory)
        if "start-loss" in self.stack.needs:
            told = replace(
                told, start_loss=float((part.x @ self.model - part.y[:, 0]).square().mean())
            )
        how = (self.steps[node], self.rate)
        end = descended(part, start, *how, correction, self.momentum)
        if self.stack.phases:
            end, correction = start, correction or Correction()
            for phase in self.stack.phases:
                steps = int(phase.options.get("local-epochs", self.steps[node]))  # of full batches
                mine = replace(correction, trains=phase.trains)
                end = descended(part, end, steps, self.rate, mine, self.momentum)
        update = end - start
        for layer in self.stack.twice:
            ctx = own_context(told, layer.name, memory)
            own, pull = layer.second(self.model, ctx)
            layer.keep(descended(part, own, *how, pull, self.momentum), ctx)
        told = replace(told, steps=self.steps[node])
        return self.stack.encode(update, dict(told.config), memory, {}, told)[0]
