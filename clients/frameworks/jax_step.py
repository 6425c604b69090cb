"""A model of JAX compiled: one gradient step, the same for many nodes at once, and its outputs.

A batch that is shorter than the others is padded with rows of weight zero where the loss has a
value for each example and the model keeps no statistics of its batches: else a node's last batch
would be compiled anew for each number of rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients.frameworks.extras import needed
from umbel.clients.frameworks.jax_model import EXTRA, WHO, JaxModel
from umbel.clients.local_settings import LocalSettings
from umbel.clients.trainers.base import Tree, Weights
from umbel.core.errors import ConfigError

MakeTransform = Callable[[Any], Any]
"""A learning rate to an `optax.GradientTransformation`, as `optax.adam`."""


@dataclass(frozen=True)
class Layout:
    """Names of a pytree's leaves, and how to put it together.

    Attributes:
        names: in the order of the leaves.
        tree: the structure.
        types: of the leaves.
        shapes: of the leaves.
    """

    names: tuple[str, ...]
    tree: Any
    types: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pytree: Any) -> "Layout":
        """Raises:
        ConfigError: two leaves have one name, or a leaf is no array of numbers.
        """
        jax = needed("jax", EXTRA, WHO)
        leaves, tree = jax.tree_util.tree_flatten_with_path(pytree)
        names = tuple(_name(jax, path) for path, _ in leaves)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two arrays of the model are called {twice[0]}; rename one")
        values = [jax.numpy.asarray(leaf) for _, leaf in leaves]
        for name, value in zip(names, values, strict=True):
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise ConfigError(
                    f"{name} of the model is a random key; keep it out of parameters and state, "
                    "and let apply take an argument `key`"
                )
        types = tuple(value.dtype for value in values)
        return cls(names, tree, types, tuple(tuple(value.shape) for value in values))

    def named(self, pytree: Any) -> Tree:
        """The leaves as CPU tensors that share nothing with them."""
        jax = needed("jax", EXTRA, WHO)
        leaves = jax.tree.leaves(pytree)
        return {name: to_tensor(leaf) for name, leaf in zip(self.names, leaves, strict=True)}

    def filled(self, tensors: Tree) -> Any:
        """A pytree of these tensors' values.

        Raises:
            ConfigError: they are not those of this model.
        """
        jax = needed("jax", EXTRA, WHO)
        odd = sorted(tensors.keys() ^ set(self.names))
        if odd:
            raise ConfigError(
                f"the weights do not belong to this model: {odd[0]} is in only one of them; train "
                "and initialise with the same model and options"
            )
        leaves = []
        for name, kind, shape in zip(self.names, self.types, self.shapes, strict=True):
            value = tensors[name]
            if tuple(value.shape) != shape:
                raise ConfigError(
                    f"the weights do not belong to this model: {name} has shape "
                    f"{tuple(value.shape)}, the model's own has {shape}; use the same model and "
                    "options"
                )
            plain = value.float() if value.dtype == torch.bfloat16 else value
            leaves.append(jax.numpy.array(plain.numpy(), dtype=kind, copy=True))
        return jax.tree.unflatten(self.tree, leaves)


def _name(jax: Any, path: Any) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator=".")).removesuffix(".value") or "w"


def to_tensor(leaf: Any) -> Tensor:
    """A copy of an array of JAX as a tensor of the same type."""
    array = np.array(leaf)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


def words(seed: int, *more: int) -> np.ndarray[Any, Any]:
    """A seed of 63 bits as two words, and further words."""
    return np.array([seed & 0x7FFFFFFF, (seed >> 31) & 0xFFFFFFFF, *more], np.uint32)


class Program:
    """One model under one set of options, compiled.

    Args:
        model: in the common form.
        loss: outputs and targets to a loss for each example and, of each, which positions count;
            or to the mean of a batch and None.
        settings: of which momentum, weight decay and the limit of the gradient are compiled in.
        make: the user's optimiser, or None for SGD.
    """

    def __init__(
        self, model: JaxModel, loss: Any, settings: LocalSettings, make: MakeTransform | None
    ) -> None:
        jax = self.jax = needed("jax", EXTRA, WHO)
        self.model, self.loss, self.settings, self.make = model, loss, settings, make
        params, state = model.init(jax.random.key(0))
        self.params, self.state = Layout.of(params), Layout.of(state)
        for name, kind in zip(self.params.names, self.params.types, strict=True):
            if not jax.numpy.issubdtype(kind, jax.numpy.floating):
                raise ConfigError(
                    f"the parameter {name} is of type {kind}, and JaxTrainer trains real numbers; "
                    "keep other arrays in the state"
                )
        if not self.params.names:
            raise ConfigError("the model has no parameters, so there is nothing to train")
        self._one = jax.jit(self._step)
        self._many = jax.jit(jax.vmap(self._step, in_axes=(0, 0, 0, 0, 0, 0, 0, 0, 0, None)))
        self._outputs = jax.jit(lambda p, s, x, k: model.apply(p, s, x, k, False)[0])
        self._shapes: dict[Any, Any] = {}
        self._pads: dict[Any, bool] = {}
        self.unbatchable = ""

    def first(self, seed: int) -> Weights:
        """Parameters and state drawn from a seed."""
        params, state = self.model.init(self.key(seed))
        return Weights(self.params.named(params), self.state.named(state))

    def key(self, seed: int) -> Any:
        """A key that depends on all 63 bits of a seed."""
        return self._key(words(seed))

    def _key(self, seed: Any) -> Any:
        random = self.jax.random
        return random.fold_in(random.key(seed[0]), seed[1])

    def shape_of(self, x: Any) -> Any:
        """Shape and type of the outputs for these inputs; nothing is computed."""
        leaves, tree = self.jax.tree.flatten(x)
        known = (tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if known not in self._shapes:
            params, state = self._empty(self.params), self._empty(self.state)
            self._shapes[known] = self.jax.eval_shape(self._outputs, params, state, x, self.key(0))
        return self._shapes[known]

    def _empty(self, layout: Layout) -> Any:
        leaves = [
            self.jax.ShapeDtypeStruct(shape, kind)
            for shape, kind in zip(layout.shapes, layout.types, strict=True)
        ]
        return self.jax.tree.unflatten(layout.tree, leaves)

    def pads(self, x: Any, y: Any) -> bool:
        """Whether rows of weight zero leave the others' gradient as it is."""
        if self.state.names:
            return False
        known = (y.shape[1:], str(y.dtype))
        if known not in self._pads:
            outputs = self.shape_of(x)
            self._pads[known] = self.jax.eval_shape(self.loss, outputs, y)[0].ndim > 0
        return self._pads[known]

    def begin(self, params: Any, rate: Any) -> Any:
        """The optimiser's first state."""
        jnp = self.jax.numpy
        if self.make is not None:
            return self.make(rate).init(params)
        return self.jax.tree.map(jnp.zeros_like, params) if self.settings.momentum else {}

    def outputs(self, params: Any, state: Any, x: Any) -> np.ndarray[Any, Any]:
        """What the model computes of inputs, in float32."""
        found = self._outputs(params, state, x, self.key(0))
        jnp = self.jax.numpy
        if not hasattr(found, "dtype"):
            raise ConfigError(
                f"the model returned a {type(found).__name__}; return one array of outputs"
            )
        return np.asarray(found.astype(jnp.float32) if found.dtype == jnp.bfloat16 else found)

    def step(self, *given: Any) -> Any:
        """See `_step`."""
        return self._one(*given)

    def step_many(self, *given: Any) -> Any:
        """`_step` of many nodes: everything but offset-free numbers has a first axis of nodes."""
        return self._many(*given)

    def _step(
        self,
        params: Any,
        optimizer: Any,
        state: Any,
        x: Any,
        y: Any,
        weight: Any,
        seed: Any,
        active: Any,
        pull: tuple[Any, Any, Any],
        rate: Any,
    ) -> Any:
        """One gradient step.

        Args:
            params: the parameters.
            optimizer: its state.
            state: the model's.
            x: inputs of the batch.
            y: its targets.
            weight: of each example, 0 where it only fills the batch.
            seed: the job's two words and the number of the step, for dropout.
            active: whether the step counts; a node that is done stays as it is.
            pull: offset, anchor and strength, pytrees like the parameters, or None for none:
                g + offset + strength (w - anchor) takes the place of the gradient g; this is how
                local objectives (a proximal term, a control variate) reach the step.
            rate: the learning rate.

        Returns:
            The new parameters, optimiser state and state, and the loss.
        """
        jax, jnp = self.jax, self.jax.numpy
        key = jax.random.fold_in(self._key(seed), seed[2])

        def objective(values: Any) -> Any:
            outputs, after = self.model.apply(values, state, x, key, True)
            each, counts = self.loss(outputs, y)
            if each.ndim == 0:
                return each, after
            shape = weight.reshape(weight.shape + (1,) * (each.ndim - 1))
            counts = jnp.broadcast_to(counts * shape, each.shape)
            return (each * counts).sum() / jnp.maximum(counts.sum(), 1e-12), after

        (loss, after), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        gradient = self._shaped(gradient, params, pull)
        moved, moments = self._moved(gradient, optimizer, params, rate)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(active, new, old))
        return keep(moved, params), keep(moments, optimizer), keep(after, state), loss

    def _shaped(self, gradient: Any, params: Any, pull: tuple[Any, Any, Any]) -> Any:
        """The gradient with what local objectives add to it, then its norm limited."""
        jax, jnp = self.jax, self.jax.numpy
        offset, anchor, strength = pull
        if offset is not None:
            gradient = jax.tree.map(jnp.add, gradient, offset)
        if anchor is not None:
            gradient = jax.tree.map(
                lambda g, w, a: g + (strength * (w - a)).astype(g.dtype), gradient, params, anchor
            )
        most = self.settings.clip_gradient
        if most:
            square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
            factor = jnp.minimum(1.0, most / (jnp.sqrt(square) + 1e-6))
            gradient = jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradient)
        return gradient

    def _moved(self, gradient: Any, optimizer: Any, params: Any, rate: Any) -> tuple[Any, Any]:
        """The parameters after a step of the optimiser, and its state."""
        jax, settings = self.jax, self.settings
        if self.make is not None:
            updates, optimizer = self.make(rate).update(gradient, optimizer, params)
            return jax.tree.map(lambda w, u: (w + u).astype(w.dtype), params, updates), optimizer
        if settings.weight_decay:
            gradient = jax.tree.map(lambda g, w: g + settings.weight_decay * w, gradient, params)
        if settings.momentum:
            optimizer = jax.tree.map(lambda v, g: settings.momentum * v + g, optimizer, gradient)
            gradient = optimizer
        moved = jax.tree.map(lambda w, g: (w - rate * g).astype(w.dtype), params, gradient)
        return moved, optimizer


