"""The ledger: what has been released about a population, written down before it is released.

    one SQLite file a population
        entry           append-only; each entry's hash covers the one before it
        participation   when each node last took part in a run, and how often

An entry is committed, with the disk's confirmation, before the noisy sum that it pays for leaves
the mechanism. A process that is killed at any instant has therefore charged at least what it
released. The first entry names the population; a ledger is never used for another. Entries are
JSON with sorted keys, hashed with SHA-256 over the previous hash and the entry, so that an entry
that was changed, removed or moved shows. A ledger whose end was cut off is a valid shorter one;
certificates therefore carry the number of entries and the last hash.
"""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

from dp_accounting import NoOpDpEvent

from umbel.privacy.budget.events import RELATIONS, Charge, from_json, relation_name, to_json
from umbel.strategies.errors import CheckError, ConfigError, RunError

Against = Literal["model-user", "server"]

FORMAT = 1
_FIRST = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS participation (
    run TEXT NOT NULL, node TEXT NOT NULL, last INTEGER NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (run, node)) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS entry_stays BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
CREATE TRIGGER IF NOT EXISTS entry_kept BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
"""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        number: from 1.
        body: what happened; `kind` is `open`, `run`, `charge` or `note`.
        hash: over the previous entry's hash and this body.
    """

    number: int
    body: Mapping[str, Any]
    hash: str

    def charge(self) -> Charge:
        """What was charged, of an entry of that kind."""
        return Charge(
            from_json(self.body["event"]),
            RELATIONS[self.body["relation"]],
            float(self.body["slack"]),
        )


