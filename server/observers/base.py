"""The interface of an observer, and what it is told of a round.

    begin(position)              a new run, before round 1
    resume(position, lines)      or one that goes on from its checkpoint
    round_done(done, position)   after each round, in the order of the loop's list
    stop(position)               before each round: a reason not to run it
    stopped(position)            the run ends before its last round
    end(position)                no round is left

What an observer keeps between rounds is in the position, so that checkpoints hold it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from umbel.server.checkpoint import Position
from umbel.server.drive import Phases
from umbel.server.evaluation import FederatedEvaluation
from umbel.server.roster import NodeRef
from umbel.strategies.aggregator import Aggregate


@dataclass
class RoundDone:
    """A round whose model is made; observers add what they find.

    Attributes:
        number: the round, from 1.
        phases: the clock of the round.
        cohort: the nodes that were asked.
        sum_: what was collected, without its vectors: those are in the model now.
        bytes_down: size of what was sent.
        used: the round changed the model.
        train: what the stack says of the round.
        learning_rate: of the nodes; None leaves it to them.
        epsilon: spent so far; None without privacy.
        told: what the engine itself says, for the run's lines.
        metrics: of the central evaluation, where this round had one.
        federated: the nodes' own evaluation, likewise.
        line: what is written down of the round, once it is.
    """

    number: int
    phases: Phases
    cohort: Sequence[NodeRef]
    sum_: Aggregate
    bytes_down: int
    used: bool
    train: Mapping[str, float]
    learning_rate: float | None
    epsilon: float | None
    told: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    federated: FederatedEvaluation | None = None
    line: Mapping[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Sees the events of a run; the position that it returns is the one that goes on."""

    def begin(self, position: Position) -> Position:
        """A new run is about to begin."""
        ...

    def resume(self, position: Position, lines: Sequence[Mapping[str, Any]]) -> Position:
        """A run goes on from a checkpoint; `lines` are those of its rounds so far."""
        ...

    def round_done(self, done: RoundDone, position: Position) -> Position:
        """A round has ended."""
        ...

    def stop(self, position: Position) -> str | None:
        """Why no further round must be run; None is no reason."""
        ...

    def stopped(self, position: Position) -> None:
        """The run ends before the last round that was planned."""
        ...

    def end(self, position: Position) -> None:
        """The run ends, whenever it does."""
        ...


class Watcher:
    """An observer to which nothing matters; others override what does."""

    def begin(self, position: Position) -> Position:
        return position

    def resume(
        self,
        position: Position,
        lines: Sequence[Mapping[str, Any]],  # noqa: ARG002
    ) -> Position:
        return position

    def round_done(self, done: RoundDone, position: Position) -> Position:  # noqa: ARG002
        return position

    def stop(self, position: Position) -> str | None:  # noqa: ARG002
        return None

    def stopped(self, position: Position) -> None: ...

    def end(self, position: Position) -> None: ...
