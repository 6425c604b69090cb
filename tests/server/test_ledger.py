"""The ledger only grows, shows edits, and is on disk before anything is released."""

import contextlib
import hashlib
import json
import random
import signal
import sqlite3
import time
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NoOpDpEvent

from umbel.core.errors import CheckError, ConfigError, RunError
from umbel.privacy.budget.accounting import poisson
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, Charge
from umbel.server.privacy_gate import BudgetSpentError
from umbel.server.private.coordinator_key import coordinator_key, public_text
from umbel.server.private.ledger import Ledger, entries

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


def test_two_coordinators_do_not_overshoot_together(path: Path) -> None:
    """Both are told that there is room for one more release; only one of them makes it."""
    with Ledger(path, "people") as one, Ledger(path, "people") as two:

        def room(ledger: Ledger) -> bool:
            return sum(ledger.spent("model-user").values()) < 1

        assert room(one) and room(two)
        one.charge("a", "round 1", "model-user", [ROUND], fits=lambda: room(one))
        with pytest.raises(BudgetSpentError, match="round 1"):
            two.charge("b", "round 1", "model-user", [ROUND], fits=lambda: room(two))
        with pytest.raises(BudgetSpentError, match="participation"):
            two.take_part("b", 1, ["n"], ROUND, "model-user", fits=lambda: room(two))
        assert two.resting("b", 2, separation=2) == set()
        assert two.spent("model-user") in ({}, {ROUND: 1})
        two.charge("b", "a note", "server", [ROUND])
        assert two.spent("model-user") == {ROUND: 1}
    assert len(entries(path)) == 3


def test_a_ledger_that_is_edited_while_it_is_open_shows(path: Path) -> None:
    with Ledger(path, "people") as ledger:
        ledger.charge("run", "round 1", "model-user", [ROUND])
        with closing(sqlite3.connect(path)) as database:
            database.execute("DROP TRIGGER entry_kept")
            database.execute("DELETE FROM entry WHERE number = 2")
            database.commit()
        with pytest.raises(CheckError, match="while it was in use"):
            ledger.charge("run", "round 2", "model-user", [ROUND])


def rewritten(path: Path, divide: float) -> None:
    """Write a whole ledger anew: a right chain of hashes over other entries, signatures kept."""
    before = "0" * 64
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER entry_stays")
        rows = database.execute("SELECT number, body FROM entry ORDER BY number").fetchall()
        for number, text in rows:
            body = json.loads(text)
            if body["kind"] == "charge":
                body["event"]["sampling_rate"] /= divide
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
            database.execute(
                "UPDATE entry SET body = ?, hash = ? WHERE number = ?", (text, before, number)
            )
        database.commit()


def test_a_ledger_that_was_written_anew_is_not_signed(path: Path) -> None:
    fill(path)
    public = public_text(coordinator_key())
    assert all(entry.signed(public) for entry in entries(path))
    rewritten(path, divide=10)
    assert not any(entry.signed(public) for entry in entries(path) if entry.body["kind"] != "open")
    with pytest.raises(ConfigError, match="not signed"):
        Ledger(path, "people")


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
    ledger.admit("run", ["a", "b"])
    ledger.begin("run")
    while True:
        ledger.charge(
            "run", "a round", "model-user", [Charge(poisson(2.0, 0.1))], fits=lambda: True
        )
        out.send("released")
        ledger.end("run")


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
    """Real processes, killed without warning at fifty random instants around their charges."""
    released, instants = 0, random.Random(14)
    for _ in range(50):
        said, out = fresh_processes.Pipe(duplex=False)
        child = fresh_processes.Process(target=charge_and_release, args=(path, out))
        child.start()
        out.close()
        with said:
            assert said.recv() == "released"
            time.sleep(instants.uniform(0, 0.02))
            child.kill()
            released += 1 + count_to_the_end(said)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with Ledger(path, "people") as ledger:
            assert sum(ledger.spent("model-user").values()) >= released
    assert released >= 50


def test_entries_are_plain_json(path: Path) -> None:
    fill(path, rounds=1)
    with closing(sqlite3.connect(path)) as database:
        (text,) = database.execute("SELECT body FROM entry WHERE number = 2").fetchone()
    assert json.loads(text)["event"] == {
        "mechanism": "poisson-sampled",
        "sampling_rate": 0.1,
        "of": {"mechanism": "gaussian", "noise_multiplier": 2.0},
    }