class Ledger:
    """The ledger of one population, open for one coordinator.

    Args:
        path: the file; it is made if it is missing.
        population: the name of the people, machines or clinics whose data the releases are about.

    Raises:
        ConfigError: it is another population's ledger, or no ledger.
        CheckError: an entry was changed, removed or moved.
    """

    def __init__(self, path: Path, population: str) -> None:
        self.path, self.population = path, population
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, timeout=10)
            # One file and no sidecar: a copy of it is a whole ledger. EXTRA also syncs the folder.
            self._database.execute("PRAGMA journal_mode=DELETE")
            self._database.execute("PRAGMA synchronous=EXTRA")
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the ledger {path} cannot be opened ({error})") from error
        self._counts: dict[tuple[str, str | None], Counter[Charge]] = {}
        try:
            self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        self._number, self._hash, name = 0, _FIRST, None
        for entry in read(self._database, str(self.path)):
            self._number, self._hash = entry.number, entry.hash
            name = entry.body["population"] if entry.number == 1 else name
            self._count(entry)
        if name is None:
            with self._writing():
                self._append({"kind": "open", "population": self.population, "format": FORMAT})
        elif name != self.population:
            raise ConfigError(
                f"{self.path} is the ledger of the population {name!r}, not of "
                f"{self.population!r}; its releases are about other people, so name that "
                "population or another ledger"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._database.close()

    @property
    def head(self) -> tuple[int, str]:
        """How many entries there are, and the last one's hash."""
        return self._number, self._hash

    def charge(
        self, run: str, what: str, against: Against, charges: Sequence[Charge], **more: Any
    ) -> None:
        """Commit releases. When this returns, they are on disk.

        Args:
            run: the run they belong to.
            what: e.g. `round 7`, or `mean of the features`.
            against: who sees them.
            charges: the releases.
            more: anything else worth keeping, as JSON.

        Raises:
            RunError: they could not be written; then they must not be released.
        """
        with self._writing():
            for charge in charges:
                self._append(
                    {
                        "kind": "charge",
                        "run": run,
                        "what": what,
                        "against": against,
                        "event": to_json(charge.event),
                        "relation": relation_name(charge.relation),
                        "slack": charge.slack,
                        **more,
                    }
                )

    def begin(self, run: str, **facts: Any) -> None:
        """Write down that a run begins or goes on, and under which rules."""
        with self._writing():
            self._append({"kind": "run", "run": run, **facts})

    def runs(self, run: str) -> list[Mapping[str, Any]]:
        """How a run began, and each time it went on."""
        return [
            entry.body
            for entry in read(self._database, str(self.path))
            if entry.body["kind"] == "run" and entry.body["run"] == run
        ]

    def spent(self, against: Against, run: str | None = None) -> Counter[Charge]:
        """All charges against an adversary: of the population, or of one run."""
        return Counter(self._counts.get((against, run), Counter()))

    def charged_rounds(self, run: str) -> set[int]:
        """The rounds of a run that were charged."""
        return {
            int(entry.body["round"])
            for entry in read(self._database, str(self.path))
            if entry.body.get("run") == run and "round" in entry.body
        }

    # ---- participation

    def resting(self, run: str, number: int, separation: int) -> set[str]:
        """The nodes that took part less than `separation` rounds before round `number`."""
        rows = self._database.execute(
            "SELECT node FROM participation WHERE run = ? AND last > ?", (run, number - separation)
        )
        return {node for (node,) in rows}

    def take_part(
        self,
        run: str,
        number: int,
        nodes: Iterable[str],
        charge: Charge | None = None,
        against: Against = "server",
    ) -> None:
        """Commit that nodes take part in a round; charge when one does so more often than any yet.

        Each node pays for its own participations, so the run has cost as much as its most
        frequent node: `charge` is written once for every increase of that number.
        """
        with self._writing():
            before = self._most(run)
            self._database.executemany(
                "INSERT INTO participation VALUES (?, ?, ?, 1) ON CONFLICT (run, node)"
                " DO UPDATE SET last = excluded.last, times = times + 1",
                [(run, node, number) for node in nodes],
            )
            if charge is not None and self._most(run) > before:
                self._append(
                    {
                        "kind": "charge",
                        "run": run,
                        "what": f"participation {self._most(run)} of a node",
                        "round": number,
                        "against": against,
                        "event": to_json(charge.event),
                        "relation": relation_name(charge.relation),
                        "slack": charge.slack,
                    }
                )

    def _most(self, run: str) -> int:
        row = self._database.execute(
            "SELECT MAX(times) FROM participation WHERE run = ?", (run,)
        ).fetchone()
        return int(row[0] or 0)

    # ---- writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        number, head = self._number, self._hash
        counts = {key: Counter(value) for key, value in self._counts.items()}
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._nobody_else_wrote()
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            self._number, self._hash, self._counts = number, head, counts
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise RunError(
                    f"the ledger {self.path} cannot be written ({error}), so nothing is released; "
                    "make room and continue with --resume"
                ) from error
            raise

    def _nobody_else_wrote(self) -> None:
        """Another coordinator's charges count too: read them before adding to them."""
        found = self._database.execute(
            "SELECT number, hash FROM entry ORDER BY number DESC LIMIT 1"
        ).fetchone() or (0, _FIRST)
        if found == (self._number, self._hash):
            return
        self._counts.clear()
        for entry in read(self._database, str(self.path)):
            self._number, self._hash = entry.number, entry.hash
            self._count(entry)

    def _append(self, body: dict[str, Any]) -> None:
        body = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **body}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        hash_ = _chain(self._hash, text)
        self._database.execute(
            "INSERT INTO entry VALUES (?, ?, ?)", (self._number + 1, text, hash_)
        )
        self._number, self._hash = self._number + 1, hash_
        self._count(Entry(self._number, body, hash_))

    def _count(self, entry: Entry) -> None:
        if entry.body["kind"] != "charge":
            return
        charge = entry.charge()
        if isinstance(charge.event, NoOpDpEvent) and charge.slack == 0:
            return
        for run in (None, entry.body["run"]):
            self._counts.setdefault((entry.body["against"], run), Counter())[charge] += 1

    def copy(self, path: Path) -> None:
        """A copy of the whole ledger, complete up to now.

        Raises:
            RunError: it cannot be written.
        """
        fresh = path.with_name(f".{path.name}.tmp")
        try:
            fresh.unlink(missing_ok=True)
            with closing(sqlite3.connect(fresh)) as target:
                self._database.backup(target)
            fresh.replace(path)
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{path} cannot be written ({error}); make room") from error


def _chain(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def read(database: sqlite3.Connection, name: str) -> Iterator[Entry]:
    """All entries in order, each checked against the chain.

    Raises:
        CheckError: the chain is broken, or an entry cannot be read.
        ConfigError: it is no ledger.
    """
    try:
        rows = database.execute("SELECT number, body, hash FROM entry ORDER BY number").fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"{name} is no ledger ({error})") from error
    before = _FIRST
    for place, (number, text, hash_) in enumerate(rows, start=1):
        if number != place or _chain(before, text) != hash_:
            raise CheckError(
                f"{name}: entry {place} is not what was written there; the ledger was edited, so "
                "what it adds up to proves nothing; restore it from a copy"
            )
        before = hash_
        try:
            entry = Entry(number, json.loads(text), hash_)
            if entry.body["kind"] == "charge":
                entry.charge()
        except (ValueError, KeyError, TypeError) as error:
            raise CheckError(f"{name}: entry {place} cannot be read ({error})") from error
        yield entry


def entries(path: Path) -> list[Entry]:
    """All entries of a ledger file.

    Raises:
        CheckError: the chain is broken.
        ConfigError: there is no ledger at `path`.
    """
    if not path.is_file():
        raise ConfigError(f"there is no ledger at {path}")
    # A process that was killed while it wrote leaves a journal, which only a writer may undo.
    mode = "rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "ro"
    place = f"file:{quote(str(path))}?mode={mode}"
    with closing(sqlite3.connect(place, uri=True)) as database:
        return list(read(database, str(path)))
