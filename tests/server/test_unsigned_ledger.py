"""Ledgers of format 1, which signed nothing: what was spent in them is not forgotten."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_private_run import Lab, certificate, ledger_of
from umbel.core.errors import CheckError, ConfigError, RunError
from umbel.privacy.budget.accounting import poisson, spent
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge, to_json
from umbel.server.private.coordinator_key import coordinator_key, public_text
from umbel.server.private.ledger import Ledger, entries
from umbel.server.private.verify import verify

ROUND = Charge(poisson(2.0, 0.1), ADD_OR_REMOVE, 1e-12)
OLD_SCHEMA = """
CREATE TABLE entry (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE participation (
    run TEXT NOT NULL, node TEXT NOT NULL, last INTEGER NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (run, node)) WITHOUT ROWID;
CREATE TRIGGER entry_stays BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
CREATE TRIGGER entry_kept BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'a ledger is only ever appended to'); END;
INSERT INTO participation VALUES ('old', 'ada', 3, 3);
"""


def old_bodies(rounds: int = 3) -> list[Mapping[str, Any]]:
    """What the earlier version wrote of a run; infinity stood there bare."""
    charge = {
        "kind": "charge", "run": "old", "against": "model-user", "event": to_json(ROUND.event),
        "relation": "add-or-remove-one", "slack": ROUND.slack,
    }  # fmt: skip
    begun = {"kind": "run", "run": "old", "noise_multiplier": 2.0, "target_epsilon": float("inf")}
    return [
        {"kind": "open", "population": "people", "format": 1},
        begun,
        *({**charge, "what": f"round {n}", "round": n} for n in range(1, rounds + 1)),
    ]


def write_old(path: Path, bodies: list[Mapping[str, Any]]) -> None:
    """A ledger as version 1 of the format has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(OLD_SCHEMA)
        before = "0" * 64
        for number, body in enumerate(bodies, start=1):
            body = {"time": "2026-11-01T10:00:00+00:00", **body}
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
            database.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, text, before))
        database.commit()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "people.sqlite"
    write_old(path, old_bodies())
    return path


def test_what_was_spent_counts_on_and_is_signed_from_now_on(old: Path) -> None:
    was = entries(old)
    with Ledger(old, "people") as ledger:
        assert ledger.taken_over == 5 and "5 entries were taken over" in ledger.notes()[0]
        assert ledger.spent("model-user") == {ROUND: 3}
        assert ledger.spent("model-user", "old") == {ROUND: 3}
        assert ledger.charged_rounds("old") == {1, 2, 3}
        assert ledger.runs("old")[0]["target_epsilon"] == float("inf")
        assert ledger.resting("old", 4, 2) == {"ada"}
        ledger.charge("new", "round 1", "model-user", [ROUND], round=1)
    found = entries(old)
    public = public_text(coordinator_key())
    assert all(entry.signed(public) for entry in found)
    opened = found[0].body
    assert opened["taken_over"] == {"format": 1, "entries": 5, "head": was[-1].hash}
    assert [entry.body.get("unsigned", False) for entry in found] == [False, *[True] * 4, False]
    assert found[2].body == {**was[2].body, "unsigned": True}  # its time is when it happened
    with Ledger(old, "people") as again:
        assert again.taken_over == 0 and again.notes() == []
        assert again.spent("model-user") == {ROUND: 4}
    # The old table is there still, as it was.
    with closing(sqlite3.connect(old)) as database:
        (rows,) = database.execute("SELECT COUNT(*) FROM entry_unsigned").fetchone()
    assert rows == 5


def test_two_coordinators_take_one_over_once(old: Path) -> None:
    with Ledger(old, "people") as one, Ledger(old, "people") as two:
        assert (one.taken_over, two.taken_over) == (5, 0)
        two.charge("new", "round 1", "model-user", [ROUND])
        one.charge("new", "round 2", "model-user", [ROUND])
        assert one.spent("model-user") == {ROUND: 5}


def test_an_edited_one_is_refused_and_left_as_it_is(tmp_path: Path, old: Path) -> None:
    with closing(sqlite3.connect(old)) as database:
        database.execute("DROP TRIGGER entry_kept")
        database.execute("DELETE FROM entry WHERE number = 4")
        database.commit()
    with pytest.raises(CheckError, match="entry 4 is not what was written there"):
        Ledger(old, "people")
    with closing(sqlite3.connect(old)) as database:
        assert len(database.execute("PRAGMA table_info(entry)").fetchall()) == 3
    other = tmp_path / "other.sqlite"
    write_old(other, old_bodies())
    with pytest.raises(ConfigError, match="the ledger of the population 'people'"):
        Ledger(other, "others")


def test_one_that_was_signed_before_is_not_taken_for_an_earlier_one(old: Path) -> None:
    """Who takes the signatures away could also take charges away."""
    with Ledger(old, "people") as ledger:
        ledger.charge("new", "round 1", "model-user", [ROUND])
    old.unlink()
    write_old(old, old_bodies(rounds=0))
    with pytest.raises(CheckError, match="was signed when it was last used here"):
        Ledger(old, "people")


def test_one_that_cannot_be_written_says_what_to_do(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(old)) as other:
        other.execute("BEGIN IMMEDIATE")
        real = sqlite3.connect

        def impatient(*words: Any, **more: Any) -> sqlite3.Connection:
            return real(*words, **{**more, "timeout": 0.01})

        monkeypatch.setattr(sqlite3, "connect", impatient)
        with pytest.raises((RunError, ConfigError), match=r"cannot be (taken over|opened)"):
            Ledger(old, "people")
        other.execute("ROLLBACK")
    monkeypatch.undo()
    with Ledger(old, "people") as ledger:
        assert ledger.spent("model-user") == {ROUND: 3}


def test_a_new_run_continues_its_budget_and_is_certified(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    write_old(ledger_of(), old_bodies())
    before = spent({ROUND: 3}, 1e-5).epsilon
    with pytest.raises(ConfigError, match="is spent"):
        lab.run("one", epsilon=before, population="people")
    assert any("which signed nothing: its 5 entries were taken over" in x for x in lab.heard.lines)
    lab.run("two", epsilon=before + 2, population="people")
    assert any("has spent epsilon" in line for line in lab.heard.lines)
    assert verify(lab.directory("two").path) == []
    (total,) = [row for row in certificate(lab, "two")["total"] if row["against"] == "model-user"]
    assert before < total["epsilon"] <= before + 2.001
