"""The ledger: what has been released about a population, written down before it is released.

    one SQLite file a population
        entry           append-only; each entry's hash covers the one before it, and each is signed
        participation   when each node last took part in a run, and how often
        member          hashes of the names of all nodes that any run has had

An entry is committed, with the disk's confirmation, before the noisy sum that it pays for leaves
the mechanism. A process that is killed at any instant has therefore charged at least what it
released. The first entry names the population; a ledger is never used for another. Entries are
canonical JSON, hashed with SHA-256 over the previous hash and the entry, and the coordinator signs
every hash, so that an entry that was changed, removed or moved shows, and so does a ledger that
somebody else has written from its beginning. A ledger whose end was cut off is a valid shorter
one; certificates and the register (`umbel.server.private.population`) therefore keep the number
of entries and the last hash.

Two coordinators may write to one ledger: whether a release fits the budget is asked once more
inside the transaction that charges it, when the other's charges have been read.

Ledgers of format 1 had no signatures. One is taken over when it is opened, in one transaction:
what was spent counts on, its entries say `unsigned`, and its own table stays in the file.
"""

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import NonPrivateDpEvent, NoOpDpEvent

from umbel.core.errors import CheckError, ConfigError, RunError
from umbel.privacy.budget.events import RELATIONS, Charge, from_json, relation_name, to_json
from umbel.server.output.strict import canonical, loads
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.private.coordinator_key import coordinator_key, public_text, sign, signed_by
from umbel.server.private.population import Elsewhere, Register, check_not_set_back

Against = Literal["model-user", "server"]

