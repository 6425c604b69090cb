"""A node's own ledger: what its data have paid for what has left it, whoever asked.

    before a reply leaves   charge: weighed against the limits, written down, on disk
    the same message again  the same stored bytes, or nothing; never fresh noise
    another run, another coordinator, another population
                            counts on, because the data are the same

Two kinds keep it. `umbel.clients.ledger.file` is a file in the node's state folder, outside of
everything that an app, a run or a coordinator can take back. `StateLedger` here lives in
Flower's `Context.state`: for virtual nodes, which are new people in every run, and for Flower's
SuperNodes that were given no folder, where it lasts as long as the run.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from dp_accounting import NoOpDpEvent
from flwr.app import ConfigRecord, RecordDict

from umbel.core.contents import find_record
from umbel.core.errors import RunError
from umbel.privacy.budget.accounting import COARSE, spent
from umbel.privacy.budget.events import (
    RELATIONS,
    ZERO_OUT,
    Charge,
    from_json,
    relation_name,
    to_json,
)
from umbel.strategies.release import Release, Unit
from umbel.strategies.statement import Signed

Charges = Counter[Charge]

UNPROTECTED = "none"
"""The mechanism of a reply that is counted only because its owner limits participations."""

_WHOM: Mapping[Unit, str] = {"record": "this node's records", "node": "this node"}
_SAME = 1 + 1e-9
"""A budget is met, not exceeded, by a sum that differs from it in its last bits."""


@dataclass(frozen=True)
class Limits:
    """What a node's owner allows, over all runs, coordinators and populations.

    Attributes:
        participations: replies to requests to train, protected or not; None is any number.
        epsilon: of the node as a whole (noise on the node, shares of noise of a secure sum);
            None leaves it to what was promised first, infinity is no limit over all runs.
        record_epsilon: likewise of each of its records (DP-SGD).
    """

    participations: int | None = None
    epsilon: float | None = None
    record_epsilon: float | None = None

    def of(self, unit: Unit) -> float | None:
        """The largest epsilon of a unit."""
        return self.record_epsilon if unit == "record" else self.epsilon


@dataclass(frozen=True)
class Receipt:
    """What a ledger holds once a release was charged; the fields are those of a statement.

    Attributes:
        release: what was charged.
        epsilon: spent in all; infinity is without bound.
        run_epsilon: of that, by this run.
        limit: infinity is none.
        delta: of all three.
        relation: of epsilon.
        participations: replies charged so far.
    """

    release: Release
    epsilon: float
    run_epsilon: float
    limit: float
    delta: float
    relation: str
    participations: int


class Account(Protocol):
    """A ledger, opened for one message."""

    def charge(self, release: Release) -> Receipt:
        """Write a release down. When this returns it is on disk, and may leave.

        Raises:
            RunError: it would exceed a limit, or could not be written; then nothing may leave.
        """
        ...

    def hold(self, ticket: bytes, releases: Sequence[Release]) -> list[Receipt]:
        """Write down releases that leave only if a session comes to that: see `settle`.

        Raises:
            RunError: as `charge`.
        """
        ...

    def settle(self, ticket: bytes) -> None:
        """Charge what was held for a session, because it leaves now; twice is once.

        Raises:
            RunError: as `charge`.
        """
        ...

    def chain(self, unit: Unit, make: Callable[[str], Signed]) -> Signed:
        """Make the next statement about a unit, from the digest of the one before, or ''."""
        ...


# ── arithmetic that both kinds share ──────────────────────────────────────────────────────────


def total(charges: Mapping[Charge, int], delta: float) -> tuple[float, str]:
    """Epsilon of releases of one unit at `delta`, and the relation that it holds for.

    Releases whose relations no accountant takes together (noise of each node's own, and shares of
    a sum's noise) each get a part of delta, and their epsilons add up (basic composition). Their
    common relation is then the weaker one: that a unit's data are replaced by nothing.
    """
    return _total(frozenset(charges.items()), delta)


@lru_cache(maxsize=1024)
def _total(charges: frozenset[tuple[Charge, int]], delta: float) -> tuple[float, str]:
    by_relation: dict[str, dict[Charge, int]] = {}
    for charge, count in charges:
        if isinstance(charge.event, NoOpDpEvent):
            continue
        by_relation.setdefault(relation_name(charge.relation), {})[charge] = count
    if not by_relation:
        return 0.0, relation_name(ZERO_OUT)
    share = delta / len(by_relation)
    parts = [spent(part, share, interval=COARSE) for part in by_relation.values()]
    relation = parts[0].relation if len(parts) == 1 else ZERO_OUT
    return math.fsum(part.epsilon for part in parts), relation_name(relation)


def promised(release: Release) -> float:
    """The epsilon that a run promises at its first message; infinity is none."""
    if release.promised is not None:
        return release.promised
    planned = max(release.planned, release.count)
    return total({release.charge: planned}, release.delta)[0]


def refuse_beyond(epsilon: float, limit: float, unit: Unit, whose: str) -> None:
    """Raises RunError where a release would bring a unit beyond a limit."""
    if epsilon > limit * _SAME:
        raise RunError(
            f"the budget of {_WHOM[unit]} is epsilon {limit:.4g} ({whose}), and another reply "
            f"would bring it to {epsilon:.4g}; the node takes no further part"
        )


def refuse_more(participations: int, limit: int | None) -> None:
    """Raises RunError where a reply would be one too many."""
    if limit is not None and participations > limit:
        raise RunError(
            f"the policy of this node allows {limit} participations, and this would be number "
            f"{participations}; the node takes no further part"
        )


def attendance() -> Release:
    """What a reply costs that nothing protects: it counts, and no epsilon says how much."""
    return Release(
        unit="node",
        mechanism=UNPROTECTED,
        charge=Charge(NoOpDpEvent()),
        count=1,
        planned=1,
        promised=math.inf,
        delta=0.5,
        noise_multiplier=0.0,
        norm=0.0,
    )


@lru_cache(maxsize=1024)
def written(charge: Charge) -> tuple[str, str, float]:
    """A charge as text, relation and slack."""
    event = json.dumps(to_json(charge.event), sort_keys=True, separators=(",", ":"))
    return event, relation_name(charge.relation), charge.slack


def charges(rows: Iterable[tuple[str, str, float, int]]) -> Charges:
    """What `written` has written, and how often.

    Raises:
        ValueError: it is no charge.
    """
    counts: Charges = Counter()
    for event, relation, slack, count in rows:
        counts[_charge(event, relation, slack)] += count
    return counts


@lru_cache(maxsize=1024)
def _charge(event: str, relation: str, slack: float) -> Charge:
    if relation not in RELATIONS:
        raise ValueError(f"{relation!r} is not a relation of a ledger")
    return Charge(from_json(json.loads(event)), RELATIONS[relation], slack)


# ── the ledger of a node without a folder ─────────────────────────────────────────────────────


@dataclass(frozen=True)
class StateLedger:
    """The ledger of one run, in the node's own records.

    It goes back with them where a run is resumed from its checkpoint, so a resumed run is what
    one without a pause would have been. A run's budget is what its options say.

    Args:
        memory: of the node.
    """

    memory: RecordDict

    RECORD = "umbel.node-ledger"

    def charge(self, release: Release) -> Receipt:
        kept = self._kept()
        receipt = self._weigh(kept, release)
        _count(_of(kept, release.unit), written(release.charge), release.count)
        self._keep(kept)
        return receipt

    def hold(self, ticket: bytes, releases: Sequence[Release]) -> list[Receipt]:
        kept = self._kept()
        receipts = [self._weigh(kept, release) for release in releases]
        rows = [[each.unit, written(each.charge), each.count] for each in releases]
        kept["held"] = {ticket.hex(): rows}
        self._keep(kept)
        return receipts

    def settle(self, ticket: bytes) -> None:
        kept = self._kept()
        for unit, charge, count in kept.pop("held", {}).get(ticket.hex(), []):
            _count(_of(kept, unit), charge, count)
        self._keep(kept)

    def chain(self, unit: Unit, make: Callable[[str], Signed]) -> Signed:
        kept = self._kept()
        about = _of(kept, unit)
        signed = make(about["previous"])
        about["previous"] = signed.digest
        self._keep(kept)
        return signed

    def spent(self, unit: Unit) -> Charges:
        """Everything that was charged."""
        return charges(_of(self._kept(), unit)["charges"])

    def participations(self, unit: Unit) -> int:
        """Replies that were charged."""
        return int(_of(self._kept(), unit)["participations"])

    def _weigh(self, kept: dict[str, Any], release: Release) -> Receipt:
        unit, delta = release.unit, release.delta
        about = _of(kept, unit)
        after = charges(about["charges"]) + Counter({release.charge: release.count})
        limit = math.inf if release.promised is None else release.promised
        epsilon, relation = total(after, delta)
        refuse_beyond(epsilon, limit, unit, "what the run promises")
        number = about["participations"] + 1
        return Receipt(release, epsilon, epsilon, limit, delta, relation, number)

    def _kept(self) -> dict[str, Any]:
        record = find_record(self.memory, self.RECORD, ConfigRecord)
        kept: dict[str, Any] = {} if record is None else json.loads(str(record["kept"]))
        return kept

    def _keep(self, kept: Mapping[str, Any]) -> None:
        self.memory[self.RECORD] = ConfigRecord({"kept": json.dumps(kept)})


def _of(kept: dict[str, Any], unit: Unit) -> dict[str, Any]:
    empty = {"charges": [], "participations": 0, "previous": ""}
    found: dict[str, Any] = kept.setdefault(unit, empty)
    return found


def _count(about: dict[str, Any], charge: Sequence[Any], count: int) -> None:
    """One reply more, of that charge."""
    about["participations"] += 1
    for row in about["charges"]:
        if row[:3] == list(charge):
            row[3] += count
            return
    about["charges"].append([*charge, count])
