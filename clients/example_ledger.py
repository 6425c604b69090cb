"""A node's own ledger of example-level privacy, kept in the node's memory between rounds.

It protects one record of the node against everybody who sees what the node sends, the server
included. It is never added to the coordinator's ledger, which hides whole nodes.
"""

import functools
from collections import Counter
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from umbel.privacy.budget.accounting import COARSE, poisson, spent
from umbel.privacy.budget.calibrate import noise_multiplier
from umbel.privacy.budget.events import Charge
from umbel.strategies.contents import find_record

RECORD = "umbel.example-ledger"


@dataclass(frozen=True)
class Steps:
    """Steps of DP-SGD under one noise and one sampling rate."""

    noise_multiplier: float
    sampling_rate: float
    count: int


@dataclass(frozen=True)
class ExampleLedger:
    """What a node's records have paid so far."""

    entries: tuple[Steps, ...] = ()

    @classmethod
    def read(cls, memory: RecordDict) -> "ExampleLedger":
        """The ledger in a node's memory; an empty one where there is none."""
        record = find_record(memory, RECORD, ConfigRecord)
        if record is None:
            return cls()
        columns = (record["noise-multiplier"], record["sampling-rate"], record["steps"])
        return cls(tuple(Steps(*row) for row in zip(*columns, strict=True)))  # type: ignore[arg-type]

    def write(self, memory: RecordDict) -> None:
        """Put the ledger into a node's memory."""
        memory[RECORD] = ConfigRecord(
            {
                "noise-multiplier": [entry.noise_multiplier for entry in self.entries],
                "sampling-rate": [entry.sampling_rate for entry in self.entries],
                "steps": [entry.count for entry in self.entries],
            }
        )

    def plus(self, more: Steps) -> "ExampleLedger":
        """The ledger after more steps."""
        counts: Counter[tuple[float, float]] = Counter()
        for entry in (*self.entries, more):
            counts[entry.noise_multiplier, entry.sampling_rate] += entry.count
        return ExampleLedger(tuple(Steps(*key, count) for key, count in counts.items()))

    def epsilon(self, delta: float) -> float:
        """Spent so far."""
        return _epsilon(self.entries, delta)


@functools.lru_cache(maxsize=256)
def _epsilon(entries: tuple[Steps, ...], delta: float) -> float:
    if not entries:
        return 0.0
    charges = {
        Charge(poisson(entry.noise_multiplier, entry.sampling_rate)): entry.count
        for entry in entries
    }
    return spent(charges, delta, interval=COARSE).epsilon


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The noise multiplier under which `steps` steps stay within a node's budget."""
    return noise_multiplier(epsilon * (1 - 1e-3), delta, sampling_rate, steps)
