"""A trainer for any PyTorch model.

    trainer = TorchTrainer(Net, loss="cross-entropy", batch_size=32, local_epochs=2)

One module per process is built once and filled with each node's weights in turn. The same job
gives the same bits in any process, whatever ran before in it (on the CPU, for a fixed number
of threads): shuffles, dropout and augmentations are drawn from the job's seed, and the global
generators are put back afterwards.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from umbel.clients.local_settings import local_settings
from umbel.clients.pytorch import batched as torch_cohort
from umbel.clients.pytorch.batches import to_device, to_model
from umbel.clients.pytorch.compact import settled
from umbel.clients.pytorch.correcting import Correcting, proximal, trained_names
from umbel.clients.pytorch.intake import opened
from umbel.clients.pytorch.loop import (
    MakeOptimizer,
    Share,
    Task,
    autocast,
    call,
    diverged_on,
    explained,
    fit,
    make_optimizer,
)
from umbel.clients.pytorch.losses import BatchMetrics, Loss, MetricAccumulator, Objective, objective
from umbel.clients.pytorch.module import (
    BUILD_SEED,
    Model,
    ModuleCache,
    ModuleState,
    build,
    split,
    to_cpu,
)
from umbel.clients.pytorch.parallel import ProcessGroup, rank_device, spread
from umbel.clients.pytorch.settings import TorchSettings, choose_device
from umbel.clients.seeding import seeded
from umbel.clients.settings import options_of, settings_of
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.clients.trainers.exported import Exported, Output, TakenOutput
from umbel.core.errors import ConfigError, RunError
from umbel.strategies.objective import AHEAD, CORRECTION, PARTS

EVALUATION_BATCH = 512

_OUTPUTS: dict[str, Output] = {
    "cross-entropy": "logits",
    "binary-cross-entropy": "logit",
    "mse": "number",
}

COHORT = 32
"""Nodes that are trained as one computation. Fixed, so that results do not depend on how many
processes share a round."""


@dataclass(frozen=True)
class TorchTrainer(TorchSettings):
    """Trains an `nn.Module` on a node's examples. The inherited fields are option defaults.

    Attributes:
        model: a module class, or a function that returns a module; with an argument, it is
            given the run's options.
        loss: "cross-entropy", "binary-cross-entropy" (of logits), "mse", or a function of
            outputs and targets that returns the mean loss of a batch.
        optimizer: a function of parameters and learning rate; SGD where it is left out.
        metrics: a function of outputs and targets that returns means over a batch. Left out:
            accuracy where targets are classes, rmse and r2 with "mse".
        whole: whether `metrics` is given all outputs and targets at once, on the CPU, in place
            of batches of 512: for metrics that are not means, such as an AUC or an F1.
        target: the key of the target where a data set's rows are dicts; rows of Hugging Face
            have `labels` or `label`.
        OPTIONS: every option that this trainer understands, with its default.
    """

    model: Model
    loss: str | Loss = "cross-entropy"
    optimizer: MakeOptimizer | None = None
    metrics: BatchMetrics | None = None
    whole: bool = False
    target: str = ""
    USE: ClassVar[str] = "model(x)"
    honours: ClassVar[frozenset[str]] = frozenset({CORRECTION, PARTS, AHEAD})
    OPTIONS: dict[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    objective: Objective = field(init=False, repr=False, compare=False)
    defaults: TorchSettings = field(init=False, repr=False, compare=False)
    bench: ModuleCache = field(init=False, repr=False, compare=False)
    team: ProcessGroup = field(init=False, repr=False, compare=False, default_factory=ProcessGroup)

    def __post_init__(self) -> None:
        if isinstance(self.model, torch.nn.Module):
            raise ConfigError(
                f"TorchTrainer was given a {type(self.model).__name__} that exists already; give "
                "it the class, or a function that makes the model: TorchTrainer(lambda: ...)"
            )
        for name in ("loss", "optimizer", "metrics"):
            _check_given(name, getattr(self, name))
        object.__setattr__(self, "OPTIONS", options_of(self, TorchSettings))
        object.__setattr__(self, "objective", objective(self.loss))
        object.__setattr__(self, "defaults", settings_of(self, TorchSettings))
        object.__setattr__(self, "bench", ModuleCache(self.model))

    def settings(self, options: Options, learning_rate: float | None = None) -> TorchSettings:
        """This trainer's settings with the options' changes; a round's learning rate wins.

        Raises:
            ConfigError: an option has the wrong type or is out of its range.
        """
        return local_settings(self.defaults, options, learning_rate)

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where a setting cannot be used."""
        self.settings(options)

    def starting_from(self, module: torch.nn.Module) -> Self:
        """A trainer like this one whose first model is a copy of `module`."""
        return replace(self, model=lambda: copy.deepcopy(module))

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model: parameters drawn from `seed`, buffers as every node builds them."""
        parameters, _ = split(build(self.model, options, seed))
        piece = self.bench.piece(options, choose_device("cpu"))
        buffers = {
            name: to_cpu(piece.built.get(name, value)) for name, value in piece.buffers.items()
        }
        return Weights({name: to_cpu(p) for name, p in parameters.items()}, buffers)

    def ready(self, weights: Weights, options: Options) -> torch.nn.Module:
        """A module of its own with these weights, in eval mode on the CPU."""
        piece = ModuleState.of(build(self.model, options, BUILD_SEED))
        piece.load(weights)
        return piece.module.eval()

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The module of `ready`, which gives the one tensor that the loss is about."""
        ready = settled(self.ready(weights, options))
        module: torch.nn.Module = TakenOutput(ready, self.objective.outputs)
        return Exported(module.float().eval(), _OUTPUTS.get(self.objective.name, "raw"))

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The buffers that training gathers from examples: real ones that are no parameters."""
        built = self.bench.piece(options, choose_device("cpu")).built
        return tuple(name for name, value in built.items() if value.is_floating_point())

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples; `weights` is not mutated.

        Raises:
            ConfigError: the options, the examples or the weights do not fit the model.
            RunError: training diverged.
        """
        settings = self.settings(job.options, job.learning_rate)
        world = settings.processes()
        if settings.batched == "on":
            self._check_batched(settings, job.options)
        if world == 1:
            return self.train_share(weights, examples, job, Share())
        return self.team.train(
            self.train_share, weights, examples, job, world=world, cuda=settings.on_gpus()
        )

    def train_share(self, weights: Weights, examples: Any, job: Job, share: Share) -> Trained:
        """One process's share of a job (all of it where there is one process)."""
        settings = self.settings(job.options, job.learning_rate)
        if share.world > 1:
            device = rank_device(share, settings.on_gpus())
        else:
            device = choose_device(settings.device)
        piece = self.bench.piece(job.options, device)
        source = opened(piece, examples, self.target)
        piece.load(weights)
        correction = job.correction or proximal(settings)
        names = trained_names(correction, weights.parameters)
        parameters = [piece.parameters[name] for name in names]
        with seeded(job.seed + share.rank, device), piece.training_only(names):
            task = Task(
                module=piece.module if share.world == 1 else spread(piece.module, device),
                parameters=parameters,
                objective=self.objective,
                optimizer=make_optimizer(self.optimizer, parameters, settings),
                settings=settings,
                least=piece.least,
                device=device,
                seed=job.seed,
                share=share,
                correction=Correcting.of(
                    correction,
                    weights.parameters,
                    {name: piece.parameters[name] for name in names},
                ),
                ahead=0.0 if correction is None else correction.ahead,
            )
            try:
                loss, steps = fit(task, source)
            except RunError as error:
                raise diverged_on(examples, error) from error
        return Trained(piece.weights(weights), source.size, {"loss": loss}, steps)

    def train_cohort(
        self, weights: Sequence[Weights], examples: Sequence[Any], jobs: Sequence[Job]
    ) -> list[Trained] | None:
        """What `train` gives for each node, to float tolerance, as one batched computation.

        None where that does not apply: see `umbel.clients.pytorch.batched`.
        """
        first = jobs[0]
        settings = self.settings(first.options, first.learning_rate)
        alike = all(
            job.learning_rate == first.learning_rate and job.options == first.options
            for job in jobs
        )
        if any(job.correction is not None and not job.correction.only_adds for job in jobs):
            return None
        if not alike or self.optimizer is not None or settings.processes() > 1:
            return None
        device = choose_device(settings.device)
        with seeded(first.seed, device):
            piece = self.bench.piece(first.options, device)
            return torch_cohort.train_cohort(
                piece, self.objective, settings, weights, examples, jobs, self.target
            )

    def group_size(self, options: Options) -> int:
        """How many nodes an engine should give to `train_cohort` at a time; 1 is no batching."""
        settings = self.settings(options)
        if settings.batched == "on":
            self._check_batched(settings, options)
        if self.optimizer is not None or settings.processes() > 1:
            return 1
        piece = self.bench.piece(options, choose_device(settings.device))
        return COHORT if torch_cohort.worthwhile(piece, settings, COHORT) else 1

    def _check_batched(self, settings: TorchSettings, options: Options) -> None:
        """Raises:
        ConfigError: batched=on was asked for and cannot be had.
        """
        piece = self.bench.piece(options, choose_device(settings.device))
        why = torch_cohort.refusal(piece, settings)
        if self.optimizer is not None:
            why = "the trainer has an optimizer of its own"
        elif settings.processes() > 1:
            why = "gpus or local-processes share each job among several processes"
        if why:
            raise ConfigError(f"batched=on cannot be had: {why}; use batched=auto")

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """Loss and metrics on examples, in batches of 512; `weights` is not mutated."""
        settings = self.settings(options)
        device = choose_device(settings.device)
        piece = self.bench.piece(options, device)
        source = opened(piece, examples, self.target)
        piece.load(weights)
        piece.module.eval()
        tally = MetricAccumulator(self.objective, self.metrics, self.whole)
        # Not inference_mode: what a module caches here (a mask, rotations) is trained with later.
        with seeded(0, device), torch.no_grad():
            for start in range(0, source.size, EVALUATION_BATCH):
                rows = torch.arange(start, min(start + EVALUATION_BATCH, source.size))
                x, y = source.batch(None if len(rows) == source.size else rows)
                targets = self.objective.prepare(to_device(y, device))
                inputs = to_model(x, device, piece.real)
                with explained(inputs, targets):
                    with autocast(settings.precision, device):
                        outputs = call(piece.module, inputs)
                    tally.add(_full(outputs), targets, len(rows))
        return Evaluated(tally.examples, *tally.result())


def _check_given(name: str, given: Any) -> None:
    """Raises:
    ConfigError: a class in place of an object, or the other way round.
    """
    kind = getattr(given, "__name__", type(given).__name__)
    if inspect.isclass(given) and issubclass(given, torch.nn.Module):
        raise ConfigError(f"{name} is the class {kind}; give an object: {name}={kind}()")
    if isinstance(given, torch.optim.Optimizer):
        raise ConfigError(
            f"{name} is a {kind} that exists already, of other parameters than a node's; give "
            f"the class: {name}=torch.optim.{kind}, or a function of parameters and learning rate"
        )
    if given is not None and not isinstance(given, str) and not callable(given):
        raise ConfigError(f"{name} is {given!r}, and it has to be a function")


def _full(outputs: Any) -> Any:
    """Outputs of mixed precision, back in float32 for the loss and the metrics."""
    if isinstance(outputs, torch.Tensor) and outputs.dtype in (torch.float16, torch.bfloat16):
        return outputs.float()
    return outputs
