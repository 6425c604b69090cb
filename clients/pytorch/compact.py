"""Models that are trained small: sparse or rounded in every forward pass, during the rounds.

    TorchTrainer(compact(Net, sparsity=0.8, bits=8))

Nodes train, send and average ordinary weights, so every engine and every stack takes them. What the
model computes with are the largest of them (sparsity) on a grid of few values (bits), and gradients
pass through both as if they were not there (straight-through estimator, Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). A weight that is out can therefore come back. At the end
`umbel export` writes the weights that the model computes with.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from umbel.clients.pytorch.module import Model, takes_options
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Largest(nn.Module):
    """The largest weights of a layer; the others count as zero.

    Args:
        sparsity: share of the weights that are out.
    """

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = sparsity

    def forward(self, weight: Tensor) -> Tensor:
        sizes = weight.detach().abs().flatten()
        out = round(self.sparsity * sizes.numel())
        if out == 0:
            return weight
        least = sizes.sort().values[out - 1]
        kept = weight.detach() * (weight.detach().abs() > least)
        return weight + (kept - weight.detach())


class OnGrid(nn.Module):
    """Weights on 2^bits - 1 evenly spaced values, symmetric to zero, one spacing a unit.

    Args:
        bits: of a weight.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        fixed = weight.detach()
        step = fixed.abs().flatten(1).amax(1).clamp_min(1e-12) / self.levels
        step = step.reshape(-1, *[1] * (weight.ndim - 1))
        moved: Tensor = (fixed / step).round() * step - fixed
        return weight + moved


def compact(
    model: Model, *, sparsity: float = 0.0, bits: int = 0
) -> Callable[[Options], nn.Module]:
    """A model function whose linear and convolutional layers compute sparse, rounded, or both.

    Args:
        model: a module class, or a function that returns a module; see `TorchTrainer`.
        sparsity: share of each layer's weights that count as zero, from 0 to below 1.
        bits: of each weight, from 2 to 8; 0 leaves them as they are.

    Raises:
        ConfigError: a number is out of its range, or the model has no such layer (when it is
            built).
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is {sparsity:g}; give a share from 0 to below 1")
    if bits != 0 and not 2 <= bits <= 8:
        raise ConfigError(f"bits is {bits}; give 2 to 8, or 0 for weights as they are")

    def build(options: Options) -> nn.Module:
        module = model(options) if takes_options(model) else model()
        layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
        if not layers:
            raise ConfigError(
                "compact was given a model without linear or convolutional layers, so nothing of "
                "it would be small; leave compact out"
            )
        for layer in layers:
            if sparsity:
                parametrize.register_parametrization(layer, "weight", Largest(sparsity))
            if bits:
                parametrize.register_parametrization(layer, "weight", OnGrid(bits))
        return module

    return build


def settled(module: nn.Module) -> nn.Module:
    """The same module, its weights those that it computes with; it is changed in place.

    Copies of a module share the class that torch makes for parametrised layers, and torch's own
    removal takes the weight out of that class, and so from all copies. Here each layer goes back
    to its first class by itself.
    """
    for layer in list(module.modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        parts: Any = layer.parametrizations
        if set(parts) != {"weight"}:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            continue
        computed: Any = layer.weight
        weight = computed.detach().clone()
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        layer.weight = nn.Parameter(weight)
    return module
