"""The order of layers: what may stand below noise.

    node     update -> layers in list order -> the noise of nodes   -> what is sent
    server   model  <- layers in reverse    <- the noise of a server <- the sum

Noise that a server adds covers what is made of the sum after it. What a layer below (nearer to
the sum) makes of the sum before the noise is on it stays exact: a mean over exact weights, a
metric, a count. So only fixed linear maps that make no sum longer may stand there; everything
else stands above. Noise that nodes add covers what has been put into the update before, so no
layer below may touch the update once more.

Nothing here trusts what a layer says of itself where its code can be asked: a half that is
inherited from `IdleNode` or `IdleServer` does nothing, and a layer that says that it is an
isometry is tried.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.strategies.transform import (
    Facts,
    Isometry,
    RoundContext,
    Transform,
    acts_on_sums,
    acts_on_updates,
    claims_privacy,
)

_TRIED = 48
"""Coordinates with which an isometry is tried."""
_CLOSE = 1e-5
"""Rounding in float32 that a linear map may show, as a part of its input's length."""


def check_order(layers: Sequence[Transform[Any]]) -> None:
    """Refuse layers below noise that would be outside its protection.

    Raises:
        StackError: names the two layers, and the order that holds the promise.
    """
    for place, noise in enumerate(layers):
        if not claims_privacy(noise):
            continue
        for below in layers[place + 1 :]:
            if acts_on_sums(noise) and not keeps_sums(below):
                raise StackError(
                    f"{below.name} stands below {noise.name}, so what it makes of the sum would "
                    f"be made before the noise is on it; put {below.name} before {noise.name}"
                )
            if acts_on_updates(noise) and acts_on_updates(below):
                raise StackError(
                    f"{below.name} stands below {noise.name}, so it would change updates after "
                    f"their noise was made for them; put {below.name} before {noise.name}"
                )


def keeps_sums(layer: Transform[Any]) -> bool:
    """Whether a layer's server half may see a sum before its noise.

    Raises:
        StackError: the layer says that it is an isometry, and is none.
    """
    if not acts_on_sums(layer):
        return True
    if not (isinstance(layer, Isometry) and layer.isometry):
        return False
    problem = _tried(layer)
    if problem:
        raise StackError(
            f"{layer.name} says that it is an isometry, but {problem}; correct its decode, or put "
            "it before the layer of noise"
        )
    return True


def _tried(layer: Transform[Any]) -> str:
    """What is wrong with a layer that says that it is an isometry; empty if nothing is."""
    before = Facts(size=_TRIED, l2_bound=1.0, expected_replies=8.0, max_replies=8, round=1)
    generator = torch.Generator().manual_seed(0)
    try:
        state = layer.init(_TRIED)
        size = layer.check(before, state).size
    except Exception as error:
        return f"it cannot be tried on {_TRIED} coordinates: {error}"
    one, other = torch.randn(2, size, dtype=torch.float64, generator=generator)
    rnd = RoundContext(1, 8.0, 8, 8.0, before.replace(size=size), generator, before, 8.0)
    found = []
    for total in (one, other, one + 3 * other):
        ctx = replace(rnd, reports={})
        made, after = layer.decode(total.clone(), state, ctx)
        if ctx.reports:
            return f"its server half releases {', '.join(ctx.reports)}"
        if not _same(after, state):
            return "its server half keeps something of the sum"
        if float(made.norm()) > float(total.norm()) * (1 + _CLOSE):
            return "its server half makes sums longer"
        found.append(made.double())
    remainder = found[2] - found[0] - 3 * found[1]
    if float(remainder.norm()) > _CLOSE * float(one.norm() + 3 * other.norm()):
        return "its server half is not linear"
    return ""


def _same(after: Any, before: Any) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_same(after[k], before[k]) for k in before)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(after, before)
    return bool(after is before or after == before)
