"""Ghost norms: the clipped sum from the layers' inputs and output gradients.

    one forward pass      every layer's input is kept
    one backward pass     to the layers' outputs only: no gradient of a weight is computed
    norms                 of each example's gradient, from inputs and output gradients
    weighted sum          of the examples' gradients, from the same two

A linear layer's gradient for one example is the outer product of what came in and what came
back, so its norm is a product of two norms and is never formed (Goodfellow 2015; Li et al.
2022, section 4). Over T positions the norm is <A A^T, B B^T>, or the gradient is formed where
that is smaller (Bu et al. 2023, mixed ghost norms). Since the second step is a weighted sum of
the same factors, there is no second backward pass (Bu et al. 2023, book-keeping).

That is right only for a weight that is used by calling its layer, once, on a tensor whose first
axis is the example. `umbel.privacy.bounds.self_check` finds out whether it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from umbel.privacy.bounds.examples import (
    ClippedSum,
    Losses,
    Names,
    call,
    count_of,
    one_each,
    rows_of,
    wide,
    widened,
    zeros,
)
from umbel.privacy.bounds.layer_gradients import FOLDED, KINDS, LayerGradients, gradients_of


class UnfitError(ValueError):
    """This module's gradients do not come out of its layers' inputs and outputs."""


@dataclass
class _Call:
    """One call of a layer: what came in, and the place in the graph where it came out."""

    given: Tensor
    version: int
    edge: Any


@dataclass(frozen=True)
class GhostNorms:
    """Clipping without forming gradients.

    Attributes:
        module: whose gradients.
        names: its trained parameters.
    """

    module: nn.Module
    names: Names

    @property
    def covers(self) -> bool:
        """Whether every trained parameter belongs to one layer of a kind that is understood."""
        owned = [p for layer in self._layers() for p in layer.parameters(recurse=False)]
        return set(self.names) <= set(owned) and len(owned) == len(set(owned))

    def clipped_sum(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum:
        """See `umbel.privacy.bounds.ghost.PerExample.clipped_sum`.

        Raises:
            UnfitError: a layer was not called once on the examples.
        """
        each, parts = self._there_and_back(inputs, targets, losses)
        with torch.no_grad():
            squares = torch.zeros(len(each), device=each.device, dtype=self._dtype)
            for part in parts:
                squares += part.squares()
            norms = squares.sqrt()
            finite = torch.isfinite(norms)
            if not bool(finite.all()):
                # Once more without them: no weight of 0 makes a NaN vanish from a sum.
                return self._without(inputs, targets, losses, norm, norms)
            scale = norm / norms.clamp_min(norm)
            sums = zeros(self.names)
            for part in parts:
                for parameter, total in part.weighted(scale):
                    if parameter in self.names:
                        sums[self.names[parameter]] += total.view_as(parameter)
        return ClippedSum(sums, norms, float(each.mean()))

    def each(self, inputs: Any, targets: Any, losses: Losses) -> Tensor:
        """See `umbel.privacy.bounds.ghost.PerExample.each`.

        Raises:
            UnfitError: as above.
        """
        values, parts = self._there_and_back(inputs, targets, losses)
        sizes = [p.numel() for p in self.names]
        rows = torch.zeros(len(values), sum(sizes), device=values.device, dtype=self._dtype)
        ends = list(accumulate(sizes))
        places = {
            p: rows[:, end - size : end]
            for p, size, end in zip(self.names, sizes, ends, strict=True)
        }
        with torch.no_grad():
            for part in parts:
                part.form(places)
        return rows

    @property
    def _dtype(self) -> torch.dtype:
        return wide(next(iter(self.names)).dtype)

    def _without(
        self, inputs: Any, targets: Any, losses: Losses, norm: float, norms: Tensor
    ) -> ClippedSum:
        rows = torch.isfinite(norms).nonzero()[:, 0]
        if len(rows) == 0:
            return ClippedSum(zeros(self.names), norms, 0.0, len(norms))
        kept = self.clipped_sum(rows_of(inputs, rows), rows_of(targets, rows), losses, norm)
        gone = len(norms) - len(rows) + kept.dropped
        return ClippedSum(kept.gradients, norms, kept.loss, gone)

    def _there_and_back(
        self, inputs: Any, targets: Any, losses: Losses
    ) -> tuple[Tensor, list[LayerGradients]]:
        """Each example's loss and the layers' gradients."""
        calls: dict[nn.Module, list[_Call]] = {}
        count = count_of(inputs)
        with self._recording(calls), torch.enable_grad():
            each = one_each(losses(call(self.module, inputs), targets), count)
            whole = each.sum()
        for layer, seen in calls.items():
            if len(seen) > 1:
                raise UnfitError(f"a {type(layer).__name__} is called {len(seen)} times")
        edges = [seen[0].edge for seen in calls.values()]
        back = torch.autograd.grad(whole, edges, allow_unused=True)
        with torch.no_grad():
            return each.detach(), list(self._parts(calls, back, count))

    def _parts(
        self, calls: dict[nn.Module, list[_Call]], back: tuple[Tensor | None, ...], count: int
    ) -> Iterator[LayerGradients]:
        for (layer, seen), came_back in zip(calls.items(), back, strict=True):
            if came_back is None:
                continue
            if seen[0].given._version != seen[0].version:
                raise UnfitError(
                    f"the input of a {type(layer).__name__} was changed in place after it was used"
                )
            pair = _by_example(layer, seen[0].given, came_back, count)
            yield gradients_of(layer, *map(widened, pair))

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


def _by_example(layer: nn.Module, given: Tensor, back: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both with the example as first axis, where a model folds positions into it: view(B*T, ..)."""
    first = len(given)
    if first == count:
        return given, back
    if first % count or not isinstance(layer, FOLDED):
        raise UnfitError(
            f"a {type(layer).__name__} was called on {first} rows for {count} examples"
        )
    shape = count, first // count
    return given.reshape(*shape, *given.shape[1:]), back.reshape(*shape, *back.shape[1:])
