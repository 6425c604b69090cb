"""The ledger of a real node, with the limits that it is kept to. See `ledger_database.py`."""

import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from umbel.clients.ledger.database import Asked, LedgerDatabase, insert, last_charge, settle
from umbel.clients.ledger.node_ledger import (
    UNPROTECTED,
    Charges,
    Limits,
    Receipt,
    charges,
    promised,
    refuse_beyond,
    refuse_more,
    total,
    written,
)
from umbel.core.errors import ConfigError, RunError
from umbel.strategies.release import Release, Unit
from umbel.strategies.statement import Signed
from umbel.transport.keyfiles import write_secret

REPLIES = "replies"
KEPT_REPLIES = 24
"""So many protected replies are kept for coordinators that ask again."""
KEPT_BYTES = 256 << 20
_SETTLED_S = 600.0
_NO_DELTA = 1e-5
"""Where nobody has promised anything; epsilon is then 0 or infinite."""


class GoneError(RunError):
    """A message that was answered before, whose reply is no longer kept."""


class LedgerFile(LedgerDatabase):
    """The ledger in a node's state folder; made on the first charge.

    Args:
        folder: the node's.
        limits: of the node's owner; where there is none, what was promised first is frozen.
    """

    def __init__(self, folder: Path, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        super().__init__(folder)
        self.limits = limits

    def account(self, asked: Asked) -> "FileAccount":
        """The ledger, opened for one message."""
        return FileAccount(self, asked)

    # ---- messages that come again

    def knows(self, message: str) -> bool:
        """Whether a message of that name was answered with a protected reply."""
        if not self.path.exists():
            return False
        with self.reading() as database:
            row = database.execute("SELECT 1 FROM answer WHERE message = ?", (message,))
            return row.fetchone() is not None

    def answered(self, message: str, digest: str) -> bytes | None:
        """The bytes that were kept as the answer to a message; None if it is a new one.

        Raises:
            GoneError: it was answered, and the answer is no longer there.
        """
        with self.reading() as database:
            row = database.execute(
                "SELECT file FROM answer WHERE message = ? AND digest = ?", (message, digest)
            ).fetchone()
        if row is None:
            return None
        try:
            return (self.folder / REPLIES / str(row[0])).read_bytes()
        except OSError:
            raise GoneError(
                "this node has answered this very message before and keeps its reply no longer; "
                "to answer again would be to draw new noise, so it does not"
            ) from None

    def keep(self, asked: Asked, digest: str, answer: bytes) -> bytes:
        """Keep a protected reply before it leaves; what to send: the first that was kept.

        Raises:
            RunError: it cannot be written; then it must not leave.
        """
        try:
            write_secret(self.folder / REPLIES / asked.reply, answer)
        except OSError as problem:
            raise RunError(
                f"a protected reply cannot be kept in {self.folder} ({problem}), so it is not "
                "sent; make room"
            ) from problem
        with self.writing() as database:
            database.execute(
                "INSERT OR IGNORE INTO answer (message, digest, file, size) VALUES (?, ?, ?, ?)",
                (asked.message, digest, asked.reply, len(answer)),
            )
            (first,) = database.execute(
                "SELECT file FROM answer WHERE message = ? AND digest = ?", (asked.message, digest)
            ).fetchone()
            latest = database.execute(
                "SELECT file, size FROM answer ORDER BY number DESC LIMIT ?", (KEPT_REPLIES,)
            ).fetchall()
        self._forget(latest)
        if first == asked.reply:
            return answer
        found = self.answered(asked.message, digest)  # another process was first
        assert found is not None
        return found

    def _forget(self, latest: Sequence[tuple[str, int]]) -> None:
        """Remove old replies; that they were given stays known."""
        kept, room = set(), KEPT_BYTES
        for at, (file, size) in enumerate(latest):
            room -= size
            if at == 0 or room >= 0:
                kept.add(file)
        now = time.time()
        for path in (self.folder / REPLIES).iterdir():
            # One that is new may be another process's, which has not written it down yet.
            if path.name not in kept and now - path.stat().st_mtime > _SETTLED_S:
                path.unlink(missing_ok=True)

    # ---- sums

    def budget(self) -> list[dict[str, Any]]:
        """For people: a line a population or data, and unit."""
        if not self.path.exists():
            return []
        found = []
        with self.reading() as database:
            for scope in ("population", "data"):
                rows = database.execute(
                    f"SELECT DISTINCT {scope}, unit FROM charge ORDER BY {scope}, unit"
                ).fetchall()
                for name, unit in rows:
                    sums = _Scope(scope, name, unit)
                    delta = sums.promise(database)[1]
                    limit, own = self._limit(database, sums), self.limits.of(unit)
                    epsilon, relation = total(sums.charges(database), delta)
                    last = database.execute(
                        f"SELECT run, coordinator, time FROM charge WHERE {scope} = ? AND unit = ?"
                        " ORDER BY number DESC LIMIT 1",
                        (name, unit),
                    ).fetchone()
                    found.append(
                        {
                            "scope": scope,
                            "name": name,
                            "unit": unit,
                            "participations": sums.participations(database),
                            "participations_limit": self.limits.participations,
                            "epsilon": epsilon if math.isfinite(epsilon) else None,
                            "epsilon_limit": limit if math.isfinite(limit) else None,
                            "limit_from": "first promise" if own is None else "policy",
                            "delta": delta,
                            "relation": relation,
                            "last_run": last[0],
                            "last_coordinator": last[1],
                            "last_time": last[2],
                        }
                    )
        return found

    def _limit(self, database: sqlite3.Connection, sums: "_Scope") -> float:
        own = self.limits.of(sums.unit)
        return sums.promise(database)[0] if own is None or sums.scope == "run" else own


@dataclass(frozen=True)
class _Scope:
    """What counts together.

    Attributes:
        scope: `run`, `population` or `data`.
        name: of it.
        unit: whose.
    """

    scope: str
    name: str
    unit: Unit

    def charges(self, database: sqlite3.Connection) -> Charges:
        """Everything charged so far."""
        rows = database.execute(
            "SELECT event, relation, slack, SUM(count) FROM charge"
            f" WHERE {self.scope} = ? AND unit = ? GROUP BY event, relation, slack",
            (self.name, self.unit),
        )
        try:
            return charges(rows)
        except ValueError as problem:
            raise ConfigError(f"the node's ledger holds what is no charge: {problem}") from problem

    def participations(self, database: sqlite3.Connection, *, any_unit: bool = False) -> int:
        """Replies charged so far: of this unit, or all."""
        row = database.execute(
            f"SELECT COUNT(DISTINCT reply) FROM charge WHERE {self.scope} = ? AND unit LIKE ?",
            (self.name, "%" if any_unit else self.unit),
        )
        return int(row.fetchone()[0])

    def promise(self, database: sqlite3.Connection) -> tuple[float, float]:
        """Epsilon and delta that were promised first."""
        row = database.execute(
            "SELECT epsilon, delta FROM promise WHERE scope = ? AND name = ? AND unit = ?",
            (self.scope, self.name, self.unit),
        ).fetchone()
        if row is None:  # replies that nothing protects promise nothing
            return math.inf, _NO_DELTA
        return (math.inf if row[0] is None else row[0]), row[1]


@dataclass(frozen=True)
class FileAccount:
    """A node's ledger, opened for one message. See `umbel.clients.ledger.node_ledger.Account`."""

    ledger: LedgerFile
    asked: Asked

    def charge(self, release: Release) -> Receipt:
        with self.ledger.writing() as database:
            receipt = self._weigh(database, release)
            self._add(database, release)
            return receipt

    def hold(self, ticket: bytes, releases: Sequence[Release]) -> list[Receipt]:
        body: dict[str, Any] = {
            "asked": asdict(self.asked),
            "limits": _limits_as_json(self.ledger.limits),
            "releases": [_as_json(release) for release in releases],
            "charges": [_row(release) for release in releases],
        }
        with self.ledger.writing() as database:
            receipts = [self._weigh(database, release) for release in releases]
            body["after"] = last_charge(database)
            # Those of sessions that were given up stay: another process may be in one of them.
            database.execute("INSERT OR IGNORE INTO held VALUES (?, ?)", (ticket, json.dumps(body)))
        return receipts

    def settle(self, ticket: bytes) -> None:
        settle(self.ledger.folder, ticket)

    def chain(self, unit: Unit, make: Callable[[str], Signed]) -> Signed:
        population, run = self.asked.population, self.asked.run
        with self.ledger.writing() as database:
            row = database.execute(
                "SELECT digest FROM statement WHERE population = ? AND unit = ?"
                " ORDER BY run = ? DESC, number DESC LIMIT 1",
                (population, unit, run),
            ).fetchone()
            signed = make(row[0] if row else "")
            database.execute(
                "INSERT OR REPLACE INTO statement VALUES (?, ?, ?,"
                " (SELECT COALESCE(MAX(number), 0) + 1 FROM statement), ?)",
                (population, unit, run, signed.digest),
            )
        return signed

    def _weigh(self, database: sqlite3.Connection, release: Release) -> Receipt:
        """Hold a release against every limit; it is not written yet."""
        unit, own = release.unit, self.ledger
        names = (("run", self.asked.run), ("population", self.asked.population))
        scopes = [_Scope(scope, name, unit) for scope, name in (*names, ("data", self.asked.data))]
        offer = promised(release)
        for sums in scopes if release.mechanism != UNPROTECTED else ():
            database.execute(
                "INSERT OR IGNORE INTO promise VALUES (?, ?, ?, ?, ?, ?)",
                (
                    *(sums.scope, sums.name, unit),
                    *(offer if math.isfinite(offer) else None, release.delta, self.asked.run),
                ),
            )
        delta = scopes[-1].promise(database)[1]
        values, counts, limits, relation = [], [], [], ""
        for sums in scopes:
            whole = sums.charges(database) + Counter({release.charge: release.count})
            limit = own._limit(database, sums)
            number = sums.participations(database) + self._is_first(database, unit)
            at_its_own = total(whole, sums.promise(database)[1])[0]
            refuse_beyond(at_its_own, limit, unit, self._whose(sums))
            if sums.scope != "run":
                attended = sums.participations(database, any_unit=True)
                attended += self._is_first(database, None)
                refuse_more(attended, own.limits.participations)
            epsilon, relation = total(whole, delta)
            values.append(epsilon)
            counts.append(number)
            limits.append(limit)
        return Receipt(
            release,
            epsilon=max(values),
            run_epsilon=values[0],
            limit=min(limits),
            delta=delta,
            relation=relation,
            participations=max(counts),
        )

    def _whose(self, sums: _Scope) -> str:
        if sums.scope == "run":
            return f"run {sums.name} promised it in its first message"
        key = "record-epsilon" if sums.unit == "record" else "epsilon"
        if self.ledger.limits.of(sums.unit) is not None:
            return f"the policy of this node, for the {sums.scope} {sums.name!r}"
        return (
            f"the first run about the {sums.scope} {sums.name!r} promised it; the node's owner "
            f'can allow more in the node\'s policy, by {key} = NUMBER or {key} = "unlimited"'
        )

    def _is_first(self, database: sqlite3.Connection, unit: Unit | None) -> int:
        """1 if nothing of this unit, or nothing at all, was charged for this reply yet."""
        found = database.execute(
            "SELECT 1 FROM charge WHERE reply = ? AND unit LIKE ?", (self.asked.reply, unit or "%")
        )
        return 0 if found.fetchone() else 1

    def _add(self, database: sqlite3.Connection, release: Release) -> None:
        insert(database, self.asked, _row(release))


def weigh_again(folder: Path, database: sqlite3.Connection, body: Mapping[str, Any]) -> None:
    """Hold what was held before to every limit, as the ledger is now.

    Raises:
        RunError: it would exceed one.
    """
    ledger = LedgerFile(folder, _limits_from_json(body["limits"]))
    account = FileAccount(ledger, Asked(**body["asked"]))
    for release in body["releases"]:
        account._weigh(database, _from_json(release))


def _limits_as_json(limits: Limits) -> dict[str, Any]:
    """JSON has no infinity: an unlimited epsilon is a text."""
    plain = asdict(limits)
    return {k: "unlimited" if v == math.inf else v for k, v in plain.items()}


def _limits_from_json(plain: Mapping[str, Any]) -> Limits:
    read: dict[str, Any] = {k: math.inf if v == "unlimited" else v for k, v in plain.items()}
    return Limits(**read)


def _row(release: Release) -> list[Any]:
    return [release.unit, release.mechanism, *written(release.charge), release.count]


def _as_json(release: Release) -> dict[str, Any]:
    plain = {field.name: getattr(release, field.name) for field in fields(release)}
    offer = promised(release)
    plain["promised"] = offer if math.isfinite(offer) else None
    return plain | {"charge": written(release.charge)}


def _from_json(plain: dict[str, Any]) -> Release:
    event, relation, slack = plain["charge"]
    (charge,) = charges([(event, relation, slack, 1)])
    offer = math.inf if plain["promised"] is None else plain["promised"]
    return Release(**plain | {"charge": charge, "promised": offer})
