"""A Keras model as named tensors, and a step of its optimiser with what a federation adds.

Keras numbers layers as they are made (`dense`, `dense_1`, ...), so a model is made after
`keras.utils.clear_session`: its names are then the same in every process.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients.frameworks.extras import needed
from umbel.clients.local_settings import LocalSettings
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Options, Tree, Weights
from umbel.core.errors import ConfigError

WHO = "KerasTrainer"
EXTRA = "keras"
BACKENDS = ("tensorflow", "jax", "torch")
DEFAULT_RATE = 0.05

MODEL = "keras.src.models.model.Model"


def load_keras(backend: str) -> Any:
    """Keras on this backend; left empty, KERAS_BACKEND's, or else the first that is installed.

    Raises:
        ConfigError: it is not installed, or Keras was loaded with another backend before.
    """
    loaded = sys.modules.get("keras")
    if loaded is not None and hasattr(loaded, "backend"):
        current = loaded.backend.backend()
        if backend and backend != current:
            raise ConfigError(
                f"KerasTrainer is to use the backend {backend}, but Keras was loaded with "
                f"{current} in this process; set KERAS_BACKEND={backend} before it starts, and "
                "import keras inside the function that makes the model"
            )
        needed(current, EXTRA, WHO)
        return needed("keras", EXTRA, WHO)
    chosen = backend or os.environ.get("KERAS_BACKEND", "")
    if not chosen:
        found = (name for name in BACKENDS if importlib.util.find_spec(name) is not None)
        chosen = next(found, "tensorflow")
    if chosen not in BACKENDS:
        raise ConfigError(f"the backend of Keras is {chosen!r}; it can be {', '.join(BACKENDS)}")
    os.environ["KERAS_BACKEND"] = chosen
    needed(chosen, chosen, f"{WHO} on the backend {chosen}")
    return needed("keras", EXTRA, WHO)


def check_made(model: Any) -> None:
    """Raises:
    ConfigError: the model exists already, or is no function.
    """
    kinds = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
    if MODEL in kinds:
        raise ConfigError(
            f"KerasTrainer was given a {type(model).__name__} that exists already; give it the "
            "function that makes the model, and import keras inside: KerasTrainer(make)"
        )
    if not callable(model):
        raise ConfigError(
            f"KerasTrainer was given a {type(model).__name__}; give it a function that makes a "
            "keras.Model"
        )


def takes_options(make: Callable[..., Any]) -> bool:
    """Whether the model is made from the run's options: its function has an argument."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        p.name == "options" or (p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


def build(keras: Any, make: Callable[..., Any], inputs: Any, options: Options, seed: int) -> Any:
    """A new model whose first weights depend on nothing but the options and the seed.

    Raises:
        ConfigError: the function does not return a model with weights of known shape.
    """
    with seeded(seed):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed & 0xFFFFFFFF)
        model = make(options) if takes_options(make) else make()
        if not isinstance(model, keras.Model):
            raise ConfigError(
                f"the function that makes the model returned a {type(model).__name__}; it has to "
                "return a keras.Model"
            )
        if not model.built or not model.weights:
            if inputs is None:
                raise ConfigError(
                    f"the model {model.name} does not know its inputs before it sees data; begin "
                    "it with keras.Input(shape), or say KerasTrainer(..., inputs=(64,))"
                )
            model(np.zeros((1, *inputs), np.float32))
    if not model.trainable_weights:
        raise ConfigError("the model has no trainable weight; leave trainable=True on some layer")
    return model


