"""Parts of the model that stay on the nodes: FedPer and FedBN.

    node             the model that was sent, with the node's own parts in their places
    node -> server   the update of the other parts; the server never sees the personal ones
    server           fills their places with zeros: its own model keeps its first values there

    FedPer   the parts that the option personal-layers names, such as the head
             (Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818)
    FedBN    the weights and biases of batch normalisation
             (Li et al. 2021, https://arxiv.org/abs/2102.07623)

The update is shorter: noise, masks and traffic are for the common parts alone. The server's model
is no whole one, so only the nodes' own tests judge. A node that is new or lost its memory begins
with the first values of the personal parts.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from umbel.core.errors import ConfigError, StackError
from umbel.strategies.contexts import NodeContext, RoundContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.needs import need_whole
from umbel.strategies.objective import Places
from umbel.strategies.transform import Stateless

STATISTICS = ".running_mean"
"""How the buffers end that layers of batch normalisation have."""


@dataclass(frozen=True)
class PersonalParts(Stateless):
    """Keeps some coordinates of the model on the nodes.

    Args:
        parts: the personal ones.
        model_size: coordinates of the model.

    Raises:
        StackError: no part, all of the model, or parts that are not in order.
    """

    parts: Places
    model_size: int
    name: str = "fedper"
    keeps_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ends = [end for part in self.parts for end in part]
        if not ends or ends != sorted(ends) or not 0 <= ends[0] <= ends[-1] <= self.model_size:
            raise StackError(
                f"the personal parts {self.parts} are no places in order in a model of "
                f"{self.model_size} parameters"
            )
        if self._count == self.model_size:
            raise StackError("all of the model is personal, so nothing is learned together")

    @property
    def _count(self) -> int:
        return sum(end - start for start, end in self.parts)

    def _personal(self) -> Tensor:
        mask = torch.zeros(self.model_size, dtype=torch.bool)
        for start, end in self.parts:
            mask[start:end] = True
        return mask

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        need_whole(facts, self.name)
        if facts.size != self.model_size:
            raise StackError(
                f"{self.name} was made for a model of {self.model_size} parameters, and this one "
                f"has {facts.size}"
            )
        return facts.replace(size=facts.size - self._count)

    def starts(self, model: Tensor, ctx: NodeContext) -> Tensor:
        mask, start = self._personal(), model.clone()
        start[mask] = ctx.recall("own", model[mask]) if "own" in ctx.memory else model[mask]
        ctx.memory["own"] = start[mask]
        return start

    def own(self, model: Tensor, ctx: NodeContext) -> Tensor:
        mask, own = self._personal(), model.clone()
        if "own" in ctx.memory:
            own[mask] = ctx.recall("own", model[mask])
        return own

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        mask = self._personal()
        ctx.memory["own"] = ctx.recall("own", update[mask]) + update[mask]
        return update[~mask]

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:  # noqa: ARG002
        whole = total.new_zeros(self.model_size)
        whole[~self._personal()] = total
        return whole, state


def named_parts(sizes: Mapping[str, int], patterns: str, method: str = "fedper") -> Places:
    """The places of the parameters whose names match patterns such as `head.*,bias`.

    Args:
        sizes: coordinates of each parameter, in the model's order.
        patterns: of names, with commas between them.
        method: that wants them, for what is said.

    Raises:
        ConfigError: none is given, or one matches nothing.
    """
    given = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not given:
        raise ConfigError(
            f"method={method} keeps parts of the model on the nodes, and personal-layers does not "
            f"say which; name parameters, such as personal-layers='{list(sizes)[-1]}'"
        )
    for pattern in given:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in sizes):
            raise ConfigError(
                f"personal-layers has {pattern!r}, which is no parameter of the model; those are "
                f"{', '.join(sizes)}"
            )
    return _places(sizes, {n for n in sizes for p in given if fnmatch.fnmatchcase(n, p)})


def normalisation_parts(sizes: Mapping[str, int], buffers: Mapping[str, Tensor]) -> Places:
    """The places of the weights and biases of batch normalisation.

    Raises:
        ConfigError: the model has none.
    """
    layers = [name.removesuffix(STATISTICS) for name in buffers if name.endswith(STATISTICS)]
    found = {f"{layer}.{what}" for layer in layers for what in ("weight", "bias")} & sizes.keys()
    if not found:
        raise ConfigError(
            "method=fedbn keeps batch normalisation on the nodes, and the model has none with "
            "weights; take method=fedper with personal-layers"
        )
    return _places(sizes, found)


def _places(sizes: Mapping[str, int], chosen: set[str]) -> Places:
    places, start = [], 0
    for name, size in sizes.items():
        if name in chosen:
            places.append((start, start + size))
        start += size
    return tuple(places)
