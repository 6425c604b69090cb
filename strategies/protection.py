"""What protects an update on its way out of a node, read off the stack that will encode it.

Nothing here is taken from what a coordinator says about protection: only layers that are in the
stack count, of Umbel's own kinds, with the numbers that these very layers will use. So a message
with a noise multiplier for a layer that is not there changes nothing, and noise that can be
repeated is none.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from umbel.core.errors import StackError
from umbel.strategies.collect import Seals
from umbel.strategies.exchange import is_own
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, Transform, needs_of

_TELLS = {"limits": "start-loss", "cap": "steps"}
"""What a method takes into the update that tells as much as metrics, or as numbers of examples."""

_EXACT = 1e-9
"""Relative difference of two machines' arithmetic on one bound."""

_NOISE = "umbel.strategies.secure.distributed_noise.DistributedNoise"
_LOCAL = "umbel.strategies.private.local_gaussian.LocalGaussian"
_CLIP = "umbel.strategies.private.clip.Clip"
_ADAPTIVE = "umbel.strategies.private.adaptive_clip.AdaptiveClip"
_SUM = "umbel.strategies.secure.secure_sum.SecureSum"
_BUCKETS = "umbel.strategies.secure.buckets.SecureBuckets"


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


@runtime_checkable
class MakesOwnNoise(Protocol):
    """A layer whose noise is of each node's own, and known before any round."""

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over the bound of an update."""
        ...


@dataclass(frozen=True)
class Outlook:
    """What can be said of a stack before any message: the part that is worth keeping.

    Args:
        stack: as the node has built it.
        size: coordinates of an update before the first layer.
    """

    stack: Stack
    size: int
    _bounds: dict[tuple[float | None, ...], float | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def _clips(self) -> list[tuple[int, str]]:
        """Place and name of the layers that clip."""
        return [
            (place, layer.name)
            for place, layer in enumerate(self.stack.layers)
            if _is(layer, _CLIP) or _is(layer, _ADAPTIVE)
        ]

    @cached_property
    def _normed(self) -> str:
        """The layer whose norm an update has when it leaves; empty where nobody knows its length.

        What an app's own layer does to a length, nobody here knows.
        """
        foreign = [
            place
            for place, layer in enumerate(self.stack.layers)
            if not type(layer).__module__.startswith("umbel.strategies.")
        ]
        last = self._clips[-1] if self._clips else (-1, "")
        return last[1] if last[0] > max(foreign, default=-1) else ""

    @cached_property
    def _noisy(self) -> Transform[Any] | None:
        """The layer of Umbel's own that adds noise on the node, at the bottom of the stack."""
        last = self.stack.layers[-1] if self.stack.layers else None
        return last if _is(last, _NOISE) or _is(last, _LOCAL) else None

    @property
    def seeded(self) -> bool:
        """Whether some noise of the stack is made of a seed that the run knows."""
        return self.stack.insecure

    @cached_property
    def quiet(self) -> bool:
        """Whether nothing may travel beside updates."""
        return quiet(self.stack)

    @cached_property
    def counts_matter(self) -> bool:
        """Whether the coordinator uses numbers of examples, or nobody can say that it does not."""
        collect = self.stack.collect
        return not is_own(collect) or collect.check(Facts(size=1)).weight_bound is None

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """What does not depend on a message."""
        sealed = isinstance(self.stack.collect, Seals)
        noise = self._noisy is not None and not self.seeded
        return {
            "sealed": any(_is(self.stack.collect, kind) for kind in (_SUM, _BUCKETS)),
            "seeded": self.seeded,
            "central": self.stack.private and self._noisy is None,
            "metrics": _carried(self.stack, sealed, noise, "limits"),
            "counts": _carried(self.stack, sealed, noise, "cap"),
        }

    def under(self, told: Mapping[str, Any]) -> Protection:
        """What will protect an update that this stack encodes.

        Args:
            told: the configuration of the round, from which layers take their norms and noise.

        Raises:
            StackError: a layer of noise is told another bound than the layers before it give.
        """
        noise, shares, layer = 0.0, 0, self._noisy
        # To ask for a protocol takes longer than all of this, so there has to be a layer first.
        if layer is not None and isinstance(layer, MakesOwnNoise) and _is(layer, _LOCAL):
            noise = float(layer.noise_multiplier)
        elif layer is not None:
            self._check_bound(layer, told)
            noise = _number(told.get(f"{layer.name}.noise-multiplier")) or 0.0
            shares = int(_number(told.get(f"{layer.name}.shares")) or 0)
        return Protection(
            noise=0.0 if self.seeded else noise,
            shares=shares,
            norm=_number(told.get(f"{self._normed}.norm")) if self._normed else None,
            **self._fixed,
        )

    def _check_bound(self, layer: Transform[Any], told: Mapping[str, Any]) -> None:
        """Noise for a smaller bound than updates may have would be too little for them."""
        bound = _number(told.get(f"{layer.name}.bound"))
        norms = tuple(_number(told.get(f"{name}.norm")) for _, name in self._clips)
        if norms not in self._bounds:
            self._bounds.clear()
            self._bounds[norms] = self._bound(norms)
        own = self._bounds[norms]
        if own is None or bound is None or abs(bound - own) > _EXACT * own:
            raise StackError(
                f"the message tells {layer.name} to make noise for updates of norm {bound}, and "
                f"the layers before it give {own}; the coordinator has other layers, or is not "
                "honest"
            )

    def _bound(self, norms: tuple[float | None, ...]) -> float | None:
        """The bound before the last layer, where layers clip to these norms."""
        facts, clips = Facts(size=self.size), iter(norms)
        for place, layer in enumerate(self.stack.layers[:-1]):
            state = layer.init(facts.size)
            if any(place == where for where, _ in self._clips):
                norm = next(clips)
                if norm is None:
                    return None
                if _is(layer, _CLIP):
                    facts = replace(layer, norm=norm).check(facts, state)  # type: ignore[type-var]
                    continue
                state = {**state, "norm": norm}
            facts = layer.check(facts, state)
        return facts.l2_bound


def quiet(stack: Stack) -> bool:
    """Whether nothing may travel beside the updates of a stack: it seals them or adds noise."""
    return stack.private or isinstance(stack.collect, Seals)


def hides(stack: Stack) -> bool:
    """Whether a stack keeps single updates from the server: by masks, or by nodes' own noise.

    Noise that the server itself adds protects whoever sees the models, and not from the server.
    """
    nodes = any(_is(layer, kind) for layer in stack.layers for kind in (_LOCAL, _NOISE))
    return nodes or isinstance(stack.collect, Seals)


def _carried(stack: Stack, sealed: bool, noise: bool, what: str) -> str:
    """How something that a node measured leaves it: beside its update, or inside."""
    if not quiet(stack):
        return "clear"
    inside = _TELLS[what] in stack.needs or any(
        "metrics" in needs_of(each) and _takes(each, what) for each in stack.layers
    )
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
