"""What a layer is told when its halves are called, and what it may keep.

    node     NodeContext    this layer's part of the broadcast, its own memory, what was measured
    server   RoundContext   the public facts of the round

Both have `report`, for numbers that stand beside the round's metrics as `"{layer}.{name}"`. A
layer's memory is its own: it cannot reach that of others, nor what else its node keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from umbel.core.contents import find_record
from umbel.core.errors import RunError
from umbel.core.records import from_array, to_array
from umbel.strategies.facts import Facts

Config = Mapping[str, bool | int | float | str | bytes]
"""What a layer tells the nodes: a flat record of scalars."""

Metrics = Mapping[str, float]
"""Names to numbers; a layer's own are called `"{layer}.{what}"` by the stack."""

MEMORY = "umbel.layer."
"""How the names of the records begin in which a node keeps what layers remember."""

SENT = "sent."
"""How the names of tensors begin that layers send along with the model."""


@dataclass(frozen=True)
class Broadcast:
    """What a layer sends to every node of a round, beside the model.

    Attributes:
        scalars: by name.
        vectors: tensors by name; each costs its bytes for every node of the round.
    """

    scalars: Config = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)


class Memory(MutableMapping[str, Tensor]):
    """What one layer keeps on one node between rounds: tensors by name.

    It is written at once into the node's own records, which last over rounds, are part of
    checkpoints, and go back with them.

    Args:
        state: the node's records.
        layer: whose memory it is.
    """

    def __init__(self, state: RecordDict, layer: str) -> None:
        self._state, self._name = state, MEMORY + layer

    def _record(self) -> ArrayRecord:
        return find_record(self._state, self._name, ArrayRecord) or ArrayRecord()

    def __getitem__(self, name: str) -> Tensor:
        return from_array(self._record()[name]).clone()

    def __setitem__(self, name: str, value: Tensor) -> None:
        record = self._record()
        record[name] = to_array(value)
        self._state[self._name] = record

    def __delitem__(self, name: str) -> None:
        record = self._record()
        del record[name]
        self._state[self._name] = record

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._record()))

    def __len__(self) -> int:
        return len(self._record())

    def vector(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like`: the one that is kept, or zeros where there is none.

        Raises:
            RunError: what is kept has another shape, so it is of another model.
        """
        if name not in self:
            return torch.zeros_like(like)
        found = self[name].to(like.dtype)
        if found.shape != like.shape:
            raise RunError(
                f"this node remembers {name} of {found.numel()} coordinates, and the model has "
                f"{like.numel()}; it is of another model, so begin a run of its own, or remove the "
                "node's state"
            )
        return found


@dataclass(frozen=True)
class NodeContext:
    """What a layer's node half is told.

    Attributes:
        config: this layer's own scalars of the broadcast; `bound` is that of the updates that
            enter it, where they have one.
        sent: this layer's own tensors of the broadcast; they are not to be written to.
        memory: this layer's own on this node.
        metrics: what the node measured in training, for a layer that says `needs = {"metrics"}`.
        round: from 1; 0 outside of rounds.
        seed: of the node's work in this round, the same on every engine; for choices that need
            not be secret.
        steps: how many steps the node's local optimiser made; 0 before training, and where the
            trainer does not say.
        learning_rate: of the node's optimiser in this round; 0 where the app leaves it to the
            trainer.
        start_loss: of the model that was sent, on the node's training examples, for a layer that
            says `needs = {"start-loss"}`.
        reports: what `report` was told.
    """

    config: Config = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    memory: MutableMapping[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    round: int = 0
    seed: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    start_loss: float | None = None
    reports: dict[str, float] = field(default_factory=dict)

    def report(self, name: str, value: float) -> None:
        """Say a number beside the update; under a private stack it stays on the node."""
        self.reports[name] = float(value)

    def recall(self, name: str, like: Tensor) -> Tensor:
        """What the node remembers under a name, in the shape of `like`; zeros where nothing is.

        Raises:
            RunError: it is of another model.
        """
        if isinstance(self.memory, Memory):
            return self.memory.vector(name, like)
        return self.memory[name] if name in self.memory else torch.zeros_like(like)


@dataclass(frozen=True)
class RoundContext:
    """The public facts of the round that is being decoded.

    Attributes:
        number: from 1.
        cohort: the expected number of nodes, the public denominator of a private average.
        replies: how many updates the sum is made of. Under a private stack the exact number is
            nobody's to know: layers are told the expected one.
        weight: the sum of the updates' weights; under a private stack likewise.
        facts: at the bottom of the stack.
        generator: seeded by the run; for choices that need not be secret.
        entering: the facts as an update enters the layer that is being decoded.
        denominator: what the stack will divide the decoded sum by; 0 where nothing arrived.
        learning_rate: of the nodes in this round; 0 where the app leaves it to the trainer.
        metrics: means of what the nodes measured; none under a private stack.
        reports: what `report` was told.
    """

    number: int
    cohort: float
    replies: int
    weight: float
    facts: Facts
    generator: torch.Generator
    entering: Facts | None = None
    denominator: float = 0.0
    learning_rate: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    reports: dict[str, float] = field(default_factory=dict)

    def report(self, name: str, value: float) -> None:
        """Say a number for the round's metrics."""
        self.reports[name] = float(value)

    @property
    def entered(self) -> Facts:
        """The facts as an update enters the layer."""
        assert self.entering is not None  # a stack always tells them
        return self.entering
