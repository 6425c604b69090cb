"""What protects an update on its way out of a node, read off the stack that will encode it.

Nothing here is taken from what a coordinator says about protection: only layers that are in the
stack count, of Umbel's own kinds, with the numbers that these very layers will use. So a message
with a noise multiplier for a layer that is not there changes nothing, and noise that can be
repeated is none.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from umbel.strategies.collect import Seals
from umbel.strategies.errors import StackError
from umbel.strategies.layer import Facts, Layer, SeesMetrics
from umbel.strategies.stack import Stack

_EXACT = 1e-9
"""Relative difference of two machines' arithmetic on one bound."""

_NOISE = "umbel.strategies.secure.distributed_noise.DistributedNoise"
_LOCAL = "umbel.strategies.private.local_gaussian.LocalGaussian"
_CLIP = "umbel.strategies.private.clip.Clip"
_ADAPTIVE = "umbel.strategies.private.adaptive_clip.AdaptiveClip"
_SUM = "umbel.strategies.secure.secure_sum.SecureSum"


@dataclass(frozen=True)
class Protection:
    """What protects one node's update.

    Attributes:
        sealed: it leaves under Umbel's own masks, so that the server sees sums only.
        noise: standard deviation of the noise that nodes add over the bound of an update: of this
            node's own, or of a sum's; 0 is none, also where it could be repeated.
        shares: into how many shares the noise of a sum is cut; 0 where it is not cut.
        norm: no update is longer than this when it leaves; None is no bound that is known.
        seeded: some noise of the stack is made of a seed that the run knows.
        central: a layer claims privacy by noise that the server adds.
        metrics: how metrics of training would leave: `none`, `noised`, `summed` or `clear`.
        counts: how numbers of examples would, likewise.
    """

    sealed: bool = False
    noise: float = 0.0
    shares: int = 0
    norm: float | None = None
    seeded: bool = False
    central: bool = False
    metrics: str = "clear"
    counts: str = "clear"

    @property
    def hides(self) -> bool:
        """Whether the server is not to see this node's own update."""
        return self.sealed or self.noise > 0


def protection_of(stack: Stack, size: int, told: Mapping[str, Any]) -> Protection:
    """What will protect an update of `size` coordinates that this stack encodes.

    Args:
        stack: as the node has built it.
        size: coordinates of an update before the first layer.
        told: the configuration of the round, from which layers take their norms and noise.

    Raises:
        StackError: a layer of noise is told another bound than the layers before it give.
    """
    shared = any(_is(layer, _NOISE) for layer in stack.layers)
    facts = Facts(size=size, round=int(_number(told.get("round")) or 0))
    noise, shares, norm, seeded = 0.0, 0, None, False
    for place, layer in enumerate(stack.layers):
        seeded |= getattr(layer, "insecure_seed", None) is not None
        last = place == len(stack.layers) - 1
        clips = any(_is(layer, kind) for kind in (_CLIP, _ADAPTIVE))
        if clips:
            norm = _number(told.get(f"{layer.name}.norm"))
        elif not type(layer).__module__.startswith("umbel.strategies."):
            norm = None  # what an app's own layer does to a length, nobody here knows
        if _is(layer, _NOISE) and last:
            _check_bound(layer, facts, told)
            noise = _number(told.get(f"{layer.name}.noise-multiplier")) or 0.0
            shares = int(_number(told.get(f"{layer.name}.shares")) or 0)
        elif _is(layer, _LOCAL) and last:
            noise = float(getattr(layer, "noise_multiplier", 0.0))
        elif shared:
            facts = _after(layer, facts, norm if clips else None)
    real = 0.0 if seeded else noise
    sealed = isinstance(stack.collect, Seals)
    return Protection(
        sealed=_is(stack.collect, _SUM),
        noise=real,
        shares=shares,
        norm=norm,
        seeded=seeded,
        central=stack.private and not noise,
        metrics=_carried(stack, sealed, real, "limits"),
        counts=_carried(stack, sealed, real, "cap"),
    )


def _after(layer: Layer[Any], facts: Facts, norm: float | None) -> Facts:
    """The facts after a layer; one that clips does so to the norm that it is told."""
    state = layer.init(facts.size)
    if norm is not None and _is(layer, _CLIP):
        return replace(layer, norm=norm).check(facts, state)  # type: ignore[type-var]
    if norm is not None and _is(layer, _ADAPTIVE):
        state = {**state, "norm": norm}
    return layer.check(facts, state)


def quiet(stack: Stack) -> bool:
    """Whether nothing may travel beside the updates of a stack: it seals them or adds noise."""
    return stack.private or isinstance(stack.collect, Seals)


def hides(stack: Stack) -> bool:
    """Whether a stack keeps single updates from the server: by masks, or by nodes' own noise.

    Noise that the server itself adds protects whoever sees the models, and not from the server.
    """
    nodes = any(_is(layer, kind) for layer in stack.layers for kind in (_LOCAL, _NOISE))
    return nodes or isinstance(stack.collect, Seals)


def _check_bound(layer: Layer[Any], facts: Facts, told: Mapping[str, Any]) -> None:
    """Noise for a smaller bound than updates may have would be too little for them."""
    bound = _number(told.get(f"{layer.name}.bound"))
    own = facts.l2_bound
    if own is None or bound is None or abs(bound - own) > _EXACT * own:
        raise StackError(
            f"the message tells {layer.name} to make noise for updates of norm {bound}, and the "
            f"layers before it give {own}; the coordinator has other layers, or is not honest"
        )


def _carried(stack: Stack, sealed: bool, noise: float, what: str) -> str:
    """How something that a node measured leaves it: beside its update, or inside."""
    if not quiet(stack):
        return "clear"
    inside = any(isinstance(each, SeesMetrics) and _takes(each, what) for each in stack.layers)
    if not inside:
        return "none"
    return "noised" if noise else "summed" if sealed else "clear"


def _takes(layer: object, what: str) -> bool:
    """Whether a layer takes metrics (`limits`) or counts (`cap`) into the update."""
    if type(layer).__module__.startswith("umbel.strategies."):
        return bool(getattr(layer, what, None))
    return True


def _is(thing: object, name: str) -> bool:
    """Whether something is of exactly one of Umbel's own classes.

    By the class in the module that made it, which need not be imported where nothing is of it;
    a class of another name, a subclass, or one that calls itself so, is not.
    """
    module, _, kind = name.rpartition(".")
    home = sys.modules.get(module)
    return home is not None and type(thing) is getattr(home, kind, None)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
