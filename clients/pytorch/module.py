"""One module per process: built once, filled with each node's weights in turn.

What of a module's state is what:

    parameters   require a gradient; trained, averaged, sent
    buffers      the rest of `state_dict`: running statistics, counters, and frozen parameters.
                 A small head on a frozen backbone therefore travels small; frozen values come
                 from the model function itself, on every node alike.

Values that no message carries (frozen parameters, first running statistics, buffers that are
not part of `state_dict`) are those of a model built under the fixed seed `BUILD_SEED`, so they
agree in every process.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from umbel.clients.pytorch.batches import real_type
from umbel.clients.pytorch.rows import names_of
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Options, Tree, Weights
from umbel.core.errors import ConfigError
from umbel.core.records import same_bits

BUILD_SEED = 0

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Model = Callable[..., nn.Module]
"""`Net`, or a function of the run's options, that returns a module."""


def takes_options(model: Model) -> bool:
    """Whether the model is built from the run's options: it needs an argument, or names it so."""
    try:
        parameters = inspect.signature(model).parameters.values()
    except ValueError:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(
        p.name == "options" or (p.default is p.empty and p.kind in positional) for p in parameters
    )


def build(model: Model, options: Options, seed: int) -> nn.Module:
    """A new module whose first weights depend on nothing but the options and the seed.

    Raises:
        ConfigError: the model function does not return a module with weights of known shape.
    """
    with seeded(seed):
        module = model(options) if takes_options(model) else model()
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"the model is a {type(module).__name__}; give TorchTrainer a class or a function "
            "that returns a torch.nn.Module"
        )
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        raise ConfigError(
            "the model has lazy layers whose shapes are not known yet; give their input sizes"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError("the model has no trainable parameter; leave requires_grad on some")
    return module


def split(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Trained parameters, and everything else of `state_dict`; tied tensors appear once."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    seen = {id(p) for p in parameters.values()}
    buffers: dict[str, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            buffers[name] = value
    return parameters, buffers


def smallest_batch(module: nn.Module) -> int:
    """Batch norm cannot be trained on a batch of one."""
    return 2 if any(isinstance(m, BATCH_NORM) for m in module.modules()) else 1


def to_cpu(tensor: Tensor) -> Tensor:
    """A CPU copy that shares nothing with the module."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@dataclass
class ModuleState:
    """A built module and handles on its state.

    Attributes:
        parameters: trained, by name.
        buffers: carried along, by name; frozen parameters among them.
        built: what buffers hold in a freshly built module, where that could change.
        least: the smallest batch it can be trained on.
        hidden: buffers outside of `state_dict`, each with its first value.
        frozen: the frozen values that were last filled in, to know them again.
        unbatchable: why the model cannot be trained with others at once, once that turned out.
        checked: whether that was looked into.
        names: of the arguments of `forward`; None if it takes any by name.
        integers: whether integer inputs are looked up ("index") or computed with ("real");
            None until that was seen.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    built: dict[str, Tensor]
    least: int
    hidden: list[tuple[Tensor, Tensor]]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    unbatchable: str = ""
    checked: bool = False
    names: tuple[str, ...] | None = None
    integers: str | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleState":
        parameters, buffers = split(module)
        state = {id(value) for value in buffers.values()}
        return cls(
            module=module,
            parameters=parameters,
            buffers=buffers,
            built={
                name: value.detach().clone()
                for name, value in buffers.items()
                if not isinstance(value, nn.Parameter)
            },
            least=smallest_batch(module),
            hidden=[(b, b.clone()) for b in module.buffers() if id(b) not in state],
            names=names_of(module),
        )

    @property
    def real(self) -> torch.dtype:
        """The floating type that the model computes in."""
        return real_type(next(iter(self.parameters.values())).dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def load(self, weights: Weights) -> None:
        """Fill the module; buffers that `weights` lacks get the values of a fresh module.

        Raises:
            ConfigError: the weights are not those of this model.
        """
        _same_names(weights.parameters, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                _fill(parameter, weights.parameters[name], name)
                parameter.grad = None
            for name, buffer in self.buffers.items():
                self._load_buffer(name, buffer, weights.buffers.get(name))
            for buffer, first in self.hidden:
                buffer.copy_(first)

    def _load_buffer(self, name: str, buffer: Tensor, given: Tensor | None) -> None:
        if given is None:
            given = self.built.get(name)
        elif isinstance(buffer, nn.Parameter):
            if given is self.frozen.get(name):
                return
            self.frozen[name] = given
            if name not in self.built:
                if same_bits(buffer, given):
                    return
                self.built[name] = buffer.detach().clone()
        if given is not None:
            _fill(buffer, given, name)
        if given is not self.frozen.get(name):
            self.frozen.pop(name, None)

    @contextmanager
    def training_only(self, names: Sequence[str]) -> Iterator[None]:
        """Leaves the other parameters without gradients, as long as it is open."""
        kept = set(names)
        others = [p for name, p in self.parameters.items() if name not in kept]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def touched(self, given: Weights) -> bool:
        """Whether training changed a buffer that `given` was loaded into."""
        state = [(self.buffers[n], given.buffers.get(n, first)) for n, first in self.built.items()]
        return any(not same_bits(b, first) for b, first in state + self.hidden)

    def weights(self, before: Weights) -> Weights:
        """The module's state as new CPU tensors; frozen values that were given are reused."""
        return Weights(
            {name: to_cpu(p) for name, p in self.parameters.items()},
            {
                name: before.buffers[name]
                if isinstance(buffer, nn.Parameter) and name in before.buffers
                else to_cpu(buffer)
                for name, buffer in self.buffers.items()
            },
        )


def _same_names(given: Tree, own: dict[str, Any]) -> None:
    if given.keys() != own.keys():
        odd = sorted(given.keys() ^ own.keys())[0]
        raise ConfigError(
            f"the weights do not belong to this model: {odd} is in only one of them; train and "
            "initialise with the same model and options"
        )


def _fill(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ConfigError(
            f"the weights do not belong to this model: {name} has shape {tuple(value.shape)}, "
            f"the model's own has {tuple(target.shape)}; use the same model and options"
        )
    target.copy_(value)


@dataclass
class _Slot:
    key: Any = None
    piece: ModuleState | None = None


class ModuleCache:
    """Keeps the one module that this thread is working with; a copy starts empty."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.takes_options = takes_options(model)
        self._local = threading.local()

    def piece(self, options: Options, device: torch.device) -> ModuleState:
        """The module for these options on this device, built on first use."""
        key = (device, tuple(sorted(options.items())) if self.takes_options else ())
        slot = self._local.__dict__.setdefault("slot", _Slot())
        if slot.key != key:
            slot.piece = ModuleState.of(build(self.model, options, BUILD_SEED).to(device))
            slot.key = key
        return slot.piece  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[type["ModuleCache"], tuple[Model]]:
        return ModuleCache, (self.model,)
