"""A trainer for models of JAX: pure functions, Flax NNX and Linen, optimisers of optax.

    JaxTrainer(init, apply)                              init(key), apply(params, x)
    JaxTrainer(Net, optimizer=optax.adam)                Net(rngs) is a module of Flax NNX
    JaxTrainer(Net(), inputs=(28, 28, 1))                a module of Flax Linen

The same job gives the same bits in any process: keys come from the job's seed. The nodes of an
engine's group are trained as one computation (`jax.vmap` over nodes).
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.clients.frameworks.extras import needed
from umbel.clients.frameworks.intake import (
    Batches,
    arrays,
    check_labels,
    failed,
    judged,
    padded,
)
from umbel.clients.frameworks.jax_model import EXTRA, WHO, check_model, model_of, takes_options
from umbel.clients.frameworks.jax_step import (
    LOSSES,
    MakeTransform,
    Program,
    own_loss,
    to_tensor,
    words,
)
from umbel.clients.local_settings import LocalSettings, local_settings
from umbel.clients.pytorch.batches import plan
from umbel.clients.pytorch.correcting import proximal
from umbel.clients.pytorch.loop import diverged_on
from umbel.clients.pytorch.losses import Objective, objective
from umbel.clients.pytorch.settings import BATCHED
from umbel.clients.seeding import seeded
from umbel.clients.settings import options_of, settings_of
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.core.limits import one_of, option
from umbel.core.options import dashed
from umbel.core.records import Manifest, same_bits
from umbel.strategies.objective import CORRECTION, Correction

EVALUATION_BATCH = 512
COHORT = 32
"""Nodes that are trained as one computation. Fixed, so that results do not depend on how many
processes share a round."""

MOST_PARAMETERS = 1 << 17
"""On a CPU, larger models keep it busy alone."""


@dataclass(frozen=True, kw_only=True)
class JaxSettings(LocalSettings):
    """How a node trains with JAX: `LocalSettings`, and what only JAX has.

    Attributes:
        device: where to train: "auto" is JAX's own choice, or "cpu", "gpu", "cuda:0", "tpu".
        batched: whether many nodes' models are trained as one computation: "auto" where it
            is faster, "on" wherever it is possible, "off".
    """

    device: str = "auto"
    batched: str = option("auto", one_of(*BATCHED))


@dataclass(frozen=True)
class JaxTrainer(JaxSettings):
    """Trains a model of JAX on a node's examples. The inherited fields are option defaults.

    Attributes:
        model: a function of a key that makes parameters (with `apply`), a class or function of
            `rngs` that makes a module of Flax NNX, or a module of Flax Linen. Functions that
            have an argument `options` are given the run's options.
        apply: of parameters and inputs, where `model` is a function of a key. With an argument
            `state`, `model` returns (params, state) and this (outputs, state); it may also take
            `key` (for dropout) and `train`.
        inputs: for a Linen module: the shape of one example, or an example.
        loss: "cross-entropy" (classes last), "binary-cross-entropy" (of logits), "mse", or a
            function of outputs and targets that returns the mean loss of a batch, or one number
            for each example.
        optimizer: a function of a learning rate, as `optax.adam`; SGD where it is left out.
        metrics: a function of outputs and targets (arrays) that returns means over a batch.
        whole: whether `metrics` is given all outputs and targets at once.
        target: the key of the target where a data set's rows are dicts.
        OPTIONS: every option that this trainer understands, with its default.
    """

    model: Any
    apply: Callable[..., Any] | None = None
    inputs: Any = None
    loss: str | Callable[[Any, Any], Any] = "cross-entropy"
    optimizer: MakeTransform | None = None
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None
    whole: bool = False
    target: str = ""
    USE: ClassVar[str] = "model(x)"
    honours: ClassVar[frozenset[str]] = frozenset({CORRECTION})
    OPTIONS: dict[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    defaults: JaxSettings = field(init=False, repr=False, compare=False)
    objective: Objective = field(init=False, repr=False, compare=False)
    programs: "_Programs" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_model(self.model, self.apply)
        for name in ("optimizer", "metrics"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ConfigError(
                    f"{name} is a {type(given).__name__}, and it has to be a function"
                    + (": optimizer=optax.adam" if name == "optimizer" else "")
                )
        object.__setattr__(self, "OPTIONS", options_of(self, JaxSettings))
        object.__setattr__(self, "defaults", settings_of(self, JaxSettings))
        object.__setattr__(self, "objective", _objective(self.loss))
        object.__setattr__(self, "programs", _Programs())

    def settings(self, options: Options, learning_rate: float | None = None) -> JaxSettings:
        """This trainer's settings with the options' changes; a round's learning rate wins.

        Raises:
            ConfigError: an option has the wrong type or is out of its range.
        """
        settings = local_settings(self.defaults, options, learning_rate)
        for name in ("momentum", "weight_decay"):
            if getattr(settings, name) and self.optimizer is not None:
                raise ConfigError(
                    f"{dashed(name)} is {getattr(settings, name)}, but the trainer has an "
                    "optimizer of its own; set it there, or leave the optimizer out (SGD)"
                )
        return settings

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where a setting cannot be used."""
        self.settings(options)

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model, drawn from `seed`."""
        with seeded(seed):
            return self._program(options).first(seed)

    def ready(self, weights: Weights, options: Options) -> Any:
        """The model with these weights: a module of NNX, a bound one of Linen, or a function."""
        program = self._program(options)
        return program.model.ready(*self._filled(program, weights))

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The state's real numbers, which training gathers from examples."""
        layout = self._program(options).state
        jnp = needed("jax", EXTRA, WHO).numpy
        return tuple(
            name
            for name, kind in zip(layout.names, layout.types, strict=True)
            if jnp.issubdtype(kind, jnp.floating)
        )

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples; `weights` is not mutated.

        Raises:
            ConfigError: the options, the examples or the weights do not fit the model.
            RunError: training diverged.
        """
        settings = self.settings(job.options, job.learning_rate)
        program = self._program(job.options, settings)
        batches = Batches.of(examples, self.objective, self.target)
        with seeded(job.seed), _device(settings.device):
            params, state = self._filled(program, weights)
            rate = np.float32(settings.learning_rate)
            moments = program.begin(params, rate)
            pull = _pull(program, job.correction or proximal(settings), weights, params)
            losses, counts = [], []
            active = np.bool_(True)
            steps = plan(batches.size, settings, job.seed, mixed=batches.source.mixed)
            for number, rows in enumerate(steps):
                x, y, count, size = self._batch(program, batches, rows, settings)
                weight = (np.arange(size) < count).astype(np.float32)
                seed = words(job.seed, number)
                try:
                    params, moments, state, loss = program.step(
                        params, moments, state, x, y, weight, seed, active, pull, rate
                    )
                except Exception as error:
                    raise failed(error, x, y) from error
                losses.append(loss)
                counts.append(count)
            mean = _mean(losses, counts, settings, examples)
        after = Weights(program.params.named(params), program.state.named(state))
        return Trained(after, batches.size, {"loss": mean}, len(losses))

    def train_cohort(
        self, weights: Sequence[Weights], examples: Sequence[Any], jobs: Sequence[Job]
    ) -> list[Trained] | None:
        """What `train` gives for each node, to float tolerance, as one computation.

        None where that does not apply: nodes that start from different weights or have other
        options, a loss without a value for each example, a model with statistics of its batches.
        """
        first = jobs[0]
        settings = self.settings(first.options, first.learning_rate)
        alike = all(
            job.learning_rate == first.learning_rate and job.options == first.options
            for job in jobs
        )
        if not alike or settings.batched == "off" or not _same_start(weights):
            return None
        program = self._program(first.options, settings)
        if program.unbatchable:
            return None
        try:
            opened = [Batches.of(e, self.objective, self.target) for e in examples]
            with seeded(first.seed), _device(settings.device):
                found = self._together(program, opened, weights[0], jobs, settings)
        except UmbelError:  # one node is at fault: alone, it is told so, and the others go on
            return None
        except Exception as error:  # what vmap cannot do, whatever a model does
            program.unbatchable = f"jax.vmap cannot batch it ({described(error, '', 200)})"
            return None
        return found

    def group_size(self, options: Options) -> int:
        """How many nodes an engine should give to `train_cohort` at a time; 1 is no batching."""
        settings = self.settings(options)
        if settings.batched == "off":
            return 1
        program = self._program(options, settings)
        why = program.unbatchable
        if program.state.names:
            why = "the model keeps statistics of its batches"
        if settings.batched == "on":
            if why:
                raise ConfigError(f"batched=on cannot be had: {why}; use batched=auto")
            return COHORT
        small = sum(map(math.prod, program.params.shapes)) <= MOST_PARAMETERS
        return COHORT if small and not why else 1

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """Loss and metrics on examples, in batches of 512; `weights` is not mutated."""
        settings = self.settings(options)
        program = self._program(options, settings)
        batches = Batches.of(examples, self.objective, self.target)
        with seeded(0), _device(settings.device):
            params, state = self._filled(program, weights)

            def outputs(x: Any) -> Any:
                count = _length(x)
                size = min(EVALUATION_BATCH, 1 << (count - 1).bit_length())
                try:
                    return program.outputs(params, state, padded(x, size))[:count]
                except Exception as error:
                    raise failed(error, x, torch.zeros(count)) from error

            found = judged(batches, outputs, self.metrics, whole=self.whole, size=EVALUATION_BATCH)
        return Evaluated(*found)

    def _program(self, options: Options, settings: JaxSettings | None = None) -> Program:
        settings = self.settings(options) if settings is None else settings
        compiled = (settings.momentum, settings.weight_decay, settings.clip_gradient)

        def make() -> Program:
            model = model_of(self.model, self.apply, self.inputs, options)
            loss = LOSSES[self.loss] if isinstance(self.loss, str) else own_loss(self.loss)
            return Program(model, loss, settings, self.optimizer)

        own = sorted(options.items()) if takes_options(self.model, self.apply) else ()
        return self.programs.get((tuple(own), compiled), make)

    def _filled(self, program: Program, weights: Weights) -> tuple[Any, Any]:
        buffers = weights.buffers
        if not buffers and program.state.names:
            buffers = program.first(0).buffers
        return program.params.filled(weights.parameters), program.state.filled(buffers)

    def _batch(
        self, program: Program, batches: Batches, rows: Tensor | None, settings: JaxSettings
    ) -> tuple[Any, Any, int, int]:
        """Inputs and targets of a step, how many there are, and to how many they were padded."""
        x, targets = batches.take(rows)
        y, count = arrays(targets), len(targets)
        try:
            shape = program.shape_of(x)
            if self.objective.targets == "class":
                check_labels(targets, shape.shape[-1])
            size = max(count, settings.batch_size)
            if size > count and program.pads(x, y):
                return padded(x, size), padded(y, size), count, size
        except Exception as error:
            raise failed(error, x, targets) from error
        return x, y, count, count

    def _together(
        self,
        program: Program,
        opened: list[Batches],
        start: Weights,
        jobs: Sequence[Job],
        settings: JaxSettings,
    ) -> list[Trained] | None:
        """All nodes' steps side by side; a node that has taken its own stays as it is."""
        jax = program.jax
        if any(batches.source.mixed is not None for batches in opened):
            return None  # each is read in an order of its own
        steps = [list(plan(b.size, settings, j.seed)) for b, j in zip(opened, jobs, strict=True)]
        size = settings.batch_size or max(b.size for b in opened)
        places = 1 << (len(jobs) - 1).bit_length()  # few sizes, so that little is compiled
        params, state = self._filled(program, start)

        def stacked(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * places), tree)

        pulls = [
            _pull(program, job.correction or proximal(settings), start, params) for job in jobs
        ]
        if len({tuple(part is None for part in pull) for pull in pulls}) > 1:
            return None  # corrected in different ways
        pull = jax.tree.map(
            lambda *each: jax.numpy.stack([*each] + [each[0]] * (places - len(each))), *pulls
        )
        params, state = stacked(params), stacked(state)
        rate = np.float32(settings.learning_rate)
        moments = jax.vmap(lambda p: program.begin(p, rate))(params)
        losses: list[Any] = []
        counts = np.zeros((max(map(len, steps)), places), np.int64)
        for number in range(len(counts)):
            taken: list[Any] = []
            for place, (batches, own) in enumerate(zip(opened, steps, strict=True)):
                if number >= len(own):
                    taken.append(taken[0] if taken else None)
                    continue
                x, y, count, _ = self._batch(program, batches, own[number], settings)
                if not program.pads(x, y):
                    return None
                counts[number, place] = count
                taken.append((padded(x, size), padded(y, size)))
            some = next(each for each in taken if each is not None)
            rows = [each or some for each in taken] + [some] * (places - len(taken))
            x, y = jax.tree.map(lambda *each: np.stack(each), *rows)
            weight = (np.arange(size) < counts[number][:, None]).astype(np.float32)
            seeds = np.stack(
                [words(job.seed, number) for job in jobs]
                + [words(0, number)] * (places - len(jobs))
            )
            params, moments, state, loss = program.step_many(
                params,
                moments,
                state,
                x,
                y,
                weight,
                seeds,
                counts[number] > 0,
                pull,
                rate,
            )
            losses.append(loss)
        return self._apart(program, start, params, np.stack(losses), counts, opened, settings)

    def _apart(
        self,
        program: Program,
        start: Weights,
        params: Any,
        losses: np.ndarray[Any, Any],
        counts: np.ndarray[Any, Any],
        opened: list[Batches],
        settings: JaxSettings,
    ) -> list[Trained]:
        """Each node's own result."""
        leaves = [to_tensor(leaf) for leaf in program.jax.tree.leaves(params)]
        results = []
        for place, batches in enumerate(opened):
            own = {
                name: leaf[place] for name, leaf in zip(program.params.names, leaves, strict=True)
            }
            loss = _mean(list(losses[:, place]), list(counts[:, place]), settings, None)
            after = Weights(own, dict(start.buffers))
            done = int((counts[:, place] > 0).sum())
            results.append(Trained(after, batches.size, {"loss": loss}, done))
        return results


