"""Corrections of gradients, laid out for a module's parameters, and for those of many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umbel.clients.local_settings import LocalSettings
from umbel.core.errors import ConfigError
from umbel.core.records import Manifest, Tree
from umbel.strategies.objective import Correction


@dataclass(frozen=True)
class Correcting:
    """gradient <- gradient + offset + strength x (w - anchor), a tensor for each parameter.

    Attributes:
        offset: a tensor for each parameter; None is zero.
        anchor: likewise; None without a strength.
        strength: of the pull towards the anchor.
    """

    offset: Sequence[Tensor] | None
    anchor: Sequence[Tensor] | None
    strength: float

    @staticmethod
    def of(
        correction: Correction | None, start: Tree, parameters: Mapping[str, nn.Parameter]
    ) -> Correcting | None:
        """For parameters that hold the weights that training starts from; None is no correction.

        Args:
            correction: over flat vectors in the order of the model's manifest.
            start: the weights, in that order.
            parameters: by their names, on their device.
        """
        if correction is None or not correction.adds:
            return None
        layout = Manifest.of(start)
        offset = None
        if correction.offset is not None:
            offset = _laid(layout.unflatten(correction.offset), parameters)
        anchor = None
        if correction.strength and correction.anchor is not None:
            anchor = _laid(layout.unflatten(correction.anchor), parameters)
        elif correction.strength:
            anchor = [parameter.detach().clone() for parameter in parameters.values()]
        return Correcting(offset, anchor, correction.strength)

    @torch.no_grad()
    def add_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add it to the gradients of the parameters, where they have one."""
        for place, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            if self.anchor is not None:
                parameter.grad.add_(parameter - self.anchor[place], alpha=self.strength)
            if self.offset is not None:
                parameter.grad.add_(self.offset[place])


def trained_names(correction: Correction | None, start: Tree) -> list[str]:
    """The parameters that a correction leaves to be trained.

    Args:
        correction: None is nothing, so that all are.
        start: the weights, in the order of the model's manifest.

    Raises:
        ConfigError: it trains a part of a parameter and leaves the rest of it.
    """
    if correction is None or correction.trains is None:
        return list(start)
    names, end = [], 0
    for name, tensor in start.items():
        begin, end = end, end + tensor.numel()
        inside = sum(max(0, min(end, b) - max(begin, a)) for a, b in correction.trains)
        if 0 < inside < tensor.numel():
            raise ConfigError(
                f"a method trains {inside} of the {tensor.numel()} values of {name}; parameters "
                "are trained whole or not at all"
            )
        if inside:
            names.append(name)
    return names


def proximal(settings: LocalSettings) -> Correction | None:
    """The pull of FedProx, for who trains outside of a federation; there it is in the stack."""
    return Correction(strength=settings.proximal_mu) if settings.proximal_mu else None


@dataclass(frozen=True)
class CorrectingMany:
    """The corrections of several nodes whose training starts from the same weights.

    Attributes:
        offset: by parameter, stacked along a first axis of nodes; None is zero.
        anchor: likewise, or without that axis where all nodes have one anchor.
        strength: of the pulls; shape (nodes,) where they differ.
        pulls_at_start: whether an anchor lies elsewhere than the start.
    """

    offset: Tree | None
    anchor: Tree | None
    strength: float | Tensor
    pulls_at_start: bool

    @staticmethod
    def of(
        corrections: Sequence[Correction | None], given: Tree, start: Tree
    ) -> CorrectingMany | None:
        """None where no node has one.

        Args:
            corrections: one a node, over flat vectors.
            given: the weights that training starts from, in the order of the vectors.
            start: the same by name, on the device to work on.
        """
        found = [one or Correction() for one in corrections]
        if not any(found):
            return None
        layout = Manifest.of(given)

        def stacked(vectors: Sequence[Tensor]) -> Tree:
            trees = [layout.unflatten(vector) for vector in vectors]
            return {n: torch.stack([t[n] for t in trees]).to(p) for n, p in start.items()}

        offset = None
        if any(one.offset is not None for one in found):
            zero = torch.zeros(layout.size, dtype=layout.dtype)
            offset = stacked([zero if one.offset is None else one.offset for one in found])
        strengths = [one.strength for one in found]
        alike = len(set(strengths)) == 1
        strength = strengths[0] if alike else torch.tensor(strengths)
        if not any(strengths):
            return CorrectingMany(offset, None, 0.0, pulls_at_start=False)
        first = layout.flatten(given)
        anchors = [first if one.anchor is None else one.anchor for one in found]
        here = all(a is first or a is anchors[0] for a in anchors)
        if here and torch.equal(anchors[0], first):
            return CorrectingMany(offset, start, strength, pulls_at_start=False)
        return CorrectingMany(offset, stacked(anchors), strength, pulls_at_start=True)

    def add_to(self, gradients: Tree, weights: Tree, active: int, *, first: bool) -> None:
        """Add them to the gradients of the first `active` nodes.

        Args:
            gradients: by parameter, of shape (active, ...).
            weights: where the nodes are: of shape (active, ...), or at their common start.
            first: whether they are at the start.
        """
        for name, gradient in gradients.items():
            if self.anchor is not None and (self.pulls_at_start or not first):
                anchor = self.anchor[name]
                pull = weights[name] - (anchor[:active] if self.pulls_at_start else anchor)
                if isinstance(self.strength, Tensor):
                    shape = (-1, *(1,) * (gradient.ndim - 1))
                    gradient.add_(pull * self.strength[:active].to(pull).reshape(shape))
                else:
                    gradient.add_(pull, alpha=self.strength)
            if self.offset is not None:
                gradient.add_(self.offset[name][:active])


def _laid(tree: Tree, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    return [tree[name].to(p.device, p.dtype) for name, p in parameters.items()]
