"""DP-SGD inside a node: each of its records is hidden, from everybody who sees its updates.

    each step   records by Poisson sampling, from the operating system's entropy
                every record's gradient clipped to a norm, added up   (umbel.privacy.bounds.ghost)
                + Gaussian noise on a lattice, over the expected batch     (Abadi et al. 2016)
    each round  the node's own ledger is charged before training begins

For hospitals and banks, whose records need protection while the institution itself is known to
take part. The unit is one record; adding or removing one is what is hidden. The number of a
node's records is treated as public. The loss of training is private and not reported.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from dp_accounting import NonPrivateDpEvent
from torch import Tensor, nn

from umbel.clients.ledger.node_ledger import StateLedger, total
from umbel.clients.pytorch.batches import Source, to_device, to_model, whole_source
from umbel.clients.pytorch.correcting import Correcting, proximal
from umbel.clients.pytorch.intake import opened
from umbel.clients.pytorch.loop import make_optimizer
from umbel.clients.pytorch.losses import Loss
from umbel.clients.pytorch.settings import TorchSettings, choose_device
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.seeding import seeded
from umbel.clients.settings import options_of, read, settings_of
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Tree, Weights
from umbel.clients.trainers.exported import Exported
from umbel.core.errors import ConfigError, RunError
from umbel.core.options import dashed
from umbel.privacy.bounds.examples import zeros
from umbel.privacy.bounds.ghost import PerExample
from umbel.privacy.budget.accounting import poisson
from umbel.privacy.budget.calibrate import noise_multiplier
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge
from umbel.privacy.noise.entropy import Entropy
from umbel.strategies.layout import averaged_buffers
from umbel.strategies.objective import CORRECTION
from umbel.strategies.private.gaussian import noised
from umbel.strategies.release import Release

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
    USE: ClassVar[str] = TorchTrainer.USE
    honours: ClassVar[frozenset[str]] = frozenset({CORRECTION})
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
        """Raises ConfigError where a setting cannot be used, or would be ignored."""
        _refuse_ignored(self.trainer.settings(options))
        self.privacy(options)

    def starting_from(self, module: torch.nn.Module) -> Self:
        """A trainer like this one whose first model is a copy of `module`."""
        return replace(self, trainer=self.trainer.starting_from(module))

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model of the trainer.

        Raises:
            ConfigError: an option would be ignored, or something would leave a node unprotected,
                or a layer mixes the examples of a batch.
        """
        _refuse_ignored(self.trainer.settings(options))
        first = self.trainer.initial(options, seed)
        _refuse_beside(averaged_buffers(first.buffers, str(options.get("buffers", "local"))))
        piece = self.trainer.bench.piece(options, choose_device("cpu"))
        try:
            PerExample(piece.module.train())
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return first

    def ready(self, weights: Weights, options: Options) -> nn.Module:
        """The trained module."""
        return self.trainer.ready(weights, options)

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The trained module for other formats."""
        return self.trainer.exported(weights, options)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        return self.trainer.evaluate(weights, examples, options)

    def privacy(self, options: Options) -> ExamplePrivacy:
        """The promise under these options.

        Raises:
            ConfigError: a value is out of its range.
        """
        promise = read(settings_of(self, ExamplePrivacy), options)
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
        cost = total({_charge(noise, rate): steps * rounds}, delta)[0]
        return Schedule(noise, rate, steps, cost)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's records; `weights` is not mutated.

        Raises:
            ConfigError: the options, the records or the weights do not fit the model.
            RunError: the node's budget is spent, or the model stopped being finite.
        """
        settings = self.trainer.settings(job.options, job.learning_rate)
        promise, device = self.privacy(job.options), choose_device(settings.device)
        _refuse_ignored(settings)
        _refuse_beside(averaged_buffers(weights.buffers, str(job.options.get("buffers", "local"))))
        piece = self.trainer.bench.piece(job.options, device)
        source = whole_source(opened(piece, examples, self.trainer.target), "PrivateSgd")
        plan = self.schedule(source.size, job.options)
        piece.load(weights)
        with seeded(job.seed, device):
            step = _Step(self.trainer, piece.module, settings, promise, plan, _entropy(job))
            step.correcting = Correcting.of(
                job.correction or proximal(settings), weights.parameters, piece.parameters
            )
            step.parameters = list(piece.parameters.values())
            step.check(source, device, piece.real)  # what is refused is not charged
        ledger = job.ledger or StateLedger(job.memory)
        epsilon = ledger.charge(_release(plan, promise, job)).epsilon
        with seeded(job.seed, device):
            for _ in range(plan.steps):
                step.take(source, device, piece.real)
        trained = piece.weights(weights)
        if not all(bool(torch.isfinite(p).all()) for p in trained.parameters.values()):
            raise RunError("training diverged; lower learning-rate")
        return Trained(trained, source.size, {"example-epsilon": epsilon}, plan.steps)


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
        self.parameters = parameters
        self.correcting: Correcting | None = None

    def check(self, source: Source, device: torch.device, real: torch.dtype) -> None:
        """Whether examples of these shapes have gradients of their own in this model.

        Raises:
            ConfigError: they have not.
        """
        inputs, targets, each = self._batch(source, torch.arange(1), device, real)
        try:
            self.clipper.check(inputs, targets, each)
        except ValueError as error:
            raise ConfigError(str(error)) from error

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
        if self.correcting is not None:  # of what has left the node before, or of the server
            self.correcting.add_to(self.parameters)
        self.optimizer.step()

    def _clipped(
        self, source: Source, rows: Tensor, device: torch.device, real: torch.dtype
    ) -> dict[str, Tensor]:
        if len(rows) == 0:  # an empty batch is noise alone, and is charged like any other
            return zeros(self.clipper.names)
        inputs, targets, each = self._batch(source, rows, device, real)
        try:
            return self.clipper.clipped_sum(inputs, targets, each, self.norm).gradients
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _batch(
        self, source: Source, rows: Tensor, device: torch.device, real: torch.dtype
    ) -> tuple[Any, Any, Loss]:
        x, y = source.batch(rows)
        each = self.objective.each
        assert each is not None  # checked when the trainer was made
        return to_model(x, device, real), self.objective.prepare(to_device(y, device)), each

    def _uniform(self, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        words = self.entropy.words64(count)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _release(plan: Schedule, promise: ExamplePrivacy, job: Job) -> Release:
    """What this round is about to cost the node's records."""
    seeded = _seed(job) >= 0
    charge = _charge(plan.noise_multiplier, plan.sampling_rate)
    promised = None if promise.example_noise else promise.example_epsilon
    return Release(
        unit="record",
        mechanism="dp-sgd",
        charge=Charge(NonPrivateDpEvent()) if seeded else charge,
        count=plan.steps,
        planned=plan.steps * int(job.options["rounds"]),
        promised=math.inf if seeded else promised,
        delta=promise.example_delta,
        noise_multiplier=plan.noise_multiplier,
        norm=promise.example_norm,
        sampling_rate=plan.sampling_rate,
    )


def _charge(noise: float, rate: float) -> Charge:
    return Charge(poisson(noise, rate), ADD_OR_REMOVE)


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The noise multiplier under which `steps` steps stay within a node's budget."""
    return noise_multiplier(epsilon * (1 - 1e-3), delta, sampling_rate, steps)


_IGNORED = {
    "clip_gradient": (0.0, "a limit for the whole batch; example-norm limits each record"),
    "accumulate": (1, "batches in parts"),
    "local_processes": (1, "several processes"),
    "gpus": (1, "several GPUs"),
}
"""Settings of the plain trainer that DP-SGD does not have, with what leaves them off."""


def _refuse_ignored(settings: TorchSettings) -> None:
    """Raises:
    ConfigError: a setting asks for what DP-SGD would leave out.
    """
    for name, (off, words) in _IGNORED.items():
        value = getattr(settings, name)
        if value != off and not (name == "gpus" and settings.processes() == 1):
            raise ConfigError(
                f"{dashed(name)} is {value}, and DP-SGD has not {words}; leave it at {off:g}"
            )
    if settings.batched == "on":
        raise ConfigError(
            "batched is on, and DP-SGD trains one node at a time; leave it at auto, or off"
        )
    if settings.precision not in ("auto", "float32"):
        raise ConfigError(
            f"precision is {settings.precision}, and DP-SGD computes in the model's own type; "
            "leave it at auto"
        )


def _refuse_beside(sent: Tree) -> None:
    """Raises:
    ConfigError: values that no clipping and no noise has seen would travel.
    """
    if sent:
        names = ", ".join(list(sent)[:3]) + (", ..." if len(sent) > 3 else "")
        raise ConfigError(
            f"buffers=mean would send {names} without clipping or noise beside updates that hide "
            "every record; use buffers=local"
        )


def _seed(job: Job) -> int:
    return int(job.options.get("insecure-noise-seed", -1))


def _entropy(job: Job) -> Entropy:
    """The operating system's; of the job's seed where the run says that it is insecure."""
    return Entropy() if _seed(job) < 0 else Entropy(_seed(job) * 1_000_003 + job.seed)