def array_of(keras: Any, variable: Any) -> Tensor:
    """A variable's value as a CPU tensor that shares nothing with it."""
    array = np.array(keras.ops.convert_to_numpy(variable))
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass
class Piece:
    """A built model and handles on its state.

    Attributes:
        keras: the library.
        model: compiled.
        own: whether the model came compiled: its loss and metrics are the user's.
        scores: whether its last layer ends in softmax or sigmoid, so that outputs are shares.
        parameters: trainable weights, by name.
        buffers: the other weights, by name: statistics of batch normalisation, frozen layers.
        seeds: of dropout and the like; they are begun anew with every job.
        correction: what is added to gradients.
        optimizer: the first values of the optimiser's own variables.
        rate: the optimiser's own learning rate; None where that is a schedule.
        gathered: names of the buffers that training gathers from examples; None until asked for.
    """

    keras: Any
    model: Any
    own: bool
    scores: bool
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    seeds: list[Any]
    correction: "Correction"
    optimizer: list[tuple[Any, Any]] = field(default_factory=list)
    rate: float | None = None
    gathered: tuple[str, ...] | None = None

    def load(self, weights: Weights) -> None:
        """Fill the model; buffers that `weights` lacks are left.

        Raises:
            ConfigError: the weights are not those of this model.
        """
        odd = sorted(weights.parameters.keys() ^ self.parameters.keys())
        odd += sorted(weights.buffers.keys() - self.buffers.keys())
        if odd:
            raise ConfigError(
                f"the weights do not belong to this model: {odd[0]} is in only one of them; train "
                "and initialise with the same model and options"
            )
        for name, variable in self.parameters.items():
            _assign(variable, weights.parameters[name], name)
        for name, value in weights.buffers.items():
            _assign(self.buffers[name], value, name)

    def weights(self) -> Weights:
        """The model's state as new tensors."""
        return Weights(self._named(self.parameters), self._named(self.buffers))

    def _named(self, variables: dict[str, Any]) -> Tree:
        return {name: array_of(self.keras, variable) for name, variable in variables.items()}

    def begin(self, seed: int, rate: float) -> None:
        """Start a job: the optimiser and the random layers as they were first.

        Raises:
            ConfigError: a rate is asked for, and the optimiser has a schedule of its own.
        """
        for variable, first in self.optimizer:
            variable.assign(first)
        for place, variable in enumerate(self.seeds):
            words = np.random.SeedSequence([seed, place]).generate_state(1)
            variable.assign(np.array([words[0] >> 1, 0], str(variable.dtype)))
        if not rate:
            return
        if self.rate is None:
            raise ConfigError(
                f"learning-rate is {rate:g}, but the model was compiled with an optimizer that "
                "has a schedule of its own; leave learning-rate at 0, or compile with a number"
            )
        self.model.optimizer.learning_rate = rate


def _assign(variable: Any, value: Tensor, name: str) -> None:
    if tuple(variable.shape) != tuple(value.shape):
        raise ConfigError(
            f"the weights do not belong to this model: {name} has shape {tuple(value.shape)}, the "
            f"model's own has {tuple(variable.shape)}; use the same model and options"
        )
    plain = value.float() if value.dtype == torch.bfloat16 else value
    variable.assign(plain.numpy().astype(str(variable.dtype)) if plain is value else plain.numpy())


def opened(keras: Any, model: Any, loss: Any, optimizer: Any, settings: LocalSettings) -> Piece:
    """A model ready for training under these settings.

    Args:
        keras: the library.
        model: a new one; compiled by the user or not.
        loss: where it is not compiled: a name of Umbel's, or what Keras takes.
        optimizer: where it is not compiled: a function of a learning rate, or None for SGD.
        settings: of which momentum, weight decay and the limit of the gradient hold.
    """
    own = bool(getattr(model, "compiled", False)) and model.optimizer is not None
    scores = _ends_in_scores(model)
    if not own:
        made = (
            keras.optimizers.SGD(DEFAULT_RATE, momentum=settings.momentum)
            if optimizer is None
            else optimizer(DEFAULT_RATE)
        )
        jit = keras.backend.backend() == "jax"  # elsewhere each shape of a batch costs more
        model.compile(made, _loss(keras, loss, scores), jit_compile=jit)
    names: dict[int, str] = {}
    for variable in model.weights:
        path = base = str(variable.path)
        times = 1
        while path in names.values():
            times += 1
            path = f"{base}#{times}"
        names[id(variable)] = path
    piece = Piece(
        keras,
        model,
        own,
        scores,
        {names[id(v)]: v for v in model.trainable_weights},
        {names[id(v)]: v for v in model.non_trainable_weights},
        [v for v in model.variables if str(v.path).endswith("seed_generator_state")],
        Correction(settings.clip_gradient, 0.0 if own else settings.weight_decay),
    )
    made = model.optimizer
    try:
        piece.rate = float(keras.ops.convert_to_numpy(made.learning_rate))
        made.learning_rate = piece.rate
    except Exception:  # a schedule, of whatever kind
        piece.rate = None
    made.build(model.trainable_variables)
    piece.correction.attach(keras, made)
    piece.optimizer = [(v, keras.ops.convert_to_numpy(v).copy()) for v in made.variables]
    return piece


