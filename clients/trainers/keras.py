"""A trainer for models of Keras 3, on TensorFlow, JAX or PyTorch.

    def net():
        import keras
        return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])

    trainer = KerasTrainer(net)                   # SGD and cross-entropy, or as it is compiled

Keras and its backend are loaded when a model is made and not before, because TensorFlow does not
survive a fork. The same job gives the same bits in any process of the same backend: shuffles,
dropout and augmentations are drawn from the job's seed.
"""

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umbel.clients.frameworks.intake import Batches, arrays, check_labels, failed, judged
from umbel.clients.frameworks.keras_model import (
    Piece,
    build,
    check_made,
    load_keras,
    opened,
    takes_options,
)
from umbel.clients.local_settings import LocalSettings, local_settings
from umbel.clients.pytorch.batches import plan
from umbel.clients.pytorch.correcting import proximal
from umbel.clients.pytorch.loop import diverged_on
from umbel.clients.pytorch.losses import NAMED, Objective, objective
from umbel.clients.seeding import seeded
from umbel.clients.settings import options_of, settings_of
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.core.errors import ConfigError, RunError
from umbel.core.limits import at_least, option
from umbel.core.options import dashed
from umbel.core.records import Manifest
from umbel.strategies.objective import CORRECTION, Correction

BUILD_SEED = 0
EVALUATION_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class KerasSettings(LocalSettings):
    """How a node trains with Keras: `LocalSettings`, and what only Keras has.

    Attributes:
        learning_rate: of the optimiser; 0 is the compiled optimiser's own, or 0.05 where the
            model is not compiled. A round's own rate (`Job.learning_rate`) wins.
        device: where to train: "auto" is Keras's own choice, or "cpu:0", "gpu:0".
    """

    learning_rate: float = option(0.0, at_least(0))
    device: str = "auto"


