"""Per-example clipping with ghost norms: what DP-SGD needs, at nearly the price of plain SGD.

    one forward pass      every layer's input is kept
    one backward pass     to the layers' outputs only: no gradient of a weight is computed
    norms                 of each example's gradient, from inputs and output gradients
    weighted sum          of the examples' gradients, from the same two

A linear layer's gradient for one example is the outer product of what came in and what came
back, so its norm is a product of two norms and is never formed (Goodfellow 2015; Li et al.
2022, section 4). Over T positions the norm is <A A^T, B B^T>, or the gradient is formed where
that is smaller (Bu et al. 2023, mixed ghost norms). Since the second step is a weighted sum of
the same factors, there is no second backward pass (Bu et al. 2023, book-keeping).

Modules of other kinds, and modules that are called twice, get their examples' gradients from
`torch.func.vmap`: slower, same result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from umbel.privacy.bounds.layer_gradients import KINDS, LayerGradients, gradients_of
from umbel.privacy.validate import positive

Losses = Callable[[Any, Any], Tensor]
"""Outputs and targets of a batch to the loss of each example, shape (n,) or (n, ...)."""

_MIXING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped gradients of a batch.

    Attributes:
        gradients: by parameter name; the sum over examples, each scaled to the norm at most.
        norms: shape (n,), of each example's gradient before clipping; private.
        loss: mean over the batch; private.
        dropped: examples whose gradient was not finite; they count as zero.
    """

    gradients: dict[str, Tensor]
    norms: Tensor
    loss: float
    dropped: int = 0


@dataclass
class _Call:
    """One call of a layer: what came in, and the place in the graph where it came out."""

    given: Tensor
    version: int
    edge: Any


