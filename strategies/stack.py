"""A stack: a flat list of layers over one exchange and its aggregator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict
from torch import Tensor

from umbel.core.errors import RunError, StackError
from umbel.core.names import UPDATE
from umbel.privacy.bounds.clipping import is_within
from umbel.strategies.aggregator import Aggregate, Aggregator
from umbel.strategies.collect import PlainSum
from umbel.strategies.contexts import Memory
from umbel.strategies.declared import ClipsUpdates, ReleasesMetrics
from umbel.strategies.exchange import LENIENCE, Exchange, Seals, exchange_of, is_own, takes_sums
from umbel.strategies.objective import (
    Correction,
    LocalObjective,
    Personal,
    Phase,
    Sized,
    TrainsInPhases,
    TrainsTwice,
    TunesOwn,
    combined,
)
from umbel.strategies.order import check_order, keeps_sums
from umbel.strategies.payload import Packing, Packs, packed
from umbel.strategies.transform import (
    Broadcast,
    Calibrated,
    Claim,
    EncodesMany,
    Facts,
    Metrics,
    NodeContext,
    RoundContext,
    Seeded,
    Separated,
    Transform,
    acts_on_sums,
    acts_on_updates,
    claims_privacy,
    needs_of,
)

if TYPE_CHECKING:
    from umbel.privacy.bounds.bundle import Bundle

States = tuple[Any, ...]
"""One state a layer, in the stack's order."""