@dataclass(frozen=True)
class KerasTrainer(KerasSettings):
    """Trains a model of Keras on a node's examples. The inherited fields are option defaults.

    Attributes:
        model: a function that makes a `keras.Model`; with an argument, it is given the run's
            options. A compiled model is trained and judged as it is compiled.
        backend: "tensorflow", "jax" or "torch"; empty is KERAS_BACKEND's, or the first installed.
        inputs: the shape of one example, for a model that does not know it.
        loss: of a model that is not compiled: "cross-entropy", "binary-cross-entropy" (of logits,
            or of shares where the last layer is a softmax or a sigmoid), "mse", or what
            `keras.Model.compile` takes.
        optimizer: of a model that is not compiled: a function of a learning rate that makes a
            `keras.optimizers.Optimizer`; SGD where it is left out.
        metrics: of a model that is not compiled: a function of outputs and targets (arrays) that
            returns means over a batch.
        whole: whether `metrics` is given all outputs and targets at once.
        target: the key of the target where a data set's rows are dicts.
        OPTIONS: every option that this trainer understands, with its default.
    """

    model: Callable[..., Any]
    backend: str = ""
    inputs: tuple[int, ...] | None = None
    loss: Any = "cross-entropy"
    optimizer: Callable[[float], Any] | None = None
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None
    whole: bool = False
    target: str = ""
    USE: ClassVar[str] = "model(x)"
    honours: ClassVar[frozenset[str]] = frozenset({CORRECTION})
    OPTIONS: dict[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    defaults: KerasSettings = field(init=False, repr=False, compare=False)
    objective: Objective = field(init=False, repr=False, compare=False)
    bench: "_Bench" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_made(self.model)
        for name in ("optimizer", "metrics"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ConfigError(
                    f"{name} is a {type(given).__name__}, and it has to be a function"
                    + (" of a learning rate: optimizer=lambda rate: ..." if name[0] == "o" else "")
                )
        named = self.loss if isinstance(self.loss, str) and self.loss in NAMED else None
        loss = Objective("its own", _unused, "any") if named is None else objective(named)
        object.__setattr__(self, "OPTIONS", options_of(self, KerasSettings))
        object.__setattr__(self, "defaults", settings_of(self, KerasSettings))
        object.__setattr__(self, "objective", loss)
        object.__setattr__(self, "bench", _Bench())

    def settings(self, options: Options, learning_rate: float | None = None) -> KerasSettings:
        """This trainer's settings with the options' changes; a round's learning rate wins.

        Raises:
            ConfigError: an option has the wrong type or is out of its range.
        """
        settings = local_settings(self.defaults, options, learning_rate)
        scheduled = options.get("schedule", "constant") != "constant" or options.get(
            "warmup-rounds"
        )
        if scheduled and learning_rate is None and not settings.learning_rate:
            raise ConfigError(
                "the schedule changes the option learning-rate, which is 0 (the optimizer's own); "
                "set learning-rate, or leave the schedule out"
            )
        return settings

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where a setting cannot be used."""
        self.settings(options)

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model: trainable weights drawn from `seed`, others as every node has them."""
        with self.bench.lock:
            piece = self._piece(options, self.settings(options))
            keras = piece.keras
            model = build(keras, self.model, self.inputs, options, seed)
            fresh = [keras.ops.convert_to_numpy(v) for v in model.trainable_weights]
            built = self.bench.first
            return Weights(
                {
                    name: torch.from_numpy(np.array(value)).to(built.parameters[name].dtype)
                    for name, value in zip(piece.parameters, fresh, strict=True)
                },
                {name: value.clone() for name, value in built.buffers.items()},
            )

    def ready(self, weights: Weights, options: Options) -> Any:
        """A model of its own with these weights."""
        with self.bench.lock:
            piece = self._piece(options, self.settings(options))
            model = build(piece.keras, self.model, self.inputs, options, BUILD_SEED)
            own = opened(piece.keras, model, self.loss, self.optimizer, self.settings(options))
            own.load(weights)
            return own.model

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The weights that training gathers from examples: not trainable, and not only frozen."""
        with self.bench.lock:
            piece = self._piece(options, self.settings(options))
            if piece.gathered is None:
                piece.gathered = self._gathered(piece, options)
            return piece.gathered

    def _gathered(self, piece: Piece, options: Options) -> tuple[str, ...]:
        """What stays untrainable when every layer of a model is made trainable."""
        if not piece.buffers:
            return ()
        thawed = build(piece.keras, self.model, self.inputs, options, BUILD_SEED)
        thawed.trainable = True
        places = {id(v): place for place, v in enumerate(thawed.weights)}
        never = {places[id(v)] for v in thawed.non_trainable_weights}
        order = {id(v): place for place, v in enumerate(piece.model.weights)}
        return tuple(
            name
            for name, v in piece.buffers.items()
            if order[id(v)] in never and "float" in str(v.dtype)
        )

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples; `weights` is not mutated.

        Raises:
            ConfigError: the options, the examples or the weights do not fit the model.
            RunError: training diverged.
        """
        settings = self.settings(job.options, job.learning_rate)
        batches = Batches.of(examples, self.objective, self.target)
        with self.bench.lock:
            piece = self._piece(job.options, settings)
            with seeded(job.seed), _device(piece.keras, settings.device):
                self._load(piece, weights)
                piece.keras.utils.set_random_seed(job.seed & 0xFFFFFFFF)
                piece.begin(job.seed, settings.learning_rate)
                self._correct(piece, job.correction or proximal(settings), weights)
                loss, steps = self._fit(piece, batches, settings, job.seed)
                if not math.isfinite(loss):
                    raise diverged_on(examples, _diverged(loss, piece))
                after = piece.weights()
        return Trained(_typed(after, weights), batches.size, {"loss": loss}, steps)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """Loss and metrics on examples, in batches of 512; `weights` is not mutated.

        A compiled model's are those that it was compiled with.
        """
        settings = self.settings(options)
        batches = Batches.of(examples, self.objective, self.target)
        with self.bench.lock:
            piece = self._piece(options, settings)
            with seeded(0), _device(piece.keras, settings.device):
                self._load(piece, weights)
                if piece.own or self.objective.name not in NAMED:
                    return Evaluated(batches.size, self._compiled_metrics(piece, batches))
                found = judged(
                    batches,
                    lambda x: self._outputs(piece, x),
                    self.metrics,
                    whole=self.whole,
                    size=EVALUATION_BATCH,
                )
        return Evaluated(*found)

    def _piece(self, options: Options, settings: KerasSettings) -> Piece:
        """The model for these options, made on first use."""
        compiled = (settings.momentum, settings.weight_decay, settings.clip_gradient)
        own = tuple(sorted(options.items())) if takes_options(self.model) else ()
        if self.bench.key != (own, compiled):
            keras = load_keras(self.backend)
            model = build(keras, self.model, self.inputs, options, BUILD_SEED)
            piece = opened(keras, model, self.loss, self.optimizer, settings)
            for name in ("momentum", "weight_decay"):
                if getattr(settings, name) and (piece.own or self.optimizer is not None):
                    raise ConfigError(
                        f"{dashed(name)} is {getattr(settings, name)}, but the model has an "
                        "optimizer of its own; set it there"
                    )
            self.bench.key, self.bench.piece = (own, compiled), piece
            self.bench.first = piece.weights()
        assert self.bench.piece is not None  # it has a key
        return self.bench.piece

    def _load(self, piece: Piece, weights: Weights) -> None:
        buffers = {**self.bench.first.buffers, **weights.buffers}
        piece.load(Weights(weights.parameters, buffers))

    def _correct(self, piece: Piece, correction: Correction | None, start: Weights) -> None:
        """Give the optimiser what local objectives add to every gradient of the job."""
        layout = Manifest.of(start.parameters)
        correction = correction or Correction()
        offset, anchor = correction.offset, correction.anchor
        added = piece.correction.set(
            None if offset is None else layout.unflatten(offset),
            (start.parameters if anchor is None else layout.unflatten(anchor))
            if correction.strength
            else None,
            correction.strength,
        )
        if added:
            piece.model.make_train_function(force=True)

    def _fit(
        self, piece: Piece, batches: Batches, settings: KerasSettings, seed: int
    ) -> tuple[float, int]:
        """Take the job's steps; the mean loss over all of them, and how many they were."""
        piece.model.reset_metrics()
        least = 2 if piece.buffers else 1
        loss, steps = math.nan, 0
        for rows in plan(batches.size, settings, seed, least=least, mixed=batches.source.mixed):
            x, y = self._pair(piece, batches, rows)
            try:
                loss = piece.model.train_on_batch(x, y, return_dict=True)["loss"]
            except Exception as error:
                raise failed(error, x, y) from error
            steps += 1
        return float(loss), steps

    def _pair(self, piece: Piece, batches: Batches, rows: Tensor | None) -> tuple[Any, Any]:
        x, y = batches.take(rows)
        shape = getattr(piece.model, "output_shape", None)
        classes = isinstance(y, Tensor) and not y.is_floating_point()
        about = self.objective.targets == "class" or "sparse" in str(
            getattr(piece.model.loss, "name", piece.model.loss)
        )
        if classes and about and isinstance(shape, tuple) and isinstance(shape[-1], int):
            check_labels(y, shape[-1])
        if classes and self.objective.targets == "class":
            y = y.clamp(min=-1)  # the label that does not count
        return x, arrays(y)

    def _compiled_metrics(self, piece: Piece, batches: Batches) -> dict[str, float]:
        piece.model.reset_metrics()
        found: dict[str, Any] = {}
        for start in range(0, batches.size, EVALUATION_BATCH):
            rows = torch.arange(start, min(start + EVALUATION_BATCH, batches.size))
            x, y = self._pair(piece, batches, rows)
            try:
                found = piece.model.test_on_batch(x, y, return_dict=True)
            except Exception as error:
                raise failed(error, x, y) from error
        return {name: float(value) for name, value in found.items()}

    def _outputs(self, piece: Piece, x: Any) -> np.ndarray[Any, Any]:
        """Outputs as the losses take them: logits, or their logarithms where they are shares."""
        try:
            outputs = np.asarray(piece.model.predict_on_batch(x), np.float32)
        except Exception as error:
            raise failed(error, x, torch.zeros(0)) from error
        if not piece.scores or self.objective.targets == "any":
            return outputs
        shares = np.clip(outputs, 1e-7, 1 - 1e-7)
        if self.objective.name == "cross-entropy":
            return np.log(shares)
        if self.objective.name == "binary-cross-entropy":
            return np.log(shares) - np.log1p(-shares)
        return outputs


class _Bench:
    """The model that this process is working with; a copy starts empty."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.key: Any = None
        self.piece: Piece | None = None
        self.first = Weights({})

    def __reduce__(self) -> tuple[type["_Bench"], tuple[()]]:
        return _Bench, ()


def _unused(*_: Any) -> Tensor:
    raise RunError("a loss of Keras's own is computed by Keras")


def _typed(after: Weights, before: Weights) -> Weights:
    """New tensors in the order and types of those that came."""
    return Weights(
        {n: after.parameters[n].to(old.dtype) for n, old in before.parameters.items()},
        {n: after.buffers[n].to(old.dtype) for n, old in before.buffers.items()},
    )


def _diverged(loss: float, piece: Piece) -> RunError:
    rate = piece.keras.ops.convert_to_numpy(piece.model.optimizer.learning_rate)
    return RunError(
        f"the training loss is {loss}: training diverged at learning-rate={float(rate):g}; lower "
        "it, or set clip-gradient"
    )


def _devices(keras: Any) -> list[str]:
    """The devices that the backend has; Keras does not list those of PyTorch."""
    if keras.backend.backend() == "torch":
        return ["cpu:0", *(f"gpu:{place}" for place in range(torch.cuda.device_count()))]
    return [str(each).lower() for each in keras.distribution.list_devices()]


def _device(keras: Any, name: str) -> AbstractContextManager[Any]:
    """The device that a setting names.

    Raises:
        ConfigError: this machine does not have it.
    """
    if name == "auto":
        return nullcontext()
    known = _devices(keras)
    full = name if ":" in name else f"{name}:0"
    if full.lower() not in known and full.lower() != "cpu:0":
        raise ConfigError(
            f"device is {name!r}, which this machine does not have for Keras (it has "
            f"{', '.join(known)}); use device=auto"
        )
    found: AbstractContextManager[Any] = keras.device(full.lower())
    return found