@dataclass
class PerExample:
    """Sums of clipped per-example gradients of one module's trained parameters.

    Args:
        module: its first output axis is the example.

    Raises:
        ValueError: a layer mixes the examples of a batch, so that none has a gradient of its own.
    """

    module: nn.Module
    names: dict[Tensor, str] = field(init=False)
    ghost: bool = field(init=False)

    def __post_init__(self) -> None:
        for name, layer in self.module.named_modules():
            if isinstance(layer, _MIXING):
                raise ValueError(
                    f"{name or 'the model'} is a {type(layer).__name__}, which mixes the examples "
                    "of a batch, so no example's influence can be bounded; use nn.GroupNorm"
                )
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.names = {p: n for n, p in trained}
        owned = [p for layer in self._layers() for p in layer.parameters(recurse=False)]
        self.ghost = set(self.names) <= set(owned) and len(owned) == len(set(owned))

    def clipped_sum(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum:
        """The clipped gradients of a batch, added up.

        Guarantees: adding or removing one example changes the result by at most `norm`, up to
        rounding in float32 (a factor below 1 + 2**-18 for batches up to 2**14).

        Args:
            inputs: what the module takes, first axis the example.
            targets: what `losses` compares the outputs with, first axis the example.
            losses: outputs and targets to one loss an example; several values are averaged.
            norm: of one example's gradient, over all trained parameters together.

        Raises:
            ValueError: the norm is not positive.
        """
        positive(norm=norm)
        if len(inputs) == 0:
            return ClippedSum(self._zeros(), torch.zeros(0), 0.0)
        found = self._ghost(inputs, targets, losses, norm) if self.ghost else None
        if found is None:
            self.ghost = False
            found = self._vmap(inputs, targets, losses, norm)
        return found

    def each(self, inputs: Any, targets: Any, losses: Losses) -> Tensor:
        """Every example's whole gradient, where it is needed by itself.

        Args:
            inputs: as in `clipped_sum`, and so are targets and losses.

        Returns:
            Shape (n, trained parameters): flat, in the order of `names`.
        """
        went = self._there_and_back(inputs, targets, losses) if self.ghost else None
        if went is None:
            gradients, _ = self._whole(inputs, targets, losses)
            return torch.cat([gradients[n].flatten(1) for n in self.names.values()], 1)
        losses_of, parts = went
        sizes = [p.numel() for p in self.names]
        rows = torch.zeros(len(losses_of), sum(sizes), device=losses_of.device)
        ends = list(accumulate(sizes))
        places = {
            p: rows[:, end - size : end]
            for p, size, end in zip(self.names, sizes, ends, strict=True)
        }
        with torch.no_grad():
            for part in parts:
                part.form(places)
        return rows

    # ---- with ghost norms

    def _ghost(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum | None:
        went = self._there_and_back(inputs, targets, losses)
        if went is None:
            return None
        each, parts = went
        with torch.no_grad():
            squares = torch.zeros(len(each), device=each.device)
            for part in parts:
                squares += part.squares()
            norms = squares.sqrt()
            finite = torch.isfinite(norms)
            if not bool(finite.all()):
                # Once more without them: no weight of 0 makes a NaN vanish from a sum.
                rows = finite.nonzero()[:, 0]
                kept = self.clipped_sum(inputs[rows], targets[rows], losses, norm)
                gone = len(norms) - len(rows) + kept.dropped
                return ClippedSum(kept.gradients, norms, kept.loss, gone)
            scale = (norm / norms.clamp_min(norm)).to(norms.dtype)
            sums = self._zeros()
            for part in parts:
                for parameter, total in part.weighted(scale):
                    if parameter in self.names:
                        sums[self.names[parameter]] += total.view_as(parameter)
        return ClippedSum(sums, norms, float(each.mean()))

    def _there_and_back(
        self, inputs: Any, targets: Any, losses: Losses
    ) -> tuple[Tensor, list[LayerGradients]] | None:
        """Each example's loss and the layers' gradients; None if a layer was called twice."""
        calls: dict[nn.Module, list[_Call]] = {}
        with self._recording(calls), torch.enable_grad():
            each = _one_each(losses(self.module(inputs), targets))
            whole = each.sum()
        if any(len(seen) > 1 for seen in calls.values()):
            return None
        edges = [seen[0].edge for seen in calls.values()]
        back = torch.autograd.grad(whole, edges, allow_unused=True)
        with torch.no_grad():
            return each.detach(), self._parts(calls, back)

    def _parts(
        self, calls: dict[nn.Module, list[_Call]], back: tuple[Tensor | None, ...]
    ) -> list[LayerGradients]:
        parts = []
        for (layer, seen), came_back in zip(calls.items(), back, strict=True):
            if came_back is None:
                continue
            if seen[0].given._version != seen[0].version:
                raise ValueError(
                    f"the input of a {type(layer).__name__} was changed in place after it was "
                    "used, so its gradient is lost; use operations that are not in place"
                )
            parts.append(gradients_of(layer, seen[0].given, came_back))
        return parts

    def _layers(self) -> Iterator[nn.Module]:
        for layer in self.module.modules():
            trained = any(p.requires_grad for p in layer.parameters(recurse=False))
            if trained and isinstance(layer, KINDS):
                yield layer

    @contextmanager
    def _recording(self, calls: dict[nn.Module, list[_Call]]) -> Iterator[None]:
        def keep(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            edge = torch.autograd.graph.get_gradient_edge(out)
            value = given[0].detach()
            calls.setdefault(layer, []).append(_Call(value, value._version, edge))

        handles = [layer.register_forward_hook(keep) for layer in self._layers()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- without

    def _vmap(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum:
        """From every example's whole gradient."""
        each, values = self._whole(inputs, targets, losses)
        norms = torch.cat([g.reshape(len(values), -1) for g in each.values()], 1).norm(dim=1)
        finite = torch.isfinite(norms)
        scale = (norm / norms.clamp_min(norm))[finite]
        sums = {name: torch.einsum("n,n...->...", scale, g[finite]) for name, g in each.items()}
        mean = float(values[finite].mean()) if bool(finite.any()) else 0.0
        return ClippedSum(sums, norms, mean, int((~finite).sum()))

    def _whole(self, inputs: Any, targets: Any, losses: Losses) -> tuple[dict[str, Tensor], Tensor]:
        """Every example's whole gradient, by parameter, and its loss."""
        parameters = {name: p.detach() for p, name in self.names.items()}
        rest = {n: p.detach() for n, p in self.module.named_parameters() if n not in parameters}
        rest |= dict(self.module.named_buffers())

        def loss(own: dict[str, Tensor], example: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            output = functional_call(self.module, {**own, **rest}, (example[None],))
            value = losses(output, target[None]).mean()
            return value, value

        each, values = vmap(grad(loss, has_aux=True), (None, 0, 0), randomness="different")(
            parameters, inputs, targets
        )
        return each, values

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for p, name in self.names.items()}


def _one_each(losses: Tensor) -> Tensor:
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