FORMAT = 2
_FIRST = "0" * 64
_ENTRIES = (
    "CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY, body TEXT NOT NULL,"
    " hash TEXT NOT NULL, signature TEXT NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS entry_stays BEFORE UPDATE ON entry"
    " BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END",
    "CREATE TRIGGER IF NOT EXISTS entry_kept BEFORE DELETE ON entry"
    " BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END",
)
_NODES = (
    "CREATE TABLE IF NOT EXISTS participation (run TEXT NOT NULL, node TEXT NOT NULL,"
    " last INTEGER NOT NULL, times INTEGER NOT NULL, PRIMARY KEY (run, node)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS member (label TEXT PRIMARY KEY) WITHOUT ROWID",
)
_SET_ASIDE = (
    "DROP TRIGGER IF EXISTS entry_stays",
    "DROP TRIGGER IF EXISTS entry_kept",
    "ALTER TABLE entry RENAME TO entry_unsigned",
)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        number: from 1.
        body: what happened; `kind` is `open`, `nodes`, `run`, `charge`, `end` or `note`.
        hash: over the previous entry's hash and this body.
        signature: of the hash, by the coordinator that wrote the entry.
    """

    number: int
    body: Mapping[str, Any]
    hash: str
    signature: str

    def signed(self, public: str) -> bool:
        """Whether the holder of this key wrote the entry."""
        return signed_by(public, self.signature, _signed_text(self.hash))

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
        key: that entries are signed with; the coordinator's own if None.
        register: of the ledgers of this machine; the user's own if None.

    Attributes:
        taken_over: how many entries of a ledger without signatures were taken over at this
            opening.

    Raises:
        ConfigError: it is another population's or coordinator's ledger, or no ledger.
        CheckError: an entry was changed, removed or moved, or a ledger that was signed is not.
    """

    def __init__(
        self,
        path: Path,
        population: str,
        key: Ed25519PrivateKey | None = None,
        register: Register | None = None,
    ) -> None:
        self.path, self.population = path, population
        self._key = coordinator_key() if key is None else key
        self._register = Register() if register is None else register
        self.taken_over = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, timeout=10)
            # One file and no sidecar: a copy of it is a whole ledger. EXTRA also syncs the folder.
            self._database.execute("PRAGMA journal_mode=DELETE")
            self._database.execute("PRAGMA synchronous=EXTRA")
            for statement in (*_ENTRIES, *_NODES):
                self._database.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the ledger {path} cannot be opened ({error})") from error
        self._counts: dict[tuple[str, str | None], Counter[Charge]] = {}
        try:
            self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        self._number, self._hash, self._first = 0, _FIRST, ""
        if _is_unsigned(self._database):
            self._take_over()
        found = list(read(self._database, str(self.path)))
        if not found:
            with self._writing():
                self._append(self._opening())
            self.remember()
            return
        self._check_population(found[0])
        if not found[-1].signed(public_text(self._key)):
            raise ConfigError(
                f"the last entry of the ledger {self.path} is not signed with this coordinator's "
                f"key; name the file of the key that it was written with ({self._signer(found)}) "
                "in UMBEL_KEY, or restore the ledger"
            )
        for entry in found:
            self._take(entry)
        hashes = {entry.number: entry.hash for entry in found}
        check_not_set_back(self._register, self._first, hashes, str(self.path))
        if self.taken_over:
            self.remember()

    def _opening(self, **more: Any) -> dict[str, Any]:
        """The first entry."""
        about = {"kind": "open", "population": self.population, "format": FORMAT}
        return {**about, "key": public_text(self._key), **more}

    def _check_population(self, first: Entry) -> None:
        name = first.body.get("population")
        if name != self.population:
            raise ConfigError(
                f"{self.path} is the ledger of the population {name!r}, not of "
                f"{self.population!r}; its releases are about other people, so name that "
                "population or another ledger"
            )

    def _take_over(self) -> None:
        """Sign the entries of a ledger of format 1; its own table stays in the file.

        A ledger that this machine has seen signed is no earlier one: somebody took the signatures
        away.
        """
        if self._register.knows(self.path):
            raise CheckError(
                f"{self.path} was signed when it was last used here, and its entries have no "
                "signatures now, so what it adds up to proves nothing; restore the latest copy"
            )
        try:
            self._database.execute("BEGIN IMMEDIATE")
            if _is_unsigned(self._database):  # or another coordinator was first
                self._sign_anew(list(read(self._database, str(self.path))))
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise RunError(
                    f"the ledger {self.path}, of an earlier version, cannot be taken over "
                    f"({error}); make room, and let this user write the file"
                ) from error
            raise

    def _sign_anew(self, found: Sequence[Entry]) -> None:
        for entry in found[:1]:
            self._check_population(entry)
        for statement in (*_SET_ASIDE, *_ENTRIES):
            self._database.execute(statement)
        head = found[-1].hash if found else _FIRST
        before = {"format": 1, "entries": len(found), "head": head}
        self._append(self._opening(taken_over=before))
        for entry in found[1:]:
            self._append({**entry.body, "unsigned": True})
        self.taken_over = len(found)
        # What was just written is read and counted like every other ledger.
        self._number, self._hash, self._first, self._counts = 0, _FIRST, "", {}

    @staticmethod
    def _signer(found: Sequence[Entry]) -> str:
        return str(found[0].body.get("key", "unknown"))

    def _take(self, entry: Entry) -> None:
        """Count an entry that is in the file."""
        self._number, self._hash = entry.number, entry.hash
        self._first = self._first or entry.hash
        self._count(entry)

    def remember(self) -> None:
        """Tell the register of this machine how far the ledger has come."""
        self._register.keep(self._first, self.population, self.path, self._number, self._hash)

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

    def notes(self) -> list[str]:
        """What its user should know of this opening."""
        if not self.taken_over:
            return []
        return [
            f"the ledger {self.path} was of an earlier version, which signed nothing: its "
            f"{self.taken_over} entries were taken over and are signed from now on; what they say "
            "was not signed when it was written"
        ]

    @property
    def head(self) -> tuple[int, str]:
        """How many entries there are, and the last one's hash."""
        return self._number, self._hash

    def charge(
        self,
        run: str,
        what: str,
        against: Against,
        charges: Sequence[Charge],
        *,
        fits: Callable[[], bool] | None = None,
        **more: Any,
    ) -> None:
        """Commit releases. When this returns, they are on disk.

        Args:
            run: the run they belong to.
            what: e.g. `round 7`, or `mean of the features`.
            against: who sees them.
            charges: the releases.
            fits: asked when everything that others have charged has been read, and before
                anything is written: whether there is budget for them.
            more: anything else worth keeping, as JSON.

        Raises:
            BudgetSpentError: they do not fit; nothing was written, nothing may be released.
            RunError: they could not be written; then they must not be released.
        """
        with self._writing():
            if fits is not None and not fits():
                raise BudgetSpentError(f"the budget of {self.population!r} does not pay for {what}")
            for charge in charges:
                self._append(_charged(run, what, against, charge, more))

    def begin(self, run: str, **facts: Any) -> None:
        """Write down that a run begins or goes on, and under which rules."""
        with self._writing():
            self._append({"kind": "run", "run": run, **facts})

    def end(self, run: str, **facts: Any) -> None:
        """Write down that a run has ended, and with what."""
        with self._writing():
            self._append({"kind": "end", "run": run, **facts})
        self.remember()

    def admit(self, run: str, labels: Sequence[str]) -> list[Elsewhere]:
        """Write down whose data a run is about; which other ledgers of this machine know them.

        Args:
            run: the run.
            labels: hashes of the names of its nodes (`LedgerLocation.labels`).
        """
        with self._writing():
            self._database.executemany(
                "INSERT OR IGNORE INTO member VALUES (?)", [(label,) for label in labels]
            )
            members = members_of(self._database)
            self._append(
                {"kind": "nodes", "run": run, "nodes": len(labels), "members": digest_of(members)}
            )
        self.remember()
        return self._register.meet(self._first, labels)

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

    @property
    def is_open(self) -> bool:
        """Something was released about the population without noise."""
        return any(
            isinstance(charge.event, NonPrivateDpEvent) for charge in self.spent("model-user")
        )

    def participation(self, run: str) -> str:
        """Digest of who took part in a run, when last and how often."""
        return participation_of(self._database, run)

    def charged_rounds(self, run: str) -> set[int]:
        """The rounds of a run that were charged."""
        return {
            int(entry.body["round"])
            for entry in read(self._database, str(self.path))
            if entry.body.get("run") == run
            and entry.body["kind"] == "charge"
            and "round" in entry.body
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
        fits: Callable[[], bool] | None = None,
    ) -> None:
        """Commit that nodes take part in a round; charge when one does so more often than any yet.

        Each node pays for its own participations, so the run has cost as much as its most
        frequent node: `charge` is written once for every increase of that number.

        Raises:
            BudgetSpentError: see `charge`; nobody was written down.
        """
        with self._writing():
            before = self._most(run)
            self._database.executemany(
                "INSERT INTO participation VALUES (?, ?, ?, 1) ON CONFLICT (run, node)"
                " DO UPDATE SET last = excluded.last, times = times + 1",
                [(run, node, number) for node in nodes],
            )
            if charge is not None and self._most(run) > before:
                what = f"participation {self._most(run)} of a node"
                if fits is not None and not fits():
                    raise BudgetSpentError(f"the budget does not pay for {what}")
                self._append(_charged(run, what, against, charge, {"round": number}))

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
        for entry in read(self._database, str(self.path), self._number, self._hash):
            self._take(entry)

    def _append(self, body: dict[str, Any]) -> None:
        body = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **body}
        text = canonical(body)
        hash_ = _chain(self._hash, text)
        signature = sign(self._key, _signed_text(hash_))
        self._database.execute(
            "INSERT INTO entry VALUES (?, ?, ?, ?)", (self._number + 1, text, hash_, signature)
        )
        self._take(Entry(self._number + 1, loads(text), hash_, signature))

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