def cross_entropy(outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Softmax cross-entropy; classes are the last axis, negative labels do not count."""
    jax = needed("jax", EXTRA, WHO)
    jnp = jax.numpy
    shares = jax.nn.log_softmax(outputs.astype(jnp.float32))
    if jnp.issubdtype(targets.dtype, jnp.floating):
        return -(targets * shares).sum(-1), jnp.ones(())
    known = targets >= 0
    place = jnp.where(known, targets, 0)[..., None]
    return -jnp.take_along_axis(shares, place, -1)[..., 0], known.astype(jnp.float32)


def binary_cross_entropy(outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Logistic loss of logits; as many targets, 0 or 1, as outputs."""
    jax = needed("jax", EXTRA, WHO)
    jnp = jax.numpy
    logits = outputs.astype(jnp.float32)
    wanted = targets.reshape(logits.shape)
    return jax.nn.softplus(logits) - wanted * logits, jnp.ones(())


def squared_error(outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Squared error; as many targets as outputs."""
    jnp = needed("jax", EXTRA, WHO).numpy
    return jnp.square(outputs.astype(jnp.float32) - targets.reshape(outputs.shape)), jnp.ones(())


LOSSES = {
    "cross-entropy": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
    "mse": squared_error,
}


def own_loss(loss: Callable[[Any, Any], Any]) -> Any:
    """A user's loss of outputs and targets: the mean of a batch, or a number for each example."""

    def given(outputs: Any, targets: Any) -> tuple[Any, Any]:
        jnp = needed("jax", EXTRA, WHO).numpy
        value = jnp.asarray(loss(outputs, targets))
        if value.ndim > 1:
            raise ConfigError(
                f"the loss function returned the shape {value.shape} for a batch; return one "
                "number, the mean over the batch, or one for each example"
            )
        return value, jnp.ones(())

    return given
