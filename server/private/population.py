"""Whose data a run is about, and where what was released about them is written down.

    population=NAME, ledger=FILE    as the operator says
    `umbel server`, `flwr run`      the nodes of a state folder: STATE/populations/default.sqlite
    elsewhere                       the app's data: DATA/umbel/populations/<app>.<data>.sqlite
    audits                          a ledger in the folder of the rehearsal, and nowhere else

A population outlives runs, run directories and folders of apps: it is found again by what the app
says about its data (the name of the data set, or of the function that gives them), never by their
content, because new rows are no new people and open no new budget. Changing the number of virtual
nodes or how rows are divided among them opens none either.

The budget of a run is that of its population where somebody named one, and for nodes that are
real. Simulations of one app's data are run again and again; there, each run has the budget that
it asks for, and the ledger still adds up what all of them have spent together. Certificate, card
and screen say both numbers.

A register beside the ledgers knows which nodes each ledger has seen, by hashes of their names, so
that nodes under a second name or a second file do not look like new people. It also remembers how
long each ledger was, so that one that was set back to an earlier copy is refused.
"""

import contextlib
import functools
import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from umbel.core.errors import CheckError, ConfigError
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import canonical
from umbel.server.private.coordinator_key import data_folder
from umbel.strategies.private.options import PrivacyOptions

Scope = Literal["run", "population"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    first TEXT PRIMARY KEY, population TEXT NOT NULL, path TEXT NOT NULL,
    number INTEGER NOT NULL, head TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS node (
    label TEXT NOT NULL, first TEXT NOT NULL, PRIMARY KEY (label, first)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class LedgerLocation:
    """Where a run's ledger is, and whose it is.

    Attributes:
        path: of the ledger.
        population: its name.
        scope: what the budget is of: all releases about the population, or those of a run.
        people: what the nodes' names belong to; empty where the names themselves are people.
        register: of the ledgers of this machine; the user's own if None.
    """

    path: Path
    population: str
    scope: Scope
    people: str
    register: Path | None = None

    def labels(self, names: Iterable[str]) -> list[str]:
        """Hashes of nodes' names, sorted: one for each node, wherever it is seen again."""
        prefix = f"{self.people}/" if self.people else ""
        return sorted(hashlib.sha256(f"{prefix}{name}".encode()).hexdigest() for name in names)


def place_of(privacy: PrivacyOptions, run: RunDirectory, data: object) -> LedgerLocation:
    """Where the ledger of this run's population is.

    Args:
        privacy: the run's options.
        run: its directory, which says which engine it is of.
        data: the federation's data function.

    Raises:
        ConfigError: a population's name that is none.
    """
    config = run.config()
    if config.get("rehearsal"):  # an audit of an app: nothing of it leaves this machine
        name = f"the nodes of {run.path.name}"
        return LedgerLocation(run.ledger_path, name, "run", name, run.path / "register.db")
    folder = config.get("populations")
    own = name_of(str(config.get("app", "federation")), data)
    name = privacy.population or ("default" if folder or privacy.ledger else own)
    if not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ConfigError(
            f"population is {name!r}; use letters, digits, dots, dashes and underscores"
        )
    named = bool(folder or privacy.population or privacy.ledger)
    path = Path(folder or data_folder() / "populations") / f"{name}.sqlite"
    beside = run.path.parent / "populations" / f"{name}.sqlite"
    if not path.exists() and beside.exists():  # where earlier versions kept it: not forgotten
        path = beside
    return LedgerLocation(
        path=Path(privacy.ledger).absolute() if privacy.ledger else path,
        population=name,
        scope="population" if named else "run",
        people="" if config.get("engine") == "link" else own,
    )


def state_of(run: RunDirectory) -> Path | None:
    """The state folder of the coordinator that a run belongs to, where there is one."""
    folder = run.config().get("populations")
    return Path(folder).parent if folder else None


def name_of(app: str, data: object) -> str:
    """The name of an app's data: readable, and with a digest of the declaration.

    >>> name_of("clinics", "breast-cancer")
    'clinics.breast-cancer-62d5a9d5'
    """
    declared = declaration(data)
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{app}.{declared}").strip("-.")[:60]
    digest = hashlib.sha256(canonical([app, declared]).encode()).hexdigest()
    return f"{readable or 'data'}-{digest[:8]}"


@runtime_checkable
class HasSource(Protocol):
    """Data that are made of other data."""

    source: Any
    """What they are made of."""


@runtime_checkable
class Named(Protocol):
    """Data that have a name, such as a data set."""

    name: Any
    """The name."""


def declaration(data: object) -> str:
    """What an app says of where its data come from.

    An object with a `source` says it itself (`umbel.Partitioned`, `umbel.PrecomputedFeatures`); a
    data set is its name, a function its own, an object its class.
    """
    if isinstance(data, HasSource) and data.source is not None:
        return declaration(data.source)
    if isinstance(data, str):
        return data
    if isinstance(data, functools.partial):
        return declaration(data.func)
    if isinstance(data, Named) and isinstance(data.name, str) and data.name:
        return data.name
    kind = data if hasattr(data, "__qualname__") else type(data)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


@dataclass(frozen=True)
class Elsewhere:
    """Another ledger that knows some of a run's nodes.

    Attributes:
        population: its name.
        ledger: where it is, or was.
        nodes: how many of this run's nodes it has seen.
    """

    population: str
    ledger: str
    nodes: int

    def sentence(self, of: int) -> str:
        """What it means, for people."""
        return (
            f"{self.nodes} of the {of} nodes are in another ledger on this machine too "
            f"(population {self.population!r}, {self.ledger}); what was released about them there "
            "is not counted here"
        )

    def to_json(self) -> dict[str, Any]:
        """For the certificate."""
        return {"population": self.population, "ledger": self.ledger, "nodes": self.nodes}


class Register:
    """Which nodes the ledgers of this user know, and how far each of them had come."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = data_folder() / "populations" / "register.db" if path is None else path

    def known_end(self, first: str) -> tuple[int, str] | None:
        """How many entries the ledger with this first entry had, and the last one's hash."""
        with self._open() as database:
            row = database.execute(
                "SELECT number, head FROM ledger WHERE first = ?", (first,)
            ).fetchone()
        return None if row is None else (int(row[0]), str(row[1]))

    def knows(self, path: Path) -> bool:
        """Whether there was a signed ledger in this file."""
        with self._open() as database:
            found = database.execute(
                "SELECT 1 FROM ledger WHERE path = ?", (str(path.absolute()),)
            ).fetchone()
        return found is not None

    def keep(self, first: str, population: str, path: Path, number: int, head: str) -> None:
        """Remember how far a ledger has come."""
        with self._open() as database, database:
            database.execute(
                "INSERT INTO ledger VALUES (?, ?, ?, ?, ?) ON CONFLICT (first) DO UPDATE SET"
                " population = excluded.population, path = excluded.path,"
                " number = excluded.number, head = excluded.head"
                " WHERE excluded.number >= ledger.number",
                (first, population, str(path.absolute()), number, head),
            )

    def meet(self, first: str, labels: Iterable[str]) -> list[Elsewhere]:
        """Write down that a ledger knows these nodes; which other ledgers know some of them."""
        with self._open() as database, database:
            database.execute("CREATE TEMP TABLE present (label TEXT PRIMARY KEY) WITHOUT ROWID")
            database.executemany(
                "INSERT OR IGNORE INTO present VALUES (?)", [(label,) for label in labels]
            )
            database.execute("INSERT OR IGNORE INTO node SELECT label, ? FROM present", (first,))
            rows = database.execute(
                "SELECT ledger.population, ledger.path, COUNT(*) FROM present"
                " JOIN node USING (label) JOIN ledger ON ledger.first = node.first"
                " WHERE node.first != ? GROUP BY node.first ORDER BY 3 DESC, 1, 2",
                (first,),
            ).fetchall()
        return [Elsewhere(*row) for row in rows]

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=30)) as database:
                database.executescript(_SCHEMA)
                yield database
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the register of populations {self.path} cannot be used ({error}); name another "
                "data folder with XDG_DATA_HOME"
            ) from error


def check_not_set_back(
    register: Register, first: str, hashes: Mapping[int, str], name: str
) -> None:
    """Refuse a ledger that is shorter than it was, or whose entries are others.

    Args:
        register: of this machine.
        first: hash of its first entry.
        hashes: of its entries, by number.
        name: of the file, for the sentence.

    Raises:
        CheckError: an entry that was there is not there any more.
    """
    known = register.known_end(first)
    if known is not None and hashes.get(known[0]) != known[1]:
        raise CheckError(
            f"{name} had {known[0]} entries when it was last used here and now has {len(hashes)} "
            "or others: it was set back to an earlier copy, so what it adds up to is less than "
            "what was released; restore the latest copy"
        )
