"""Batches as modules take them, and what per-example clipping makes of one.

A batch of inputs is a tensor, or a list, tuple or mapping of tensors that are a module's
arguments; the first axis of each is the example.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[[Any, Any], Tensor]
"""Outputs and targets of a batch to the loss of each example, shape (n,) or (n, ...)."""

Names = Mapping[Tensor, str]
"""A module's trained parameters, in its own order, with their names."""

NARROW = (torch.float16, torch.bfloat16)
"""Types in which neither a norm nor a sum of many gradients can be taken."""


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped gradients of a batch.

    Attributes:
        gradients: by parameter name; the sum over examples, each scaled to the norm at most;
            float32 where the parameter is of a narrower type.
        norms: shape (n,), of each example's gradient before clipping; private.
        loss: mean over the batch; private.
        dropped: examples whose gradient was not finite; they count as zero.
    """

    gradients: dict[str, Tensor]
    norms: Tensor
    loss: float
    dropped: int = 0


def trained(module: nn.Module) -> dict[Tensor, str]:
    """The parameters that require a gradient; one that is used in two places appears once."""
    return {p: name for name, p in module.named_parameters() if p.requires_grad}


def call(module: nn.Module, inputs: Any) -> Any:
    """The module's outputs; a list of inputs are its arguments, a mapping its keywords."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, list) else module(inputs)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a batch, or in what a module returned."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def count_of(inputs: Any) -> int:
    """How many examples a batch has.

    Raises:
        ValueError: its tensors do not agree, or there is none.
    """
    counts = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors_of(inputs)}
    if len(counts) != 1 or -1 in counts:
        raise ValueError(
            f"the tensors of a batch have {sorted(counts)} examples; the first axis of each input "
            "must be the example, so that they agree"
        )
    return counts.pop()


def rows_of(batch: Any, rows: Any) -> Any:
    """Some examples of a batch, by a slice or by indices."""
    return mapped(batch, lambda tensor: tensor[rows])


def one_each(losses: Tensor, count: int) -> Tensor:
    """The mean loss of each example, shape (count,).

    Raises:
        ValueError: the losses cannot be dealt to the examples.
    """
    if losses.numel() % count or losses.numel() == 0:
        raise ValueError(
            f"{count} examples have losses of shape {tuple(losses.shape)}; the model's outputs "
            "need the example as their first axis"
        )
    return losses if losses.shape == (count,) else losses.reshape(count, -1).mean(1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of this type are measured and added up."""
    return torch.float32 if dtype in NARROW else dtype


def widened(value: Tensor) -> Tensor:
    """In the wider type; whole numbers as they are."""
    return value.to(wide(value.dtype))


def zeros(names: Names) -> dict[str, Tensor]:
    """A sum of no gradients."""
    return {name: torch.zeros_like(p, dtype=wide(p.dtype)) for p, name in names.items()}
