"""Models of JAX in one form: a function that makes parameters, and one that applies them.

    pure functions   JaxTrainer(init, apply)            init(key), apply(params, x)
    Flax NNX         JaxTrainer(Net)                    Net(rngs) is the module
    Flax Linen       JaxTrainer(Net(), inputs=(64,))    a description; `inputs` is one example

Parameters and state are pytrees. A leaf's name is its path, as in `layers.0.kernel`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from umbel.clients.frameworks.extras import needed
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError

WHO = "JaxTrainer"
EXTRA = "jax"

NNX = "flax.nnx.module.Module"
LINEN = "flax.linen.module.Module"

TRAINING = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
"""How models call the argument that says whether they are trained, and what it is then."""


class JaxModel(Protocol):
    """What the trainer needs of a model."""

    def init(self, key: Any) -> tuple[Any, Any]:
        """The first parameters and state, drawn from a key."""
        ...

    def apply(self, params: Any, state: Any, inputs: Any, key: Any, train: bool) -> tuple[Any, Any]:
        """Outputs for a batch, and the new state."""
        ...

    def ready(self, params: Any, state: Any) -> Any:
        """The model for use outside of Umbel."""
        ...


def model_of(model: Any, apply: Any, inputs: Any, options: Options) -> JaxModel:
    """The model that a trainer was given, under these options.

    Raises:
        ConfigError: it is none of the forms above.
    """
    if apply is not None:
        return PureModel(model, apply, options)
    takes = _names(model)
    if "rngs" in takes or _is_nnx_class(model):
        return NnxModel(model, options)
    module = model if _is_linen(model) else _called(model, options=options)
    if not _is_linen(module):
        raise ConfigError(
            f"the model is a {type(module).__name__}; give JaxTrainer(init, apply) of pure "
            "functions, a class or function of `rngs` that makes a Flax NNX module, or a Flax "
            "Linen module with inputs=(shape of one example)"
        )
    if inputs is None:
        raise ConfigError(
            f"the Linen module {type(module).__name__} does not know its inputs; say "
            "JaxTrainer(..., inputs=(64,)), the shape of one example, or an example itself"
        )
    return LinenModel(module, inputs)


def takes_options(model: Any, apply: Any) -> bool:
    """Whether the model depends on the run's options."""
    return "options" in _names(model) | _names(apply)


def check_model(model: Any, apply: Any) -> None:
    """Raises:
    ConfigError: the model exists already, or is nothing that makes one.
    """
    if _is_nnx(model):
        raise ConfigError(
            f"JaxTrainer was given a {type(model).__name__} that exists already; give it the "
            "class, or a function of `rngs` that makes it: JaxTrainer(lambda rngs: ...)"
        )
    if not callable(model) and not _is_linen(model):
        raise ConfigError(
            f"JaxTrainer was given a {type(model).__name__}; give it a function that makes the "
            "parameters, and apply=..., or a model of Flax"
        )
    if apply is not None and not callable(apply):
        raise ConfigError(f"apply is {apply!r}, and it has to be a function of params and x")


def _bases(kind: Any) -> set[str]:
    return {f"{base.__module__}.{base.__name__}" for base in getattr(kind, "__mro__", ())}


def _is_linen(value: Any) -> bool:
    return LINEN in _bases(type(value))


def _is_nnx(value: Any) -> bool:
    return NNX in _bases(type(value))


def _is_nnx_class(value: Any) -> bool:
    return NNX in _bases(value)


def _names(function: Any) -> set[str]:
    # A module class of NNX has a metaclass, whose signature says nothing.
    function = function.__init__ if inspect.isclass(function) else function
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _called(function: Callable[..., Any], *given: Any, **known: Any) -> Any:
    """Call with those of the known arguments that the function takes by name."""
    takes = _names(function)
    return function(*given, **{name: value for name, value in known.items() if name in takes})


def _applied(apply: Callable[..., Any], first: tuple[Any, ...], inputs: Any, more: Any) -> Any:
    if isinstance(inputs, dict):
        return apply(*first, **inputs, **more)
    return apply(*first, *(inputs if isinstance(inputs, list) else [inputs]), **more)


def _switches(function: Any, train: bool) -> dict[str, bool]:
    takes = _names(function)
    return {name: on if train else not on for name, on in TRAINING.items() if name in takes}


@dataclass(frozen=True)
class PureModel:
    """Pure functions.

    `make(key)`, or `make(key, options=...)`, returns parameters, or a pair of parameters and
    state if `function` takes an argument `state`; then that returns outputs and the new state.
    `function` may also take `key` (for dropout) and `train`.
    """

    make: Callable[..., Any]
    function: Callable[..., Any]
    options: Options

    @functools.cached_property
    def _takes(self) -> set[str]:
        return _names(self.function)

    def init(self, key: Any) -> tuple[Any, Any]:
        made = _called(self.make, key, options=self.options)
        if "state" not in self._takes:
            return made, {}
        if not isinstance(made, tuple) or len(made) != 2:
            raise ConfigError(
                "apply takes a state, so the function that makes the parameters has to return a "
                f"pair (params, state); it returned a {type(made).__name__}"
            )
        return made

    def apply(self, params: Any, state: Any, inputs: Any, key: Any, train: bool) -> tuple[Any, Any]:
        known = {"state": state, "key": key, "options": self.options}
        more = {name: value for name, value in known.items() if name in self._takes}
        more |= _switches(self.function, train)
        found = _applied(self.function, (params,), inputs, more)
        return found if "state" in self._takes else (found, state)

    def ready(self, params: Any, state: Any) -> Any:
        jax = needed("jax", EXTRA, WHO)
        key = jax.random.key(0)

        def model(*inputs: Any) -> Any:
            given = inputs[0] if len(inputs) == 1 else list(inputs)
            return self.apply(params, state, given, key, False)[0]

        return model


