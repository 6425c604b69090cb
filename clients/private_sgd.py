"""DP-SGD inside a node: each of its records is hidden, from everybody who sees its updates.

    each step   records by Poisson sampling, from the operating system's entropy
                every record's gradient clipped to a norm, added up   (umbel.privacy.bounds.ghost)
                + Gaussian noise on a lattice, over the expected batch     (Abadi et al. 2016)
    each round  the node's own ledger is charged before training begins

For hospitals and banks, whose records need protection while the institution itself is known to
take part. The unit is one record; adding or removing one is what is hidden. The number of a
node's records is treated as public. The loss of training is private and not reported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umbel.clients.example_ledger import ExampleLedger, Steps, noise_for
from umbel.clients.pytorch.batches import Source, to_device, to_model
from umbel.clients.pytorch.intake import opened
from umbel.clients.pytorch.loop import make_optimizer
from umbel.clients.pytorch.settings import TorchSettings, choose_device
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.seeding import seeded
from umbel.clients.settings import options_of, read
from umbel.clients.trainer import Evaluated, Job, Options, Trained, Weights
from umbel.privacy.bounds.ghost import PerExample
from umbel.privacy.noise.entropy import Entropy
from umbel.strategies.errors import ConfigError, RunError
from umbel.strategies.private.gaussian import noised

MARGIN = 1 + 2.0**-16
"""Noise beyond z C: covers the rounding of clipped gradients and of their sum in float32."""


@dataclass(frozen=True, kw_only=True)
class ExamplePrivacy:
    """What a node promises about each of its records. Option names are the same in kebab-case.

    Attributes:
        example_epsilon: the budget of each record of a node, for the whole run.
        example_delta: the probability that this guarantee may fail with; well below one over the
            number of records.
        example_norm: the norm to which every record's gradient is clipped.
        example_noise: the noise over the norm, instead of what the budget asks for; 0 lets it
            decide.
    """

    example_epsilon: float = 3.0
    example_delta: float = 1e-5
    example_norm: float = 1.0
    example_noise: float = 0.0

    def validate(self) -> None:
        """Raises:
        ConfigError: a value is out of its range.
        """
        for name in ("example_epsilon", "example_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"{name.replace('_', '-')} is {value:g}; it must be a finite number above 0"
                )
        if not 0 < self.example_delta < 1:
            raise ConfigError(
                f"example-delta is {self.example_delta:g}; it must lie between 0 and 1, "
                "such as 1e-5"
            )
        if not (self.example_noise >= 0 and math.isfinite(self.example_noise)):
            raise ConfigError(
                f"example-noise is {self.example_noise:g}; it must be a finite number above 0, "
                "or 0 to let example-epsilon decide"
            )


@dataclass(frozen=True)
class Schedule:
    """What a node does in a run, and what that costs.

    Attributes:
        noise_multiplier: noise over norm.
        sampling_rate: of each record in each step.
        steps: a round.
        epsilon: after all planned rounds.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    epsilon: float


