"""What one reply of a node costs the node itself: what its own ledger is charged.

    layer or trainer   says it of what it is about to send           -> Release
    node's ledger      weighs it against what was promised, writes it down, or refuses
    node               signs what the ledger then holds               -> `statement.py`

Noise that the coordinator adds costs a node nothing here: it is a promise of the coordinator,
kept in the coordinator's ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # importing it takes a second, which a run without privacy need not wait
    from umbel.privacy.budget.events import Charge
    from umbel.strategies.transform import Config

Unit = Literal["record", "node"]


@dataclass(frozen=True)
class Promise:
    """What the run's options promise for the whole run.

    Attributes:
        epsilon: None where they name no finite budget.
        delta: of it.
        rounds: planned.
    """

    epsilon: float | None
    delta: float
    rounds: int


@dataclass(frozen=True)
class Release:
    """A release by a node, before it happens.

    Attributes:
        unit: whose presence its noise hides: one `record` of the node, or the `node`.
        mechanism: e.g. `dp-sgd`, `local-gaussian`.
        charge: one release of the kind.
        count: so many of them in this reply.
        planned: so many in the whole run, if the node takes part in every round.
        promised: epsilon that the run promises for all of them; None where it promises only
            what the planned ones cost; infinity where it says that nothing is private.
        delta: of that promise.
        noise_multiplier: standard deviation of the noise over the norm.
        norm: the longest contribution of one unit.
        sampling_rate: of each unit in each release.
    """

    unit: Unit
    mechanism: str
    charge: Charge
    count: int
    planned: int
    promised: float | None
    delta: float
    noise_multiplier: float
    norm: float
    sampling_rate: float = 1.0


@runtime_checkable
class ChargesNode(Protocol):
    """A layer whose node half adds noise that hides the node."""

    def released(self, config: Config, size: int, promise: Promise) -> Release:
        """Node: what sending the encoded vector of `size` coordinates costs this node.

        `config` is the layer's own part of what the node was told.
        """
        ...
