"""Per-example clipping: what DP-SGD needs, at nearly the price of plain SGD where that is right.

    `ghost_norms`   from the layers' inputs and output gradients
    `formed`        from whole gradients: all at once, or example by example

Which of them a module gets is found out on random inputs before its first batch, and so is
whether its examples meet each other at all (`self_check`).
"""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umbel.privacy.bounds.examples import (
    ClippedSum,
    Losses,
    count_of,
    tensors_of,
    trained,
    zeros,
)
from umbel.privacy.bounds.formed import OneByOne
from umbel.privacy.bounds.ghost_norms import GhostNorms, UnfitError
from umbel.privacy.bounds.self_check import Way, examine, refuse_known
from umbel.privacy.validate import positive

__all__ = ["ClippedSum", "Losses", "PerExample"]

_KEPT = 32
"""Shapes of a module whose outcome is remembered."""

_outcomes: "weakref.WeakKeyDictionary[nn.Module, dict[Hashable, type[Way] | str]]" = (
    weakref.WeakKeyDictionary()
)


@dataclass
class PerExample:
    """Sums of clipped per-example gradients of one module's trained parameters.

    Args:
        module: its first output axis is the example.

    Attributes:
        names: the trained parameters.
        way: how the last batch was clipped; None before the first.

    Raises:
        ValueError: a layer mixes the examples of a batch, so that none has a gradient of its own.
    """

    module: nn.Module
    names: dict[Tensor, str] = field(init=False)
    way: type[Way] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        refuse_known(self.module)
        self.names = trained(self.module)

    @property
    def ghost(self) -> bool:
        """Whether the last batch was clipped without forming its gradients."""
        return self.way is GhostNorms

    def check(self, inputs: Any, targets: Any, losses: Losses) -> None:
        """See that examples of these shapes have gradients of their own; on random ones.

        Args:
            inputs: as in `clipped_sum`, of any number of examples; and so are the others.

        Raises:
            ValueError: an example's gradient depends on others.
        """
        self._chosen(inputs, targets, losses)

    def clipped_sum(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum:
        """The clipped gradients of a batch, added up.

        Guarantees: adding or removing one example changes the result by at most `norm`, up to
        rounding in float32 (a factor below 1 + 2**-18 for batches up to 2**14).

        Args:
            inputs: what the module takes, first axis the example; a list of tensors are its
                arguments, a mapping its keywords.
            targets: what `losses` compares the outputs with, first axis the example.
            losses: outputs and targets to one loss an example; several values are averaged.
            norm: of one example's gradient, over all trained parameters together.

        Raises:
            ValueError: the norm is not positive, or an example's gradient depends on others.
        """
        positive(norm=norm)
        if count_of(inputs) == 0:
            return ClippedSum(zeros(self.names), torch.zeros(0), 0.0)
        way = self._chosen(inputs, targets, losses)
        before = self._versions()
        try:
            found = way.clipped_sum(inputs, targets, losses, norm)
        except UnfitError:  # a layer that these examples reach otherwise than those of the check
            self.way = OneByOne
            found = OneByOne(self.module, self.names).clipped_sum(inputs, targets, losses, norm)
        self._refuse_changed(before)
        return found

    def each(self, inputs: Any, targets: Any, losses: Losses) -> Tensor:
        """Every example's whole gradient, where it is needed by itself.

        Args:
            inputs: as in `clipped_sum`, and so are targets and losses.

        Returns:
            Shape (n, trained parameters): flat, in the order of `names`.

        Raises:
            ValueError: an example's gradient depends on others.
        """
        way = self._chosen(inputs, targets, losses)
        before = self._versions()
        try:
            found = way.each(inputs, targets, losses)
        except UnfitError:
            self.way = OneByOne
            found = OneByOne(self.module, self.names).each(inputs, targets, losses)
        self._refuse_changed(before)
        return found

    def _chosen(self, inputs: Any, targets: Any, losses: Losses) -> Way:
        """The way that the check found for these shapes; checked on first use."""
        known = _outcomes.setdefault(self.module, {})
        key = self._key(inputs, targets, losses)
        if key not in known:
            while len(known) >= _KEPT:
                known.pop(next(iter(known)))
            try:
                known[key] = examine(self.module, inputs, targets, losses)
            except ValueError as error:
                known[key] = str(error)
        outcome = known[key]
        if isinstance(outcome, str):
            raise ValueError(outcome)
        self.way = outcome
        return outcome(self.module, self.names)

    def _key(self, inputs: Any, targets: Any, losses: Losses) -> Hashable:
        """What the outcome of a check depends on; never the values of a batch."""
        shapes = [
            (tuple(t.shape[1:]), t.dtype, t.device)
            for part in (inputs, targets)
            for t in tensors_of(part)
        ]
        modes = [(type(m), m.training) for m in self.module.modules()]
        return (
            tuple(shapes),
            tuple(modes),
            tuple(self.names.values()),
            getattr(losses, "__code__", losses),  # a closure is made anew for every round
        )

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.module.parameters()]

    def _refuse_changed(self, before: list[int]) -> None:
        for (name, _), was, now in zip(
            self.module.named_parameters(), before, self._versions(), strict=True
        ):
            if was != now:
                raise ValueError(
                    f"{name} was changed by the model itself while it was called, which tells "
                    "which examples it saw; leave parameters to the optimiser (no max_norm)"
                )
