"""The ledger of a real node: one SQLite file in its state folder, outside of every app's memory.

    charge      append-only: one row a kind of release and reply
    promise     what the first message of a run, of a population, about the data promised: frozen
    held        releases of a secure sum that has not come to its masked vector yet
    answer      which messages were answered with protected replies, and where those bytes are
    statement   digest of the last statement, for the chain

Every write is one transaction under SQLite's lock, with the disk's confirmation, so two processes
on one folder cannot both spend what is left, and a node that is killed at any instant has charged
at least what has left it. Three counts are kept to limits: the run's, the population's (a name
that the coordinator gives) and the data's (a name that the node's owner gives). The first is held
to what the run promised in its first message. The other two are held to the owner's limits, or
where there are none, to the first promise that was ever made about them.

Nothing here can go back in time but the folder itself: whoever restores an old copy of it
restores the old counts.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from umbel.clients.ledger.names import LEDGER
from umbel.core.errors import ConfigError, RunError

FORMAT = 1
_PATIENCE_S = 60.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS charge (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, reply TEXT NOT NULL, run TEXT NOT NULL,
    round INTEGER NOT NULL, coordinator TEXT NOT NULL, population TEXT NOT NULL,
    data TEXT NOT NULL, unit TEXT NOT NULL, mechanism TEXT NOT NULL, event TEXT NOT NULL,
    relation TEXT NOT NULL, slack REAL NOT NULL, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS promise (
    scope TEXT NOT NULL, name TEXT NOT NULL, unit TEXT NOT NULL, epsilon REAL,
    delta REAL NOT NULL, run TEXT NOT NULL, PRIMARY KEY (scope, name, unit)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held (
    ticket BLOB PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answer (
    number INTEGER PRIMARY KEY, message TEXT NOT NULL, digest TEXT NOT NULL, file TEXT NOT NULL,
    size INTEGER NOT NULL, UNIQUE (message, digest));
CREATE TABLE IF NOT EXISTS statement (
    population TEXT NOT NULL, unit TEXT NOT NULL, run TEXT NOT NULL, number INTEGER NOT NULL,
    digest TEXT NOT NULL, PRIMARY KEY (population, unit, run)) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS charge_stays BEFORE UPDATE ON charge
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
CREATE TRIGGER IF NOT EXISTS charge_kept BEFORE DELETE ON charge
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
CREATE TRIGGER IF NOT EXISTS promise_stays BEFORE UPDATE ON promise
    BEGIN SELECT RAISE(ABORT, 'a promise is made once'); END;
CREATE TRIGGER IF NOT EXISTS promise_kept BEFORE DELETE ON promise
    BEGIN SELECT RAISE(ABORT, 'a promise is made once'); END;
"""


@dataclass(frozen=True)
class Asked:
    """The message that a reply answers.

    Attributes:
        run: the run's id, as the coordinator says it.
        round: of the run.
        population: as the run names it.
        data: the owner's name for the node's data.
        coordinator: where the message came from, for people.
        message: the run's id and the message's.
        reply: made for this answer alone; releases with one are one participation.
    """

    run: str
    round: int
    population: str
    data: str
    coordinator: str
    message: str
    reply: str


class LedgerDatabase:
    """The file, without the arithmetic that what it holds is weighed with.

    Args:
        folder: of the node; the file is made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LEDGER

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._open()) as database:
                yield database
        except sqlite3.Error as problem:
            raise ConfigError(f"the node's ledger {self.path} cannot be read ({problem})") from (
                problem
            )

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when the block ends; nothing of it where it raises."""
        try:
            with closing(self._open()) as database:
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, OSError) as problem:
            raise RunError(
                f"the node's ledger {self.path} cannot be written ({problem}), so nothing leaves "
                "this node; make room, or restore the file"
            ) from problem

    def _open(self) -> sqlite3.Connection:
        if not self.path.exists():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Made before SQLite opens it: its journals have the mode of the file.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(self.path, isolation_level=None, timeout=_PATIENCE_S)
        try:
            # EXTRA also syncs the folder in which the journal was.
            database.execute("PRAGMA synchronous=EXTRA")
            format_ = database.execute("PRAGMA user_version").fetchone()[0]
            if format_ == 0:
                made = f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;"
                database.executescript(made)
            elif format_ != FORMAT:
                raise ConfigError(
                    f"the node's ledger {self.path} is of format {format_}; this version of Umbel "
                    f"knows {FORMAT}, so take the newer one again"
                )
        except BaseException:
            database.close()
            raise
        return database


def last_charge(database: sqlite3.Connection) -> int:
    """The number of the last charge; 0 before the first."""
    return int(database.execute("SELECT COALESCE(MAX(number), 0) FROM charge").fetchone()[0])


def insert(database: sqlite3.Connection, asked: Asked, release: Sequence[Any]) -> None:
    """Write a charge: unit, mechanism, event, relation, slack, count."""
    database.execute(
        "INSERT INTO charge VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            datetime.now(UTC).isoformat(timespec="seconds"),
            *(asked.reply, asked.run, asked.round, asked.coordinator, asked.population),
            *(asked.data, *release),
        ),
    )


def settle(folder: Path, ticket: bytes) -> None:
    """Charge what was held for a session; where nothing was, nothing happens.

    What was weighed when it was held still fits, unless something was charged since: then it is
    weighed again.

    Raises:
        RunError: it exceeds a limit, or cannot be written; then the session must not go on.
    """
    ledger = LedgerDatabase(folder)
    if not ledger.path.exists():
        return
    with ledger.writing() as database:
        row = database.execute("SELECT body FROM held WHERE ticket = ?", (ticket,)).fetchone()
        if row is None:
            return
        body = json.loads(row[0])
        if last_charge(database) != body["after"]:
            from umbel.clients.ledger.file import weigh_again  # takes a second to import

            weigh_again(folder, database, body)
        for release in body["charges"]:
            insert(database, Asked(**body["asked"]), release)
        database.execute("DELETE FROM held WHERE ticket = ?", (ticket,))
