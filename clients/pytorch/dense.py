"""Stacks of dense layers, for many nodes at once: matrix products in place of `torch.func`.

Where a model is a `Sequential` of linear layers and functions of single elements, the models of
n nodes are one model with an axis more. Its gradients come from one ordinary backward pass over
the sum of the nodes' losses, because no node's loss depends on another node's parameters. That
is quicker than `vmap`, and spares the seconds that its first use takes to import.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel.clients.pytorch.losses import Objective
from umbel.clients.pytorch.module import ModuleState
from umbel.clients.trainers.base import Tree

_BY_ELEMENT = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Identity,
)

Layer = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """The layers of a model, each a function of stacked parameters and stacked inputs."""

    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, piece: ModuleState) -> "Dense | None":
        """The model's layers; None if it has others, or parameters that are frozen or shared."""
        names = {id(parameter): name for name, parameter in piece.parameters.items()}
        layers: list[Layer] = []
        if not _collect(piece.module, names, layers) or names:
            return None
        return cls(tuple(layers))

    def gradients(
        self, objective: Objective, parameters: Tree, x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tree, Tensor] | None:
        """Each node's gradients and mean loss.

        Args:
            objective: the loss; it must know the loss of each example.
            parameters: stacked, shape (nodes, ...).
            x: inputs, shape (nodes, rows, ...).
            y: targets, shape (nodes, rows, ...).
            mask: 1 where there is an example, shape (nodes, rows); None if everywhere.

        Returns:
            None where the loss of an example is not known.
        """
        if objective.each is None:
            return None
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        outputs = x
        for layer in self.layers:
            outputs = layer(leaves, outputs)
        each = objective.each(outputs.flatten(0, 1), y.flatten(0, 1))
        losses = _means(each.reshape(*x.shape[:2], *each.shape[1:]), y, mask)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True)), losses.detach()


def _collect(module: nn.Module, names: dict[int, str], layers: list[Layer]) -> bool:
    """Append a module's layers, and take its parameters out of `names`."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    kind = type(module)
    if kind is nn.Sequential:
        return all(_collect(child, names, layers) for child in module.children())
    if kind in _BY_ELEMENT:
        layers.append(lambda _, x: module(x))
        return True
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        layers.append(lambda _, x: x.flatten(2))
        return (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        own: list[Any] = [module.weight] + ([] if module.bias is None else [module.bias])
        if any(id(parameter) not in names for parameter in own):
            return False
        layers.append(_linear(*[names.pop(id(parameter)) for parameter in own]))
        return True
    return False


def _linear(weight: str, bias: str | None = None) -> Layer:
    def layer(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)  # (nodes, rows, in)
        turned = parameters[weight].transpose(1, 2)
        if bias is None:
            product = torch.bmm(rows, turned)
        else:
            product = torch.baddbmm(parameters[bias].unsqueeze(1), rows, turned)
        return product.reshape(*x.shape[:-1], product.shape[-1])

    return layer


def _means(each: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Each node's mean loss, shape (nodes,), over the elements that count."""
    weight = None
    if mask is not None:
        weight = mask.reshape(*mask.shape, *(1,) * (each.ndim - 2)).expand(each.shape)
    if not y.is_floating_point():  # positions that cross-entropy leaves out of its mean
        known = (y != -100).to(each.dtype)
        weight = known if weight is None else weight * known
    if weight is None:
        return each.flatten(1).mean(1)
    return (each * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