def _pull(
    program: Program, correction: Correction | None, start: Weights, params: Any
) -> tuple[Any, Any, Any]:
    """Offset, anchor and strength of a correction, laid out as the parameters are.

    Args:
        program: whose parameters they are.
        correction: over flat vectors; None is none.
        start: the weights that training starts from.
        params: the same as the program has them.
    """
    if not correction:
        return None, None, None
    layout = Manifest.of(start.parameters)
    offset = anchor = None
    if correction.offset is not None:
        offset = program.params.filled(layout.unflatten(correction.offset))
    if correction.strength and correction.anchor is not None:
        anchor = program.params.filled(layout.unflatten(correction.anchor))
    elif correction.strength:
        anchor = params
    return offset, anchor, None if anchor is None else np.float32(correction.strength)


class _Programs:
    """The compiled model that this process is working with; a copy starts empty."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: dict[Any, Program] = {}

    def get(self, key: Any, make: Callable[[], Program]) -> Program:
        with self._lock:
            if key not in self._last:
                made = make()
                self._last = {key: made}
            return self._last[key]

    def __reduce__(self) -> tuple[type["_Programs"], tuple[()]]:
        return _Programs, ()


def _objective(loss: str | Callable[[Any, Any], Any]) -> Objective:
    """The loss as evaluations see it: of tensors."""
    if isinstance(loss, str) or not callable(loss):
        return objective(loss)

    def of_tensors(outputs: Tensor, targets: Any) -> Tensor:
        value = own_loss(loss)(outputs.numpy(), arrays(targets))[0]
        return torch.tensor(float(np.mean(value)))

    return Objective(getattr(loss, "__name__", type(loss).__name__), of_tensors, "any")


def _device(name: str) -> Any:
    """The device that a setting names, as the default within.

    Raises:
        ConfigError: this machine does not have it.
    """
    jax = needed("jax", EXTRA, WHO)
    if name == "auto":
        return jax.default_device(jax.devices()[0])
    kind, _, place = name.partition(":")
    try:
        return jax.default_device(jax.devices(kind)[int(place or 0)])
    except (RuntimeError, ValueError, IndexError):
        raise ConfigError(
            f"device is {name!r}, which this machine does not have for JAX; use device=auto"
        ) from None


def _mean(losses: list[Any], counts: list[Any], settings: JaxSettings, examples: Any) -> float:
    """The mean loss over all steps, each counted by its number of examples.

    Raises:
        RunError: it is infinite or not a number.
        ConfigError: that is because of the examples.
    """
    values, weights = np.asarray(losses, np.float64), np.asarray(counts, np.float64)
    mean = float((values * weights)[weights > 0].sum() / max(weights.sum(), 1.0))
    if math.isfinite(mean):
        return mean
    raise diverged_on(
        examples,
        RunError(
            f"the training loss is {mean}: training diverged at learning-rate="
            f"{settings.learning_rate:g}; lower it, or set clip-gradient"
        ),
    )


def _same_start(weights: Sequence[Weights]) -> bool:
    first = weights[0]
    return all(
        same_bits(a, b)
        for other in weights[1:]
        for one, two in (
            (first.parameters, other.parameters),
            (first.buffers, other.buffers),
        )
        for a, b in zip(one.values(), two.values(), strict=True)
        if a is not b
    )


def _length(x: Any) -> int:
    while isinstance(x, dict | list):
        x = next(iter(x.values())) if isinstance(x, dict) else x[0]
    return len(x)