@dataclass(frozen=True)
class PrivateSgd(ExamplePrivacy):
    """Trains like a `TorchTrainer`, with DP-SGD. The inherited fields are option defaults.

    Attributes:
        trainer: the model, the loss, the batch size, the steps, the optimiser.
        OPTIONS: every option that this trainer understands, with its default.

    Raises:
        ConfigError: the loss has no value for each record.
    """

    trainer: TorchTrainer
    OPTIONS: Mapping[str, bool | int | float | str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = options_of(self, ExamplePrivacy)
        object.__setattr__(self, "OPTIONS", {**self.trainer.OPTIONS, **own})
        if self.trainer.objective.each is None:
            raise ConfigError(
                f"DP-SGD needs a loss for each record, and {self.trainer.objective.name} gives "
                "only their mean; use cross-entropy, binary-cross-entropy or mse"
            )

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where a setting of training or of the promise cannot be used."""
        self.trainer.check_options(options)
        self.privacy(options)

    def initial(self, options: Options, seed: int) -> Weights:
        return self.trainer.initial(options, seed)

    def ready(self, weights: Weights, options: Options) -> nn.Module:
        """The trained module."""
        return self.trainer.ready(weights, options)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        return self.trainer.evaluate(weights, examples, options)

    def privacy(self, options: Options) -> ExamplePrivacy:
        """The promise under these options.

        Raises:
            ConfigError: a value is out of its range.
        """
        defaults = {name: getattr(self, name) for name in ExamplePrivacy.__dataclass_fields__}
        promise = read(ExamplePrivacy(**defaults), options)
        promise.validate()
        return promise

    def schedule(self, examples: int, options: Options) -> Schedule:
        """What a node with so many records does under these options, taking part in all rounds.

        Raises:
            ConfigError: no noise meets the budget.
        """
        promise, settings = self.privacy(options), self.trainer.settings(options)
        batch = min(settings.batch_size or examples, examples)
        steps = settings.local_steps or settings.local_epochs * math.ceil(examples / batch)
        rate, rounds = batch / examples, int(options["rounds"])
        delta = promise.example_delta
        try:
            noise = promise.example_noise or noise_for(
                promise.example_epsilon, delta, rate, steps * rounds
            )
        except ValueError as error:
            raise ConfigError(f"a node with {examples} examples: {error}") from error
        cost = ExampleLedger((Steps(noise, rate, steps * rounds),)).epsilon(delta)
        return Schedule(noise, rate, steps, cost)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's records; `weights` is not mutated.

        Raises:
            ConfigError: the options, the records or the weights do not fit the model.
            RunError: the node's budget is spent, or the model stopped being finite.
        """
        settings = self.trainer.settings(job.options, job.learning_rate)
        promise, device = self.privacy(job.options), choose_device(settings.device)
        piece = self.trainer.bench.piece(job.options, device)
        source = opened(piece, examples, self.trainer.target)
        plan = self.schedule(source.size, job.options)
        epsilon = _charge(plan, promise, job)
        piece.load(weights)
        with seeded(job.seed, device):
            step = _Step(self.trainer, piece.module, settings, promise, plan, _entropy(job))
            for _ in range(plan.steps):
                step.take(source, device, piece.real)
        trained = piece.weights(weights)
        if not all(bool(torch.isfinite(p).all()) for p in trained.parameters.values()):
            raise RunError("training diverged; lower learning-rate")
        return Trained(trained, source.size, {"example-epsilon": epsilon})


class _Step:
    """One step of DP-SGD after another."""

    def __init__(
        self,
        trainer: TorchTrainer,
        module: nn.Module,
        settings: TorchSettings,
        promise: ExamplePrivacy,
        plan: Schedule,
        entropy: Entropy,
    ) -> None:
        self.objective, self.plan, self.norm = trainer.objective, plan, promise.example_norm
        self.entropy = entropy
        self.module = module.train()
        try:
            self.clipper = PerExample(module)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(trainer.optimizer, parameters, settings)

    def take(self, source: Source, device: torch.device, real: torch.dtype) -> None:
        """Sample, clip, add noise, move the parameters."""
        rows = torch.from_numpy(
            np.flatnonzero(self._uniform(source.size) < self.plan.sampling_rate)
        )
        gradients = self._clipped(source, rows, device, real)
        expected = self.plan.sampling_rate * source.size
        deviation = self.plan.noise_multiplier * self.norm * MARGIN
        flat = torch.cat([g.flatten() for g in gradients.values()]).cpu()
        noisy = noised(flat, deviation, self.entropy).div_(expected)
        start = 0
        for parameter, name in self.clipper.names.items():
            size = gradients[name].numel()
            piece = noisy[start : start + size].view(parameter.shape)
            parameter.grad = piece.to(parameter.device, parameter.dtype)
            start += size
        self.optimizer.step()

    def _clipped(
        self, source: Source, rows: Tensor, device: torch.device, real: torch.dtype
    ) -> dict[str, Tensor]:
        if len(rows) == 0:  # an empty batch is noise alone, and is charged like any other
            return {name: torch.zeros_like(p) for p, name in self.clipper.names.items()}
        x, y = source.batch(rows)
        each = self.objective.each
        assert each is not None  # checked when the trainer was made
        targets = self.objective.prepare(to_device(y, device))
        inputs = to_model(x, device, real)
        return self.clipper.clipped_sum(inputs, targets, each, self.norm).gradients

    def _uniform(self, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        words = self.entropy.words64(count)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _charge(plan: Schedule, promise: ExamplePrivacy, job: Job) -> float:
    """Write this round's steps into the node's ledger; what it has spent with them."""
    now = Steps(plan.noise_multiplier, plan.sampling_rate, plan.steps)
    ledger = ExampleLedger.read(job.memory).plus(now)
    epsilon = ledger.epsilon(promise.example_delta)
    if not promise.example_noise and epsilon > promise.example_epsilon:
        raise RunError(
            f"the budget of this node's records is epsilon {promise.example_epsilon:g}, and "
            f"another round would bring them to {epsilon:.4g}; the node takes no further part"
        )
    ledger.write(job.memory)
    return math.inf if _seed(job) >= 0 else epsilon


def _seed(job: Job) -> int:
    return int(job.options.get("insecure-noise-seed", -1))


def _entropy(job: Job) -> Entropy:
    """The operating system's; of the job's seed where the run says that it is insecure."""
    return Entropy() if _seed(job) < 0 else Entropy(_seed(job) * 1_000_003 + job.seed)
