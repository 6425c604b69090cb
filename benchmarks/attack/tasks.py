"""The tasks that the benchmark trains: small, real, and dealt so that truth is known.

Images       Fashion-MNIST as vectors of 784 pixels, mean 0 and standard deviation 1
Medical      the Wisconsin breast-cancer measurements: 30 numbers of 569 patients
Canaries     no data at all: each node's update is a direction of its own
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from umbel.clients.data.datasets import FASHION_MEAN, FASHION_STD, as_vectors, load
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.core.errors import ConfigError

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Pool:
    """Examples that members, non-members and the attacker's own data are drawn from.

    Attributes:
        name: of the data set.
        x: inputs of shape (n, features).
        y: classes of shape (n,).
        test_x: inputs that judge the model.
        test_y: their classes.
        classes: how many.
        pixels: turns inputs into pixels of [0, 1]; None where they are no images.
    """

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    pixels: Callable[[Tensor], Tensor] | None

    @property
    def features(self) -> int:
        """Numbers of an input."""
        return self.x.shape[1]

    @property
    def test(self) -> Examples:
        """The examples that judge the model."""
        return Examples(self.test_x, self.test_y)

    def take(self, rows: Rows) -> Examples:
        """The examples at `rows`."""
        return Examples(self.x[rows], self.y[rows])


@cache
def pool(name: str, size: int, seed: int, raw: bool = False) -> Pool:
    """`size` random training examples of a data set, and 2,000 (or all) of its test examples.

    Args:
        name: of the data set.
        size: examples that are taken; all, where there are fewer.
        seed: of the choice.
        raw: pixels of [0, 1] as inputs, not standardised.

    Raises:
        ConfigError: the data set is no classification.
    """
    data = load(name)
    if data.classes is None:
        raise ConfigError(f"{name} has no classes; the attacks need a classification task")
    generator = np.random.default_rng([seed, 1])
    rows = generator.permutation(len(data.train))[:size]
    images = name == "fashion-mnist"
    prepare = as_vectors if images else data.prepare
    train, test = prepare(data.train.take(np.sort(rows))), prepare(data.test.take(slice(2000)))
    order = torch.as_tensor(np.argsort(np.argsort(rows)))
    standardised = Pool(
        name=name,
        x=torch.as_tensor(train.x)[order],
        y=torch.as_tensor(train.y)[order],
        test_x=torch.as_tensor(test.x),
        test_y=torch.as_tensor(test.y),
        classes=len(data.classes),
        pixels=PIXELS.get(name),
    )
    pixels = standardised.pixels
    if not raw or pixels is None:
        return standardised
    x, test_x = pixels(standardised.x), pixels(standardised.test_x)
    return replace(standardised, x=x, test_x=test_x, pixels=as_pixels)


def to_pixels(x: Tensor) -> Tensor:
    """Standardised inputs as pixels of [0, 1]."""
    return (x * FASHION_STD + FASHION_MEAN).clamp(0, 1)


def as_pixels(x: Tensor) -> Tensor:
    """Inputs that are pixels of [0, 1], and guesses of them."""
    return x.clamp(0, 1)


PIXELS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "fashion-mnist": to_pixels,
    "digits": as_pixels,
}
"""The data sets of images."""


@dataclass(frozen=True)
class Dealt:
    """Each node's examples by rows of a pool; callable as a federation's `data`.

    Attributes:
        pool: where they come from.
        rows: of each node; possibly none.
    """

    pool: Pool
    rows: Sequence[Rows]

    def __call__(self, node: Node, options: Options) -> Split:  # noqa: ARG002
        return Split(self.pool.take(self.rows[node.partition]))

    def of(self, node: int) -> Examples:
        """A node's examples."""
        return self.pool.take(self.rows[node])

    def central_test(self, options: Options) -> Examples:  # noqa: ARG002
        """The examples that judge the model."""
        return self.pool.test


@dataclass(frozen=True)
class Perceptron:
    """Makes perceptrons with one hidden layer.

    Attributes:
        features: inputs.
        hidden: neurons.
        classes: outputs.
        smooth: sigmoid in place of ReLU, for attacks that need second derivatives.
    """

    features: int
    hidden: int
    classes: int
    smooth: bool = False

    def __call__(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.features, self.hidden),
            nn.Sigmoid() if self.smooth else nn.ReLU(),
            nn.Linear(self.hidden, self.classes),
        )


@dataclass(frozen=True)
class Chosen:
    """A trainer whose first model somebody chose: what a malicious server sends.

    Attributes:
        inner: trains.
        parameters: replace those of the inner trainer's first model, by name.
    """

    inner: Any
    parameters: dict[str, Tensor]

    @property
    def OPTIONS(self) -> dict[str, Any]:  # noqa: N802
        """Of the inner trainer."""
        return dict(self.inner.OPTIONS)

    def initial(self, options: Options, seed: int) -> Weights:
        """The chosen model."""
        first = self.inner.initial(options, seed)
        return Weights({**first.parameters, **self.parameters}, first.buffers)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """As the inner trainer: an honest node does not notice."""
        trained: Trained = self.inner.train(weights, examples, job)
        return trained

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """As the inner trainer."""
        evaluated: Evaluated = self.inner.evaluate(weights, examples, options)
        return evaluated


LENGTH = "canary-length"
"""The option, where a canary trainer is given one, that changes how far a canary moves."""


@dataclass(frozen=True)
class CanaryTrainer:
    """Turns a node into a canary: its update is a direction of its own, or nothing.

    A node whose example is (i, 1) sends `length` times direction i; one with (i, 0) sends zeros.

    Attributes:
        size: coordinates of an update.
        length: of a canary's update, in its own unit.
        weight: examples that a canary says it was made from.
        random: unit vectors in random directions in place of coordinates.
        shared: half of each direction's square is the last coordinate, which all canaries have in
            common: whether any of them were used shows there.
        metrics: names of metrics that a canary reports: 1 where the coin said so, else 0.
    """

    size: int
    length: float
    weight: int = 1
    random: bool = False
    shared: bool = False
    metrics: tuple[str, ...] = ()
    OPTIONS: dict[str, bool | int | float | str] = field(default_factory=dict)

    def direction(self, canary: int) -> Tensor:
        """The unit vector of a canary, shape (size,)."""
        if self.random:
            generator = torch.Generator().manual_seed(canary)
            return nn.functional.normalize(torch.randn(self.size, generator=generator), dim=0)
        vector = torch.zeros(self.size)
        vector[canary] = 1.0
        if self.shared:
            vector[canary] = vector[-1] = math.sqrt(0.5)
        return vector

    def initial(self, options: Options, seed: int) -> Weights:  # noqa: ARG002
        """All zero."""
        return Weights({"canaries": torch.zeros(self.size)})

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Add the direction, if the coin said so."""
        canary, coin = int(examples.x[0]), int(examples.y[0])
        length = float(job.options.get(LENGTH, self.length))
        moved = weights.parameters["canaries"] + coin * length * self.direction(canary)
        metrics = dict.fromkeys(self.metrics, float(coin))
        return Trained(Weights({"canaries": moved}), self.weight if coin else 1, metrics)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        """Nothing to judge."""
        return Evaluated(len(examples), {})


@dataclass(frozen=True)
class Coins:
    """The data of canary nodes: node i has canary i and the coin that was thrown for it."""

    coins: NDArray[np.bool_]

    def __call__(self, node: Node, options: Options) -> Split:  # noqa: ARG002
        one = np.array([node.partition]), np.array([int(self.coins[node.partition])])
        return Split(Examples(*one))
