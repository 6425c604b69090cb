"""The gradients of one layer for each example of a batch, without forming more than needed.

For each kind of layer: the squared norms of the examples' gradients, and their weighted sum,
from the layer's input and the gradient of its output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""Layers that are understood; others are left to `umbel.privacy.bounds.formed`."""

FOLDED = (nn.Linear, nn.LayerNorm, nn.Embedding)
"""Those to which any axes between the example and the features are positions."""

_CHUNK = 64
"""Examples of a convolution at a time: what their windows saw then stays in the cache."""


_ROUNDING = 2.0**-20
"""Of a product of two rows, relative to their lengths: sixteen float32 units in the last place."""

Places = Mapping[Tensor, Tensor]
"""Parameters to where their gradients belong, shape (n, size), zero before."""


class LayerGradients(Protocol):
    """One layer's per-example gradients."""

    def squares(self) -> Tensor:
        """Squared norms over the layer's parameters, shape (n,)."""
        ...

    def weighted(self, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and the sum over examples of scale (n,) times its gradient."""
        ...

    def form(self, places: Places) -> None:
        """Write each example's gradient into its row, for the parameters that have a place."""
        ...


@dataclass
class Formed:
    """Gradients that are small enough to be formed: shape (n, size) for each parameter."""

    each: list[tuple[Tensor, Tensor]]

    def squares(self) -> Tensor:
        return torch.stack([_squares(g) for _, g in self.each]).sum(0)

    def weighted(self, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return ((parameter, scale @ g) for parameter, g in self.each)

    def form(self, places: Places) -> None:
        for parameter, gradient in self.each:
            if parameter in places:
                places[parameter].copy_(gradient)


@dataclass
class Factored:
    """Gradients that stay products: given (n, T, I) and back (n, T, O) of a linear map."""

    layer: nn.Linear
    given: Tensor
    back: Tensor

    def squares(self) -> Tensor:
        total = torch.zeros(len(self.back), device=self.back.device)
        single = self.given.shape[1] == 1
        if self.layer.weight.requires_grad and single:
            total += _squares(self.given) * _squares(self.back)
        elif self.layer.weight.requires_grad:
            total += _inner(self.given @ self.given.mT, self.back @ self.back.mT)
        if _trains_bias(self.layer):
            total += _squares(self.back if single else self.back.sum(1))
        return total

    def weighted(self, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        back = (self.back * scale[:, None, None]).flatten(0, 1)
        if self.layer.weight.requires_grad:
            yield self.layer.weight, back.T @ self.given.flatten(0, 1)
        if _trains_bias(self.layer):
            yield self.layer.bias, back.sum(0)

    def form(self, places: Places) -> None:
        if self.layer.weight in places:
            place = places[self.layer.weight].view(-1, *self.layer.weight.shape)
            if self.given.shape[1] == 1:
                torch.mul(self.back.mT, self.given, out=place)
            else:
                torch.bmm(self.back.mT, self.given, out=place)
        if self.layer.bias in places:
            torch.sum(self.back, 1, out=places[self.layer.bias])


@dataclass
class EmbeddingGradients:
    """Gradients of an embedding: given (n, T) indices and back (n, T, E)."""

    layer: nn.Embedding
    given: Tensor
    back: Tensor

    def squares(self) -> Tensor:
        same = (self.given[:, :, None] == self.given[:, None, :]).to(self.back.dtype)
        return _inner(same, self.back @ self.back.mT)

    def weighted(self, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        total = torch.zeros_like(self.layer.weight, dtype=self.back.dtype)
        back = (self.back * scale[:, None, None]).flatten(0, 1)
        yield self.layer.weight, total.index_add_(0, self.given.flatten(), back)

    def form(self, places: Places) -> None:
        if self.layer.weight in places:
            place = places[self.layer.weight].view(-1, *self.layer.weight.shape)
            place.scatter_add_(1, self.given[:, :, None].expand_as(self.back), self.back)


def gradients_of(layer: nn.Module, given: Tensor, back: Tensor) -> LayerGradients:
    """The gradients of one call of a layer.

    Args:
        layer: of one of `KINDS`.
        given: its input, first axis the example.
        back: the gradient of the sum of the examples' losses with respect to its output.

    Raises:
        ValueError: the layer is of another kind.
    """
    match layer:
        case nn.Linear():
            return _linear(layer, given, back)
        case nn.Conv2d():
            return _convolution(layer, given, back)
        case nn.Conv1d():
            return _convolution(layer, given[:, :, None], back[:, :, None])
        case nn.GroupNorm() | nn.LayerNorm():
            return _norm(layer, given, back)
        case nn.Embedding():
            used = back
            if layer.padding_idx is not None:
                used = back * (given != layer.padding_idx)[..., None]
            return EmbeddingGradients(
                layer, given.flatten(1), used.reshape(len(given), -1, back.shape[-1])
            )
    raise ValueError(f"there is no rule for the gradients of a {type(layer).__name__}")


def _linear(layer: nn.Linear, given: Tensor, back: Tensor) -> LayerGradients:
    given = given.reshape(len(given), -1, given.shape[-1])
    back = back.reshape(len(back), -1, back.shape[-1])
    positions, size = given.shape[1], layer.weight.numel()
    # Two position-by-position products, or one gradient: whichever is smaller.
    if positions == 1 or 2 * positions**2 <= size:
        return Factored(layer, given, back)
    return _formed(layer, back.mT @ given, back.sum(1))


def _convolution(layer: nn.Conv2d | nn.Conv1d, given: Tensor, back: Tensor) -> LayerGradients:
    """The gradient of a convolution for one example is a product over its output's places."""
    count, groups = len(given), layer.groups
    back = back.reshape(count, groups, back.shape[1] // groups, -1)
    weight = None
    if layer.weight.requires_grad:
        weight = torch.empty(count, *layer.weight.shape, device=back.device, dtype=back.dtype)
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            seen = _columns(layer, given[part])
            seen = seen.view(len(seen), groups, -1, seen.shape[2])
            torch.matmul(back[part], seen.mT, out=weight[part].view(*back[part].shape[:3], -1))
    bias = back.sum(3).flatten(1) if _trains_bias(layer) else None
    return _formed(layer, weight, bias)


def _columns(layer: nn.Conv2d | nn.Conv1d, given: Tensor) -> Tensor:
    """What every place of the output saw: shape (n, channels x window, places)."""
    flat = isinstance(layer, nn.Conv1d)
    window, step, gap = (
        [1, *value] if flat else list(value)
        for value in (layer.kernel_size, layer.stride, layer.dilation)
    )
    edges = list(layer._reversed_padding_repeated_twice) + ([0, 0] if flat else [])
    if any(edges):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        given = functional.pad(given, edges, mode=mode)
    n, channels, height, width = given.shape
    rows = (height - gap[0] * (window[0] - 1) - 1) // step[0] + 1
    columns = (width - gap[1] * (window[1] - 1) - 1) // step[1] + 1
    a, b, c, d = given.stride()
    view = given.as_strided(
        (n, channels, window[0], window[1], rows, columns),
        (a, b, c * gap[0], d * gap[1], c * step[0], d * step[1]),
    )
    return view.reshape(n, channels * window[0] * window[1], rows * columns)


def _norm(layer: nn.GroupNorm | nn.LayerNorm, given: Tensor, back: Tensor) -> LayerGradients:
    """Scale and shift of a normalisation: sums over all places but the parameters' own."""
    if isinstance(layer, nn.GroupNorm):
        plain = functional.group_norm(given, layer.num_groups, eps=layer.eps)
        over = tuple(range(2, given.ndim))
    else:
        plain = functional.layer_norm(given, layer.normalized_shape, eps=layer.eps)
        over = tuple(range(1, given.ndim - len(layer.normalized_shape)))
    weight, bias = plain * back, back
    return _formed(layer, weight.sum(over) if over else weight, bias.sum(over) if over else bias)


def _formed(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Formed:
    pairs = ((layer.weight, weight), (layer.bias, bias))
    return Formed(
        [
            (parameter, value.flatten(1))
            for parameter, value in pairs
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and value is not None
        ]
    )


def _trains_bias(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> bool:
    return layer.bias is not None and layer.bias.requires_grad


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Squared norms <left, right> of sums over T positions, from two Gram matrices (n, T, T).

    Positions may cancel each other, and then what rounding leaves is larger than the norm. It is
    added, so that a norm is never taken for a smaller one.
    """
    lengths = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
    return (left * right).sum((1, 2)).clamp_min_(0) + _ROUNDING * lengths.square()


def _squares(values: Tensor) -> Tensor:
    """Squared norms of the rows of a tensor of shape (n, ...)."""
    flat = values.flatten(1)
    return torch.einsum("ni,ni->n", flat, flat)
