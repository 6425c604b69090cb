"""A stack: a flat list of layers over one collect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict
from torch import Tensor

from umbel.strategies.collect import Collect, PlainSum, Sum
from umbel.strategies.errors import StackError
from umbel.strategies.layer import (
    Claim,
    EncodesMany,
    Facts,
    Layer,
    Metrics,
    Round,
    SeesMetrics,
    Stateless,
    TellsFacts,
)

if TYPE_CHECKING:
    from umbel.privacy.bounds.bundle import Bundle

States = tuple[Any, ...]
"""One state a layer, in the stack's order."""


@dataclass(frozen=True)
class Stack:
    """Layers in the order in which an update passes them on its node, over one collect.

    >>> print(Stack())
    plain-sum

    Raises:
        StackError: two layers have one name.
    """

    layers: Sequence[Layer[Any]] = ()
    collect: Collect = field(default_factory=PlainSum)

    def __post_init__(self) -> None:
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
        """The facts at the bottom of the stack; raises StackError where layers do not fit."""
        for layer, state in zip(self.layers, states, strict=True):
            facts = layer.check(facts, state)
        return self.collect.check(facts)

    def publish(self, states: States, facts: Facts | None = None) -> dict[str, Any]:
        """What every node must know this round, as `"{layer}.{key}"`.

        With `facts` of an update before the stack, every layer that receives bounded updates is
        told their bound as `bound`, so that a norm is written down once.
        """
        config: dict[str, Any] = {}
        for layer, state in zip(self.layers, states, strict=True):
            for key, value in layer.publish(state).items():
                config[f"{layer.name}.{key}"] = value
            if facts is not None:
                if facts.l2_bound is not None:
                    config[f"{layer.name}.bound"] = facts.l2_bound
                if isinstance(layer, TellsFacts):
                    for key, value in layer.tell(facts, state).items():
                        config[f"{layer.name}.{key}"] = value
                facts = layer.check(facts, state)
        return config

    @cached_property
    def _attach(self) -> list[Callable[[Tensor, Metrics, Mapping[str, Any]], Tensor] | None]:
        # Kept: to ask whether a layer has a protocol's methods takes longer than its work.
        return [layer.attach if isinstance(layer, SeesMetrics) else None for layer in self.layers]

    @property
    def private(self) -> bool:
        """Whether a layer makes a privacy claim; nothing may then leave a node beside it."""
        return any(getattr(layer, "private", False) for layer in self.layers)

    def encode(
        self,
        update: Tensor,
        config: Mapping[str, Any],
        memory: RecordDict,
        measured: Metrics | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The node's half of all layers: update to what is sent, and the metrics beside it.

        `measured` is what the node found in training; under a private stack only layers see it.
        """
        metrics: dict[str, float] = {}
        for layer, attach in zip(self.layers, self._attach, strict=True):
            prefix = f"{layer.name}."
            own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
            if attach is not None:
                update = attach(update, measured or {}, own)
            update, said = layer.encode(update, own, memory)
            metrics |= {prefix + name: value for name, value in said.items()}
        return update, {} if self.private else {**(measured or {}), **metrics}

    @property
    def many(self) -> bool:
        """Whether `encode_many` applies: every layer can, and the server may add up in between."""
        return isinstance(self.collect, PlainSum) and all(
            isinstance(layer, EncodesMany) or _sends_as_is(layer) for layer in self.layers
        )

    def encode_many(self, bundle: Bundle, config: Mapping[str, Any]) -> Bundle | None:
        """The node's half for several nodes at once; None where a layer cannot do that."""
        for layer in self.layers:
            prefix = f"{layer.name}."
            own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
            if isinstance(layer, EncodesMany):
                bundle = layer.encode_many(bundle, own)
            elif not _sends_as_is(layer):
                return None
        return bundle

    def decode(
        self, sum_: Sum, states: States, rnd: Round, facts: Facts | None = None
    ) -> tuple[Tensor | None, States, dict[str, float]]:
        """The server's half, in reverse: the average update, or None where there is none.

        With `facts` of an update before the stack, every layer is told those of its own place.
        """
        places: list[Facts | None] = []
        for layer, state in zip(self.layers, states, strict=True):
            places.append(facts)
            facts = layer.check(facts, state) if facts is not None else None
        total: Tensor = sum_.total
        metrics = {} if self.private else dict(sum_.metrics)
        after = list(states)
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            here = replace(rnd, entering=places[i])
            total, after[i], said = layer.decode(total, metrics, states[i], here)
            metrics |= {f"{layer.name}.{name}": value for name, value in said.items()}
        average = total / sum_.denominator if sum_.denominator > 0 else None
        return average, tuple(after), metrics

    def claims(self, facts: Facts) -> list[Claim]:
        """What one round costs, on the facts at the bottom of the stack."""
        claims = (layer.claim(facts) for layer in reversed(self.layers))
        return [claim for claim in claims if claim is not None]


def _sends_as_is(layer: Layer[Any]) -> bool:
    """Whether a layer's node half does nothing."""
    encode: Any = type(layer).encode
    return encode is Stateless.encode and not isinstance(layer, SeesMetrics)