@dataclass(frozen=True)
class LinenModel:
    """A Flax Linen module; collections beside `params` are its state."""

    module: Any
    inputs: Any

    def _example(self) -> Any:
        given = self.inputs
        if isinstance(given, tuple) and all(isinstance(n, int) for n in given):
            return np.zeros((1, *given), np.float32)
        if isinstance(given, dict):
            return {name: np.asarray(value)[None] for name, value in given.items()}
        if isinstance(given, list):
            return [np.asarray(value)[None] for value in given]
        return np.asarray(given)[None]

    def init(self, key: Any) -> tuple[Any, Any]:
        jax = needed("jax", EXTRA, WHO)
        keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
        more = _switches(type(self.module).__call__, False)
        made = _applied(self.module.init, (keys,), self._example(), more)
        state = {name: value for name, value in made.items() if name != "params"}
        return made["params"], state

    def apply(self, params: Any, state: Any, inputs: Any, key: Any, train: bool) -> tuple[Any, Any]:
        more: dict[str, Any] = _switches(type(self.module).__call__, train)
        more |= {"rngs": {"dropout": key}, "mutable": list(state) if train else False}
        found = _applied(self.module.apply, ({"params": params, **state},), inputs, more)
        return found if train else (found, state)

    def ready(self, params: Any, state: Any) -> Any:
        return self.module.bind({"params": params, **state})


@dataclass(frozen=True)
class NnxModel:
    """A Flax NNX module, made by a class or function of `rngs` (and `options`)."""

    make: Callable[..., Any]
    options: Options

    def __post_init__(self) -> None:
        self._graphs, self._streams  # noqa: B018 - made now, not while something is compiled

    def _made(self, key: Any) -> Any:
        nnx = needed("flax.nnx", EXTRA, WHO)
        module = _called(self.make, rngs=nnx.Rngs(key), options=self.options)
        if not isinstance(module, nnx.Module):
            raise ConfigError(
                f"the function of `rngs` returned a {type(module).__name__}; it has to return a "
                "module of flax.nnx"
            )
        return module

    @functools.cached_property
    def _graphs(self) -> dict[bool, Any]:
        """The module's definition for training and for use, and its random streams."""
        jax, nnx = needed("jax", EXTRA, WHO), needed("flax.nnx", EXTRA, WHO)
        module, graphs = self._made(jax.random.key(0)), {}
        for train in (False, True):
            (module.train if train else module.eval)()
            graphs[train] = nnx.split(module, *self._kinds())[0]
        return graphs

    def _kinds(self) -> tuple[Any, ...]:
        nnx = needed("flax.nnx", EXTRA, WHO)
        return nnx.Param, nnx.RngState, ...

    @functools.cached_property
    def _streams(self) -> Any:
        jax, nnx = needed("jax", EXTRA, WHO), needed("flax.nnx", EXTRA, WHO)
        return nnx.split(self._made(jax.random.key(0)), *self._kinds())[2]

    def _seeded(self, key: Any) -> Any:
        """The random streams, begun anew from a key."""
        jax = needed("jax", EXTRA, WHO)
        leaves, tree = jax.tree.flatten(self._streams)
        fresh = []
        for place, leaf in enumerate(leaves):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                own = jax.random.fold_in(key, place)
                fresh.append(
                    own if not leaf.shape else jax.random.split(own, leaf.size).reshape(leaf.shape)
                )
            else:
                fresh.append(jax.numpy.zeros_like(leaf))
        return jax.tree.unflatten(tree, fresh)

    def init(self, key: Any) -> tuple[Any, Any]:
        nnx = needed("flax.nnx", EXTRA, WHO)
        _, params, _, state = nnx.split(self._made(key), *self._kinds())
        return params, state

    def apply(self, params: Any, state: Any, inputs: Any, key: Any, train: bool) -> tuple[Any, Any]:
        jax, nnx = needed("jax", EXTRA, WHO), needed("flax.nnx", EXTRA, WHO)
        # Variables may be changed only at the level of tracing where they were made: here.
        params, state = jax.tree.map(lambda leaf: leaf, (params, state))
        module = nnx.merge(self._graphs[train], params, self._seeded(key), state)
        outputs = _applied(module, (), inputs, {})
        if not train:
            return outputs, state
        return outputs, nnx.split(module, *self._kinds())[3]

    def ready(self, params: Any, state: Any) -> Any:
        jax, nnx = needed("jax", EXTRA, WHO), needed("flax.nnx", EXTRA, WHO)
        return nnx.merge(self._graphs[False], params, self._seeded(jax.random.key(0)), state)