class Correction:
    """What is added to each gradient before the optimiser: offset + strength (w - anchor).

    This is how local objectives (a proximal term, a control variate) reach every backend, and a
    model's own `train_step`: all of them end in the optimiser's `apply`. Its numbers are variables
    of the optimiser, so that compiled steps see them change.

    Args:
        limit: of the whole gradient's norm, after the correction; 0 is none.
        decay: weight decay, added to the gradient.
    """

    def __init__(self, limit: float, decay: float) -> None:
        self.limit, self.decay = limit, decay
        self.offset: list[Any] | None = None
        self.anchor: list[Any] | None = None
        self.strength: Any = None
        self._optimizer: Any = None
        self._keras: Any = None

    def attach(self, keras: Any, optimizer: Any) -> None:
        """Stand before this optimiser's `apply`."""
        self._keras, self._optimizer = keras, optimizer
        kind, shaped = type(optimizer), self._shaped

        class Corrected(kind):  # type: ignore[misc, valid-type]  # a class that is known when it runs
            def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
                variables = (
                    self._trainable_variables
                    if trainable_variables is None
                    else (trainable_variables)
                )
                return super().apply(shaped(list(grads), list(variables)), trainable_variables)

        Corrected.__name__ = Corrected.__qualname__ = kind.__name__
        optimizer.__class__ = Corrected

    def set(self, offset: Tree | None, anchor: Tree | None, strength: float) -> bool:
        """Give the numbers of a job, in the order of the model's trainable weights.

        Returns:
            Whether variables were added, so that compiled steps have to be made anew.
        """
        added = False
        for name, given in (("offset", offset), ("anchor", anchor)):
            if given is not None and getattr(self, name) is None:
                setattr(self, name, self._variables(name))
                added = True
        if anchor is not None and self.strength is None:
            self.strength = self._optimizer.add_variable(
                shape=(), initializer="zeros", name="umbel_strength"
            )
            added = True
        for own, given in ((self.offset, offset), (self.anchor, anchor)):
            for place, variable in enumerate(own or ()):
                value = None if given is None else list(given.values())[place]
                variable.assign(
                    np.zeros(tuple(variable.shape), np.float32)
                    if value is None
                    else value.float().numpy()
                )
        if self.strength is not None:
            self.strength.assign(strength if anchor is not None else 0.0)
        return added

    def _variables(self, name: str) -> list[Any]:
        return [
            self._optimizer.add_variable_from_reference(v, name=f"umbel_{name}")
            for v in self._optimizer._trainable_variables
        ]

    def _shaped(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        ops = self._keras.ops
        if self.offset is None and self.anchor is None and not self.limit and not self.decay:
            return gradients
        shaped: list[Any] = []
        for place, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            if gradient is None:
                shaped.append(None)
                continue
            gradient = ops.convert_to_tensor(gradient)  # dense, where it was sparse
            if self.offset is not None:
                gradient = gradient + ops.cast(self.offset[place], gradient.dtype)
            if self.anchor is not None:
                pull = ops.cast(self.strength, variable.dtype) * (variable - self.anchor[place])
                gradient = gradient + ops.cast(pull, gradient.dtype)
            if self.decay:
                gradient = gradient + self.decay * ops.cast(variable, gradient.dtype)
            shaped.append(gradient)
        if not self.limit:
            return shaped
        square = sum(ops.sum(ops.square(g)) for g in shaped if g is not None)
        factor = ops.minimum(1.0, self.limit / (ops.sqrt(square) + 1e-6))
        return [None if g is None else g * ops.cast(factor, g.dtype) for g in shaped]


def _ends_in_scores(model: Any) -> bool:
    """Whether the last layer's activation makes shares of classes."""
    layers = getattr(model, "layers", ())
    if not layers:
        return False
    last = layers[-1]
    if getattr(last, "layers", None):
        return _ends_in_scores(last)
    activation = getattr(last, "activation", None)
    return type(last).__name__ in ("Softmax", "Sigmoid") or getattr(activation, "__name__", "") in (
        "softmax",
        "sigmoid",
    )


def _loss(keras: Any, loss: Any, scores: bool) -> Any:
    """What `compile` is given for a loss by Umbel's name; others are Keras's own."""
    logits = not scores
    if loss == "cross-entropy":
        sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=logits, ignore_class=-1)
        dense = keras.losses.CategoricalCrossentropy(from_logits=logits)

        def cross_entropy(targets: Any, outputs: Any) -> Any:
            # Keras hands over labels as real numbers too; their shape tells them from shares.
            labels = len(targets.shape) < len(outputs.shape) or targets.shape[-1] == 1
            return sparse(targets, outputs) if labels else dense(targets, outputs)

        return cross_entropy
    if loss == "binary-cross-entropy":
        binary = keras.losses.BinaryCrossentropy(from_logits=logits)
        return lambda targets, outputs: binary(
            keras.ops.reshape(targets, keras.ops.shape(outputs)), outputs
        )
    if loss == "mse":
        error = keras.losses.MeanSquaredError()
        return lambda targets, outputs: error(
            keras.ops.reshape(targets, keras.ops.shape(outputs)), outputs
        )
    return loss
