"""Per-example clipping from whole gradients: slower than ghost norms, for every module.

    Vectorised   all gradients of a piece of the batch at once   (`torch.func.vmap`)
    OneByOne     a forward and a backward pass for each example, which is the definition itself

In both an example never meets another one inside the module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from umbel.privacy.bounds.examples import (
    ClippedSum,
    Losses,
    Names,
    call,
    count_of,
    one_each,
    rows_of,
    widened,
    zeros,
)

_ROOM = 1 << 25
"""Numbers of whole gradients that are held at a time."""

Rows = dict[str, Tensor]
"""By parameter name, its gradient for each example of a piece: shape (n, ...)."""


@dataclass(frozen=True)
class _Formed:
    """Clipping and adding up of whole gradients, however they are formed.

    Attributes:
        module: whose gradients.
        names: its trained parameters.
    """

    module: nn.Module
    names: Names

    def pieces(self, inputs: Any, targets: Any, losses: Losses) -> Iterator[tuple[Rows, Tensor]]:
        """The gradients and losses of the examples, a piece of the batch at a time."""
        raise NotImplementedError

    def clipped_sum(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum:
        """See `umbel.privacy.bounds.ghost.PerExample.clipped_sum`."""
        sums, norms, values = zeros(self.names), [], []
        for rows, loss in self.pieces(inputs, targets, losses):
            flat = torch.cat([row.reshape(len(loss), -1) for row in rows.values()], 1)
            length = flat.norm(dim=1)
            finite = torch.isfinite(length)
            scale = (norm / length.clamp_min(norm))[finite]
            for name, row in rows.items():
                sums[name] += torch.einsum("n,n...->...", scale, row[finite])
            norms.append(length)
            values.append(loss.detach())
        length, loss = torch.cat(norms), torch.cat(values)
        finite = torch.isfinite(length)
        mean = float(loss[finite].mean()) if bool(finite.any()) else 0.0
        return ClippedSum(sums, length, mean, int((~finite).sum()))

    def each(self, inputs: Any, targets: Any, losses: Losses) -> Tensor:
        """See `umbel.privacy.bounds.ghost.PerExample.each`."""
        found = [
            torch.cat([rows[name].reshape(len(loss), -1) for name in self.names.values()], 1)
            for rows, loss in self.pieces(inputs, targets, losses)
        ]
        return torch.cat(found)


@dataclass(frozen=True)
class Vectorised(_Formed):
    """Gradients by `torch.func.vmap`."""

    def pieces(self, inputs: Any, targets: Any, losses: Losses) -> Iterator[tuple[Rows, Tensor]]:
        parameters = {name: p.detach() for p, name in self.names.items()}

        def loss(own: dict[str, Tensor], example: Any, target: Any) -> tuple[Tensor, Tensor]:
            with _in_place(self.module, self.names, own):
                output = call(self.module, rows_of(example, None))
            value = one_each(losses(output, rows_of(target, None)), 1)[0]
            return value, value

        each = vmap(grad(loss, has_aux=True), (None, 0, 0), randomness="different")
        size = max(1, _ROOM // max(1, sum(p.numel() for p in self.names)))
        for start in range(0, count_of(inputs), size):
            part = slice(start, start + size)
            rows, values = each(parameters, rows_of(inputs, part), rows_of(targets, part))
            yield {name: widened(row) for name, row in rows.items()}, values


@dataclass(frozen=True)
class OneByOne(_Formed):
    """Gradients of batches of one example."""

    def pieces(self, inputs: Any, targets: Any, losses: Losses) -> Iterator[tuple[Rows, Tensor]]:
        parameters = list(self.names)
        for at in range(count_of(inputs)):
            part = slice(at, at + 1)
            with torch.enable_grad():
                output = call(self.module, rows_of(inputs, part))
                loss = one_each(losses(output, rows_of(targets, part)), 1)
                found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
            yield (
                {
                    name: widened(_dense(gradient, parameter))[None]
                    for (parameter, name), gradient in zip(self.names.items(), found, strict=True)
                },
                loss.detach(),
            )


@contextmanager
def _in_place(module: nn.Module, names: Names, values: Mapping[str, Tensor]) -> Iterator[None]:
    """`values` in place of the parameters, wherever each is used.

    `torch.func.functional_call` leaves other tensors behind in a module that holds one layer at
    two places (PyTorch 2.13).
    """
    before = [
        (layer, key, parameter)
        for layer in module.modules()
        for key, parameter in layer._parameters.items()
        if parameter is not None
    ]
    try:
        for layer, key, parameter in before:
            value = values[names[parameter]] if parameter in names else parameter.detach()
            layer._parameters[key] = value  # type: ignore[assignment]  # a call asks no more of it
        yield
    finally:
        for layer, key, parameter in before:
            layer._parameters[key] = parameter


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient
