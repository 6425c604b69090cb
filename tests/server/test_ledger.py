"""The ledger only grows, shows edits, and is on disk before anything is released."""

import contextlib
import json
import signal
import sqlite3
import time
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NoOpDpEvent

from umbel.privacy.budget.accounting import poisson
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, Charge
from umbel.server.private.ledger import Ledger, entries
from umbel.strategies.errors import CheckError, ConfigError, RunError

ROUND = Charge(poisson(2.0, 0.1), ADD_OR_REMOVE, 1e-12)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "people.sqlite"


def fill(path: Path, rounds: int = 3) -> None:
    with Ledger(path, "people") as ledger:
        for number in range(1, rounds + 1):
            ledger.charge("run", f"round {number}", "model-user", [ROUND], round=number)


def test_charges_add_up_and_are_still_there(path: Path) -> None:
    fill(path)
    with Ledger(path, "people") as ledger:
        assert ledger.spent("model-user") == {ROUND: 3}
        assert ledger.spent("server") == {}
        assert ledger.charged_rounds("run") == {1, 2, 3}
        other = Charge(GaussianDpEvent(30.0))
        ledger.charge("next run", "mean of the features", "model-user", [other])
        assert ledger.spent("model-user") == {ROUND: 3, other: 1}
        assert ledger.spent("model-user", "next run") == {other: 1}


def test_a_ledger_belongs_to_one_population(path: Path) -> None:
    fill(path)
    with pytest.raises(ConfigError, match="'people'"):
        Ledger(path, "other people")


def test_what_is_no_ledger_is_said(path: Path) -> None:
    path.write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Ledger(path, "people")


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE entry SET body = replace(body, '2.0', '20.0') WHERE number = 2",
        "DELETE FROM entry WHERE number = 2",
        "UPDATE entry SET number = number + 10 WHERE number = 4",
        "UPDATE entry SET hash = 'abc' WHERE number = 3",
        "INSERT INTO entry VALUES (5, '{\"kind\":\"note\"}', 'abc', '')",
    ],
)
def test_edits_show(path: Path, edit: str) -> None:
    fill(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER IF EXISTS entry_stays")
        database.execute("DROP TRIGGER IF EXISTS entry_kept")
        database.execute(edit)
        database.commit()
    with pytest.raises(CheckError, match="edited"):
        Ledger(path, "people")
    with pytest.raises(CheckError, match="edited"):
        entries(path)


@pytest.mark.parametrize("edit", ["UPDATE entry SET body = '{}'", "DELETE FROM entry"])
def test_the_file_itself_refuses_casual_edits(path: Path, edit: str) -> None:
    fill(path)
    with (
        closing(sqlite3.connect(path)) as database,
        pytest.raises(sqlite3.IntegrityError, match="appended"),
    ):
        database.execute(edit)


def test_two_coordinators_see_each_others_charges(path: Path) -> None:
    with Ledger(path, "people") as one, Ledger(path, "people") as two:
        one.charge("a", "round 1", "model-user", [ROUND])
        two.charge("b", "round 1", "model-user", [ROUND])
        one.charge("a", "round 2", "model-user", [ROUND])
        assert one.spent("model-user") == {ROUND: 3}
    assert len(entries(path)) == 4


def test_a_charge_that_cannot_be_written_is_an_error(path: Path) -> None:
    with Ledger(path, "people") as ledger:
        ledger._database.execute("PRAGMA query_only = ON")
        with pytest.raises(RunError, match="nothing is released"):
            ledger.charge("run", "round 1", "model-user", [ROUND])
        ledger._database.execute("PRAGMA query_only = OFF")
        assert ledger.spent("model-user") == {}
        ledger.charge("run", "round 1", "model-user", [ROUND])
        assert ledger.spent("model-user") == {ROUND: 1}


def test_nothing_is_written_for_nothing(path: Path) -> None:
    with Ledger(path, "people") as ledger:
        ledger.charge("run", "round 1", "model-user", [Charge(NoOpDpEvent())], round=1)
        assert ledger.spent("model-user") == {}
        assert ledger.charged_rounds("run") == {1}


def test_a_run_costs_as_much_as_its_most_frequent_node(path: Path) -> None:
    local = Charge(GaussianDpEvent(4.0), REPLACE)
    with Ledger(path, "people") as ledger:
        for number, nodes in enumerate((["a", "b"], ["c"], ["a"], ["c", "b"]), start=1):
            ledger.take_part("run", number, nodes, local)
        assert ledger.spent("server") == {local: 2}
        assert ledger.resting("run", 5, separation=2) == {"b", "c"}
        assert ledger.resting("run", 5, separation=3) == {"a", "b", "c"}
        assert ledger.resting("other run", 5, separation=3) == set()


def test_a_copy_is_a_whole_ledger(path: Path, tmp_path: Path) -> None:
    fill(path)
    with Ledger(path, "people") as ledger:
        ledger.copy(tmp_path / "copy.sqlite")
        assert entries(tmp_path / "copy.sqlite") == entries(path)
        assert ledger.head == (4, entries(path)[-1].hash)


def charge_and_release(path: Path, out: Connection) -> None:
    """In a child process: charge, say so, and again, until killed."""
    ledger = Ledger(path, "people")
    while True:
        ledger.charge("run", "a round", "model-user", [Charge(poisson(2.0, 0.1))])
        out.send("released")


def count_to_the_end(said: Connection) -> int:
    """How much more was said before the other end fell silent."""
    count = 0
    with contextlib.suppress(EOFError):
        while said.recv():
            count += 1
    return count


def test_killed_at_any_instant_it_has_charged_what_was_released(
    path: Path, fresh_processes: ForkServerContext
) -> None:
    """Real processes, killed without warning after a millisecond more each time."""
    released = 0
    for kill in range(30):
        said, out = fresh_processes.Pipe(duplex=False)
        child = fresh_processes.Process(target=charge_and_release, args=(path, out))
        child.start()
        out.close()
        with said:
            assert said.recv() == "released"
            time.sleep(kill / 1000)
            child.kill()
            released += 1 + count_to_the_end(said)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with Ledger(path, "people") as ledger:
            assert sum(ledger.spent("model-user").values()) >= released
    assert released >= 30


def test_entries_are_plain_json(path: Path) -> None:
    fill(path, rounds=1)
    with closing(sqlite3.connect(path)) as database:
        (text,) = database.execute("SELECT body FROM entry WHERE number = 2").fetchone()
    assert json.loads(text)["event"] == {
        "mechanism": "poisson-sampled",
        "sampling_rate": 0.1,
        "of": {"mechanism": "gaussian", "noise_multiplier": 2.0},
    }