@dataclass(frozen=True)
class Stack:
    """Layers in the order in which an update passes them on its node, over one exchange.

    `collect` is an exchange, such as `PlainSum()`, or an aggregator, which then gets replies in
    the clear.

    >>> print(Stack())
    plain-sum

    What a run promises is read off the stack: it is private where a layer claims something, its
    claims are those of its layers, and `check` refuses an order or a collect that would not hold
    them, whoever built it.

    Raises:
        StackError: two layers have one name.
    """

    layers: Sequence[Transform[Any]] = ()
    collect: Exchange = field(default_factory=PlainSum)

    if TYPE_CHECKING:  # an aggregator is taken as well

        def __init__(
            self,
            layers: Sequence[Transform[Any]] = (),
            collect: Exchange | Aggregator[Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "collect", exchange_of(self.collect))
        names = [layer.name for layer in self.layers]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise StackError(
                f"two layers are called {min(twice)!r}; give one of them another name, because "
                "names tell their metrics, options and states apart"
            )

    def __str__(self) -> str:
        return " -> ".join([*(layer.name for layer in self.layers), self.collect.name])

    def init(self, size: int) -> States:
        """The layers' states before the first round, for updates of `size` coordinates."""
        return tuple(layer.init(size) for layer in self.layers)

    def check(self, facts: Facts, states: States) -> Facts:
        """The facts at the bottom of the stack.

        Raises:
            StackError: layers that do not fit, a layer below noise that would be outside its
                protection, or a private stack over a collect of which nothing is known.
        """
        self._sound  # noqa: B018 - raises; the layers never change, so once is enough
        bottom = self.collect.check(self.places(facts, states)[-1])
        if self._packs is not None and bottom.server_sees == "sum":
            raise StackError(
                f"{self._packs.name} writes each update down in its own way, and {self.collect} "
                "adds up whole vectors in secret; take random-k or sketch, which are summed in "
                "secret, or leave out secure=true"
            )
        return bottom

    def places(self, facts: Facts, states: States) -> list[Facts]:
        """The facts of an update as it enters each layer, and last the collect.

        A round asks for its places several times; they are worked out once.
        """
        if self._known and self._known[0][0] == facts and self._known[0][1] is states:
            return self._known[0][2]
        found = [facts]
        for layer, state in zip(self.layers, states, strict=True):
            found.append(self._after(layer, found[-1], state))
        self._known[:] = [(facts, states, found)]
        return found

    @cached_property
    def _known(self) -> list[tuple[Facts, States, list[Facts]]]:
        """The places that were asked for last."""
        return []

    def _after(self, layer: Transform[Any], facts: Facts, state: Any) -> Facts:
        """The facts after a layer; a longer vector has a bound only where the layer says it."""
        after = layer.check(facts, state)
        lengthened = after.size > facts.size and after.l2_bound == facts.l2_bound
        if lengthened and after.l2_bound is not None and layer.name not in self._keeping:
            return after.replace(l2_bound=None, grid=None)
        return after

    @cached_property
    def _keeping(self) -> frozenset[str]:
        """Names of the layers whose server half makes no sum longer."""
        return frozenset(layer.name for layer in self.layers if keeps_sums(layer))

    @cached_property
    def _packs(self) -> Packs | None:
        """The layer that says how updates are written down; None where they travel whole.

        Raises:
            StackError: there are two, or a layer below it changes what it has to find.
        """
        places = [i for i, layer in enumerate(self.layers) if isinstance(layer, Packs)]
        if not places:
            return None
        one = self.layers[places[0]]
        assert isinstance(one, Packs)
        if len(places) > 1:
            raise StackError(
                f"{one.name} and {self.layers[places[1]].name} would both write the update down; "
                "leave out one of them"
            )
        for below in self.layers[places[0] + 1 :] if one.keeps_shape else ():
            leaves = isinstance(below, ClipsUpdates | ReleasesMetrics)
            if acts_on_updates(below) and not leaves:
                raise StackError(
                    f"{below.name} would change what {one.name} has made of an update, which then "
                    f"could not be written down in fewer bytes; leave out {one.name}, or take "
                    "random-k or qsgd-8"
                )
        return one

    @property
    def packs(self) -> bool:
        """Whether updates travel in another form than as one dense vector."""
        return self._packs is not None

    def packing(self, facts: Facts, states: States) -> Packing | None:
        """Server: how a round's updates are written down; None where they travel whole.

        Args:
            facts: of an update before the stack.
            states: of the layers.
        """
        if self._packs is None:
            return None
        places = self.places(facts, states)
        covers = self._covers(places)
        return Packing(self._packs, covers, places[-1].size - covers)

    def _covers(self, places: Sequence[Facts]) -> int:
        """The coordinates that are packed: as many as enter the layer that packs."""
        at = next(i for i, layer in enumerate(self.layers) if isinstance(layer, Packs))
        return min(places[at].size, places[-1].size)

    def pack(
        self, update: Tensor, config: Mapping[str, Any], memory: RecordDict, told: NodeContext
    ) -> Mapping[str, Tensor]:
        """Node: what travels of a vector that `encode` gave, by name.

        Args:
            update: shape (size,).
            config: the scalars of the broadcast.
            memory: the node's own records.
            told: of the round and of the training.
        """
        layer = self._packs
        if layer is None:
            return {UPDATE: update}
        ctx = own_context(replace(told, config=config), layer.name, memory)
        covers = int(ctx.config.get("covers", -1))
        if not 0 < covers <= update.numel():
            raise RunError(
                f"the server says that {layer.name} covers {covers} coordinates of an update of "
                f"{update.numel()}; start both with the same app and options"
            )
        return packed(layer, update, covers, float(ctx.config.get("longest", math.inf)), ctx)

    @cached_property
    def _sound(self) -> bool:
        check_order(self.layers)
        self._packs  # noqa: B018 - raises where two layers would pack
        if self.private and not is_own(self.collect):
            raise StackError(
                f"{self.collect.name} is not one of Umbel's own ways to collect, so nobody can "
                "say what one update does to its result, and noise for it would be a guess; take "
                "PlainSum(weighting='fixed'), or SecureSum(weighting='fixed')"
            )
        return True

    def broadcast(self, states: States, facts: Facts) -> Broadcast:
        """What every node must know this round, as `"{layer}.{key}"`.

        Every layer that receives bounded updates is told their bound as `bound`, so that a norm
        is written down once; and nodes are told that of the collect, where the server cannot
        measure what they send.

        Args:
            states: of the layers.
            facts: of an update before the stack.
        """
        scalars: dict[str, Any] = {}
        vectors: dict[str, Tensor] = {}
        places = self.places(facts, states)
        for layer, state, here in zip(self.layers, states, places, strict=False):
            said = layer.broadcast(state, here)
            scalars |= {f"{layer.name}.{key}": value for key, value in said.scalars.items()}
            vectors |= {f"{layer.name}.{key}": value for key, value in said.vectors.items()}
            if here.l2_bound is not None:
                scalars[f"{layer.name}.bound"] = here.l2_bound
        bottom = places[-1]
        if self._packs is not None:
            scalars[f"{self._packs.name}.covers"] = self._covers(places)
            if bottom.l2_bound is not None:
                scalars[f"{self._packs.name}.longest"] = bottom.l2_bound
        if isinstance(self.collect, Seals):
            bound = self.collect.check(bottom).l2_bound
            if bound is not None and not bottom.noise:  # who adds noise measures before it does
                scalars[f"{self.collect.name}.bound"] = bound
        return Broadcast(scalars, vectors)

    def publish(self, states: States, facts: Facts) -> dict[str, Any]:
        """The scalars of `broadcast`."""
        return dict(self.broadcast(states, facts).scalars)

    @cached_property
    def objectives(self) -> tuple[LocalObjective[Any], ...]:
        """The layers that shape what nodes train on."""
        return tuple(layer for layer in self.layers if isinstance(layer, LocalObjective))

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the node halves of the layers need beyond the update."""
        return frozenset().union(*(needs_of(layer) for layer in self.layers))

    @cached_property
    def _sees(self) -> list[bool]:
        # Kept: to ask whether a layer has a protocol's methods takes longer than its work.
        return ["metrics" in needs_of(layer) for layer in self.layers]

    def begin(self, start: Tensor, told: NodeContext, state: RecordDict) -> Correction | None:
        """Node, before training: what all objectives add to its gradients; None is nothing.

        Args:
            start: the model as it was sent, of shape (size,).
            told: the whole broadcast, from which each objective is told its own part.
            state: the node's own records.
        """
        if not self.objectives:
            return None
        found = [one.begin(start, own_context(told, one.name, state)) for one in self.objectives]
        return combined(found, start)

    @cached_property
    def private(self) -> bool:
        """Whether a layer makes a privacy claim; nothing may then leave a node beside it."""
        return any(claims_privacy(layer) for layer in self.layers)

    @property
    def waiting(self) -> bool:
        """Whether a layer's noise is still to be decided."""
        return any(
            isinstance(layer, Calibrated) and layer.noise_multiplier is None
            for layer in self.layers
        )

    @property
    def noise_multiplier(self) -> float | None:
        """Of the first layer whose noise follows from a budget; None where there is none yet."""
        found = (layer.noise_multiplier for layer in self.layers if isinstance(layer, Calibrated))
        return next((value for value in found if value is not None), None)

    @property
    def separation(self) -> int:
        """Rounds that a node rests between two participations, as the layers need it."""
        found = (layer.separation for layer in self.layers if isinstance(layer, Separated))
        return max(found, default=1)

    @cached_property
    def insecure(self) -> bool:
        """Whether the noise of a layer can be repeated."""
        return any(
            isinstance(layer, Seeded) and layer.insecure_seed is not None for layer in self.layers
        )

    def with_noise(self, noise_multiplier: float) -> Stack:
        """This stack with noise in every layer that waits for it."""
        layers = [
            layer.with_noise(noise_multiplier)
            if isinstance(layer, Calibrated) and layer.noise_multiplier is None
            else layer
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    def without_seeds(self) -> Stack:
        """This stack with real noise in every layer."""
        layers = [
            layer.without_seed() if isinstance(layer, Seeded) else layer for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))

    @cached_property
    def personal(self) -> tuple[Any, ...]:
        """The layers under which every node has a model of its own."""
        return tuple(layer for layer in self.layers if isinstance(layer, Personal))

    @cached_property
    def twice(self) -> tuple[Any, ...]:
        """The layers for which a node trains a second model."""
        return tuple(layer for layer in self.layers if isinstance(layer, TrainsTwice))

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The trainings of a node's round, in turn; none where it is one."""
        found = [layer for layer in self.layers if isinstance(layer, TrainsInPhases)]
        if len(found) > 1:
            raise StackError(
                f"{found[0].name} and {found[1].name} both say what nodes train in turn; take one "
                "of them"
            )
        return tuple(found[0].phases()) if found else ()

    @cached_property
    def tuned(self) -> tuple[Any, ...]:
        """The layers under which nodes train the common model a little more for themselves."""
        return tuple(layer for layer in self.layers if isinstance(layer, TunesOwn))

    @cached_property
    def model_size(self) -> int:
        """Coordinates of the one model that a layer is made for; 0 where any model will do."""
        found = (layer.model_size for layer in self.layers if isinstance(layer, Sized))
        return next(found, 0)

    @cached_property
    def keeps_parts(self) -> bool:
        """Whether parts of the model stay on the nodes, so that the server has no whole one."""
        return any(isinstance(layer, Sized) and layer.keeps_parts for layer in self.layers)

    def starts(self, model: Tensor, told: NodeContext, state: RecordDict) -> Tensor:
        """Node: where training begins; `model` itself where no layer is personal."""
        for layer in self.personal:
            model = layer.starts(model, own_context(told, layer.name, state))
        return model

    def own(self, model: Tensor, told: NodeContext, state: RecordDict) -> Tensor:
        """Node: the model that it uses; `model` itself where no layer is personal."""
        for layer in self.personal:
            model = layer.own(model, own_context(told, layer.name, state))
        return model

    def encode(
        self,
        update: Tensor,
        config: Mapping[str, Any],
        memory: RecordDict,
        measured: Metrics | None = None,
        told: NodeContext | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The node's half of all layers: update to what is sent, and the metrics beside it.

        Args:
            update: of shape (size,).
            config: the scalars of the broadcast.
            memory: the node's own records, of which each layer reaches its own.
            measured: what the node found in training; under a private stack only layers see it.
            told: of the round and of the training; its `sent` has all tensors of the broadcast.
        """
        metrics: dict[str, float] = {}
        told = replace(told or NodeContext(), config=config, metrics=measured or {})
        for layer, sees in zip(self.layers, self._sees, strict=True):
            ctx = own_context(told, layer.name, memory, sees=sees)
            update = layer.encode(update, ctx)
            metrics |= {f"{layer.name}.{name}": value for name, value in ctx.reports.items()}
        bound = config.get(f"{self.collect.name}.bound")
        if bound is not None and not is_within(update, float(bound) * (1 + LENIENCE)):
            raise RunError(
                f"this node's layers {self} made an update longer than the {bound:g} that they "
                "promise, which nobody could see in a sum; let each layer's check say the bound "
                "that its encode keeps"
            )
        return update, {} if self.private else {**(measured or {}), **metrics}

    @property
    def many(self) -> bool:
        """Whether `encode_many` applies: every layer can, and the server may add up in between."""
        return (
            takes_sums(self.collect)
            and not self.objectives
            and not self.packs
            and all(
                isinstance(layer, EncodesMany) or not acts_on_updates(layer)
                for layer in self.layers
            )
        )

    def encode_many(self, bundle: Bundle, config: Mapping[str, Any]) -> Bundle | None:
        """The node's half for several nodes at once; None where a layer cannot do that."""
        for layer in self.layers:
            if isinstance(layer, EncodesMany):
                bundle = layer.encode_many(bundle, _under(config, f"{layer.name}."))
            elif acts_on_updates(layer):
                return None
        return bundle

    def decode(
        self, sum_: Aggregate, states: States, rnd: RoundContext, facts: Facts | None = None
    ) -> tuple[Tensor | None, States, dict[str, float]]:
        """The server's half, in reverse: the average update, or None where there is none.

        With `facts` of an update before the stack, every layer is told those of its own place.
        Under a private stack no layer learns how many nodes came, which no noise covers.
        """
        metrics = {} if self.private else dict(sum_.metrics)
        rnd = replace(rnd, denominator=sum_.denominator, metrics=dict(metrics))
        if self.private:
            rnd = replace(rnd, replies=round(rnd.cohort), weight=rnd.cohort)
        places: Sequence[Facts | None] = [None] * len(states)
        if facts is not None:
            places = self.places(facts, states)
        total: Tensor = sum_.total
        after = list(states)
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            here = replace(rnd, entering=places[i], reports={})
            total, after[i] = layer.decode(total, states[i], here)
            metrics |= {f"{layer.name}.{name}": value for name, value in here.reports.items()}
        average = total / sum_.denominator if sum_.denominator > 0 else None
        return average, tuple(after), metrics

    def claims(self, facts: Facts) -> list[Claim]:
        """What one round costs, on the facts at the bottom of the stack.

        Raises:
            StackError: the collect does not hold what a claim is made on, or a layer claims
                something in a stack that is not private.
        """
        claims: list[Claim] = []
        for layer in reversed(self.layers):
            claim = layer.claim(facts)
            if claim is None:
                continue
            if not self.private:
                raise StackError(
                    f"{layer.name} claims privacy on some facts only, and nothing was planned for "
                    "that; let its claim depend on the layer alone"
                )
            if acts_on_sums(layer) or claim.seen_in_sum_only:
                need_sum(facts, layer.name)
            claims.append(claim)
        return claims


def own_context(
    told: NodeContext, name: str, state: RecordDict, *, sees: bool = False
) -> NodeContext:
    """One layer's part of what a node was told."""
    prefix = f"{name}."
    return replace(
        told,
        config=_under(told.config, prefix),
        sent=_under(told.sent, prefix) if told.sent else told.sent,
        memory=Memory(state, name),
        metrics=told.metrics if sees else {},
        reports={},
    )


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def need_sum(facts: Facts, name: str) -> None:
    """Raises StackError where one update's influence on the result is not what noise is for."""
    if facts.kind != "sum":
        made = "a choice among the updates" if facts.kind == "each" else "a result of no known kind"
        raise StackError(
            f"{name} hides one update in a sum, but the collect makes {made}; take "
            "PlainSum(weighting='fixed') or SecureSum(weighting='fixed')"
        )
    if facts.weight_bound is None or facts.weight_bound > 1 or not facts.public_denominator:
        raise StackError(
            f"{name} needs every update to count once and a denominator that does not depend on "
            "who came; use PlainSum(weighting='fixed')"
        )
