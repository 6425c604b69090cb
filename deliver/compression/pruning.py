"""Fewer weights, fewer units, or matrices of lower rank: what can be taken out of a module.

    zeros      the smallest weights of all layers together become zero, and stay so in training
    units      the weakest hidden units go, with their rows here and their columns in the next layer
    low rank   a matrix becomes the product of two thinner ones (truncated SVD)

Each gives a new module; the one that was given stays as it is.
"""

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from umbel.clients.trainers.exported import TakenOutput
from umbel.core.errors import ConfigError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_KEEPS_UNITS = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_KEEPS_UNITS_CALLED = (torch.relu, torch.tanh, torch.sigmoid, functional.relu, functional.gelu)


class Zeros(nn.Module):
    """Keeps weights at zero through training: the parametrisation w * mask."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def with_zeros(module: nn.Module, share: float) -> nn.Module:
    """The module with the smallest weights of all layers together at zero, for good.

    Args:
        module: stays as it is.
        share: of the weights, above 0 and below 1.

    Raises:
        ConfigError: there is no layer to prune.
    """
    made = copy.deepcopy(module)
    found = list(_layers(made))
    if not found:
        raise ConfigError("the model has no linear or convolutional layer whose weights could go")
    weights = [(layer, "weight") for layer in found]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=share)
    for layer in found:
        mask: Any = layer.weight_mask
        mask = mask.detach().clone()
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]  # torch has no types for it
        parametrize.register_parametrization(layer, "weight", Zeros(mask))
    return made


def with_low_rank(module: nn.Module, share: float) -> nn.Module:
    """The module with matrices of a share of their rank, where that has fewer numbers.

    The last layer stays whole: with few outputs, its rank is how many of them can differ.

    Args:
        module: stays as it is.
        share: of the largest rank a matrix can have, above 0 and below 1.

    Raises:
        ConfigError: no layer gets smaller by it.
    """
    made = copy.deepcopy(module)
    changed, last = 0, list(_layers(made))[-1:]
    for parent in list(made.modules()):
        for name, layer in list(parent.named_children()):
            if layer in last:  # of a few classes, which a lower rank could not tell apart
                continue
            thin = _thinner(layer, share)
            if thin is not None:
                setattr(parent, name, thin)
                changed += 1
    if not changed:
        raise ConfigError(
            f"no layer of the model gets smaller with {share:g} of its rank; lower --low-rank"
        )
    return made


def _thinner(layer: nn.Module, share: float) -> nn.Module | None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return None
    matrix = layer.weight.detach().flatten(1).double()
    rank = max(1, round(share * min(matrix.shape)))
    if rank * sum(matrix.shape) >= matrix.numel():
        return None
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    outer, inner = left[:, :rank] * root, root[:, None] * right[:rank]
    first: nn.Linear | nn.Conv2d
    second: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
        shape = outer.shape
    else:
        like: dict[str, Any] = {n: getattr(layer, n) for n in ("stride", "padding", "dilation")}
        size: Any = layer.kernel_size
        first = nn.Conv2d(layer.in_channels, rank, size, **like, bias=False)
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
        shape = torch.Size([*outer.shape, 1, 1])
    with torch.no_grad():
        first.weight.copy_(inner.view(first.weight.shape).float())
        second.weight.copy_(outer.reshape(shape).float())
        if layer.bias is not None and second.bias is not None:
            second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def without_units(module: nn.Module, share: float) -> nn.Module:
    """The module without a share of the hidden units (channels) of each layer that allows it.

    A layer allows it where what it gives goes, through functions of single units alone, into one
    other layer. Those with the smallest product of the norms of their weights here and in the
    next layer go.

    Args:
        module: stays as it is.
        share: of the units, above 0 and below 1.

    Raises:
        ConfigError: no layer allows it.
    """
    made = copy.deepcopy(module)
    traced = made.module if isinstance(made, TakenOutput) else made
    try:
        graph = fx.symbolic_trace(traced).graph
    except Exception as error:
        raise ConfigError(
            f"units cannot be removed from this model: its steps depend on its inputs "
            f"({type(error).__name__}); use --prune or --low-rank"
        ) from error
    layers = dict(traced.named_modules())
    pairs = [pair for node in graph.nodes if (pair := _pair(node, layers)) is not None]
    if not pairs:
        raise ConfigError(
            "no layer of the model passes its units on to one other layer alone, so none can go; "
            "use --prune or --low-rank"
        )
    for first, second, norms in pairs:
        _shrink(first, second, norms, share)
    return made


def _layers(module: nn.Module) -> Iterator[Layer]:
    for layer in module.modules():
        if isinstance(layer, LAYERS):
            yield layer


def _pair(
    node: fx.Node, layers: dict[str, nn.Module]
) -> tuple[Layer, Layer, list[nn.Module]] | None:
    """A layer, the one layer that takes what it gives, and the normalisations between them."""
    first = layers.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(first, LAYERS) or _groups(first) != 1:
        return None
    norms: list[nn.Module] = []
    here = node
    while len(here.users) == 1:
        here = next(iter(here.users))
        part = layers.get(str(here.target)) if here.op == "call_module" else None
        if isinstance(part, LAYERS):
            fits = _groups(part) == 1 and _inputs(part) % _outputs(first) == 0
            return (first, part, norms) if fits else None
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            norms.append(part)
        elif not (_keeps_units(part) or _keeps_units_called(here)):
            return None
    return None


def _keeps_units(part: nn.Module | None) -> bool:
    if isinstance(part, nn.Flatten):
        return part.start_dim == 1 and part.end_dim == -1
    return isinstance(part, _KEEPS_UNITS)


def _keeps_units_called(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _KEEPS_UNITS_CALLED or (
            node.target is torch.flatten and node.args[1:] == (1,)
        )
    return node.op == "call_method" and (
        node.target == "relu" or (node.target == "flatten" and node.args[1:] == (1,))
    )


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _inputs(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _shrink(first: Layer, second: Layer, norms: list[nn.Module], share: float) -> None:
    units = _outputs(first)
    each = _inputs(second) // units  # positions of one channel, behind a flatten
    here = first.weight.detach().flatten(1).norm(dim=1)
    there = second.weight.detach().transpose(0, 1).reshape(units, -1).norm(dim=1)
    kept = (here * there).topk(max(1, units - round(share * units))).indices.sort().values
    columns = (kept[:, None] * each + torch.arange(each)).flatten()
    _keep(first, "weight", kept)
    if first.bias is not None:
        _keep(first, "bias", kept)
    second.weight = nn.Parameter(second.weight.detach()[:, columns].clone())
    for norm in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, name, None) is not None:
                _keep(norm, name, kept)
        norm.num_features = len(kept)  # type: ignore[assignment]  # a module of any kind of normalisation
    sizes: list[tuple[Any, str, int]] = [
        (first, "out_features" if isinstance(first, nn.Linear) else "out_channels", len(kept)),
        (second, "in_features" if isinstance(second, nn.Linear) else "in_channels", len(columns)),
    ]
    for layer, name, size in sizes:
        setattr(layer, name, operator.index(size))


def _keep(module: nn.Module, name: str, rows: Tensor) -> None:
    value = getattr(module, name)
    kept = value.detach()[rows].clone()
    setattr(module, name, nn.Parameter(kept) if isinstance(value, nn.Parameter) else kept)