def _charged(
    run: str, what: str, against: Against, charge: Charge, more: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "kind": "charge",
        "run": run,
        "what": what,
        "against": against,
        "event": to_json(charge.event),
        "relation": relation_name(charge.relation),
        "slack": charge.slack,
        **more,
    }


def _chain(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _signed_text(hash_: str) -> bytes:
    return f"umbel ledger entry {hash_}".encode()


def _is_unsigned(database: sqlite3.Connection) -> bool:
    """Whether it is a ledger of format 1."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(entry)")}
    return bool(columns) and "signature" not in columns


def members_of(database: sqlite3.Connection) -> list[str]:
    """Hashes of the names of all nodes, sorted."""
    return [label for (label,) in database.execute("SELECT label FROM member ORDER BY label")]


def participation_of(database: sqlite3.Connection, run: str) -> str:
    """Digest of a run's rows of the table of participations."""
    rows = database.execute(
        "SELECT node, last, times FROM participation WHERE run = ? ORDER BY node", (run,)
    )
    return digest_of(f"{node}\t{last}\t{times}" for node, last, times in rows)


def digest_of(lines: Iterable[str]) -> str:
    """SHA-256 of lines."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def read(
    database: sqlite3.Connection, name: str, after: int = 0, before: str = _FIRST
) -> Iterator[Entry]:
    """All entries in order, each checked against the chain.

    Args:
        database: the ledger.
        name: of the file, for sentences.
        after: only those after this number, the hash of which is `before`.

    Raises:
        CheckError: the chain is broken, or an entry cannot be read.
        ConfigError: it is no ledger.
    """
    try:
        signature = "''" if _is_unsigned(database) else "signature"
        rows = database.execute(
            f"SELECT number, body, hash, {signature} FROM entry WHERE number > ? ORDER BY number",
            (after,),
        ).fetchall()
        stored = database.execute("SELECT hash FROM entry WHERE number = ?", (after,)).fetchone()
    except sqlite3.Error as error:
        raise ConfigError(f"{name} is no ledger ({error})") from error
    if after and (stored is None or stored[0] != before):
        raise CheckError(f"{name}: entry {after} was edited while it was in use; restore a copy")
    for place, (number, text, hash_, signature) in enumerate(rows, start=after + 1):
        if number != place or not isinstance(text, str) or _chain(before, text) != hash_:
            raise CheckError(
                f"{name}: entry {place} is not what was written there; the ledger was edited, so "
                "what it adds up to proves nothing; restore it from a copy"
            )
        before = hash_
        try:
            entry = Entry(number, loads(text), hash_, signature)
            if entry.body["kind"] == "charge":
                entry.charge()
        except (ValueError, KeyError, TypeError) as error:
            raise CheckError(f"{name}: entry {place} cannot be read ({error})") from error
        yield entry


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger file for reading.

    Raises:
        ConfigError: there is no ledger at `path`, or it cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no ledger at {path}")
    # A process that was killed while it wrote leaves a journal, which only a writer may undo.
    mode = "rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "ro"
    place = f"file:{quote(str(path))}?mode={mode}"
    try:
        with closing(sqlite3.connect(place, uri=True)) as database:
            yield database
    except sqlite3.Error as error:
        raise ConfigError(f"{path} is no ledger ({error})") from error


def entries(path: Path) -> list[Entry]:
    """All entries of a ledger file.

    Raises:
        CheckError: the chain is broken.
        ConfigError: there is no ledger at `path`.
    """
    with opened(path) as database:
        return list(read(database, str(path)))
