"""Private runs and `umbel verify` as a person, a script and a power cut see them."""

import json
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes import WarmCommand
from tests.server.tiny_private_app import write_app
from umbel.privacy.budget.accounting import spent
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.coordinator_key import data_folder
from umbel.server.private.ledger import entries
from umbel.server.private.verify import charges_in, verify

INSTANTS = {
    "before the budget is asked": ("umbel.server.private.budget:Budget.stop", 3, "before"),
    "before the charge": ("umbel.server.private.budget:Budget.charge", 3, "before"),
    "inside the charge": ("umbel.server.private.ledger:Ledger._append", 5, "after"),
    "after the charge": ("umbel.server.private.budget:Budget.charge", 3, "after"),
    "after the noise": ("umbel.strategies.stack:Stack.decode", 3, "after"),
    "after the round is written down": (
        "umbel.server.output.rundir:RunDirectory.append_round",
        4,
        "after",
    ),
    "before the checkpoint": ("umbel.server.checkpoint:save", 3, "before"),
    "after the checkpoint": ("umbel.server.checkpoint:save", 3, "after"),
    "while the certificate is made": ("umbel.server.private.certificate:sha256", 1, "before"),
}


def command(umbel: WarmCommand, tmp_path: Path, *words: str) -> tuple[int, str, str]:
    ended = umbel.command(*words, cwd=tmp_path / "here")
    return ended.status, ended.out, ended.err


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_power_cut_at_any_instant_never_lowers_epsilon(
    umbel: WarmCommand, tmp_path: Path, instant: str
) -> None:
    app = write_app(tmp_path / "app")
    out, here = tmp_path / "runs" / "run", tmp_path / "here"
    options = {"noise-multiplier": 4.0, "rounds": 4, "population": "people"}
    killed = umbel.run(
        cwd=here, app=app, options=options, workers=0, out=out, deaths=[INSTANTS[instant]]
    )
    assert killed.status == -signal.SIGKILL
    ledger = data_folder() / "populations" / "people.sqlite"
    charges = charges_in(entries(ledger))["model-user"]
    released = max((line["round"] for line in RunDirectory(out).rounds()), default=0)
    assert sum(charges.values()) >= released
    ended = umbel.run(cwd=here, resume=out, workers=0)
    assert ended.status == 0, ended.err
    after = charges_in(entries(ledger))["model-user"]
    assert charges <= after
    assert sum(after.values()) >= 4
    assert ended.result["epsilon"] == pytest.approx(spent(after, 1e-5).epsilon)
    assert verify(out) == []


def test_epsilon_alone_from_the_command_line(umbel: WarmCommand, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    words = ("run", str(app), "-c", "epsilon=3", "--workers", "0", "--json")
    status, out, err = command(umbel, tmp_path, *words)
    assert status == 0, err
    said = json.loads(out.splitlines()[-1])
    assert 2.9 < said["epsilon"] <= 3
    assert "privacy: epsilon 3 at delta 1e-05 against model users" in err
    status, out, err = command(umbel, tmp_path, "verify", said["run"])
    assert status == 0 and out.endswith("\nthe certificate holds\n"), err
    assert out.startswith("the signer is unknown")
    certificate = RunDirectory(tmp_path / "here" / said["run"]).certificate_path
    certificate.write_text(certificate.read_text().replace('"delta": 1e-05', '"delta": 1e-06'))
    status, out, err = command(umbel, tmp_path, "verify", said["run"], "--json")
    assert status == 3
    found = json.loads(out)
    assert not found["ok"]
    assert any("signature" in problem for problem in found["problems"])


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("epsilon=-1", "epsilon is -1"),
        ("epsilon=0", "epsilon is 0"),
        ("epsilon=inf", "epsilon is inf"),
        ("epsilon=nan", "epsilon is nan"),
        ("epsilon=3 delta=1", "delta is 1"),
        ("epsilon=3 delta=0", "delta is 0"),
        ("epsilon=3 clipping-norm=0", "clipping-norm is 0"),
        ("epsilon=3 clipping-norm=-1", "clipping-norm is -1"),
        ("epsilon=3 clipping-norm=inf", "clipping-norm is inf"),
        ("epsilon=3 noise-seed=5", "did you mean insecure-noise-seed?"),
        ("epsilon=1e-8 delta=1e-9", "no noise meets"),
        ("epsilon=3 cohort-size=50", "20 nodes"),
    ],
)
def test_bad_values_exit_with_two_and_one_sentence(
    umbel: WarmCommand, tmp_path: Path, config: str, word: str
) -> None:
    app = write_app(tmp_path / "app")
    status, _, err = command(umbel, tmp_path, "run", str(app), "-c", config, "--workers", "0")
    assert status == 2
    last = err.splitlines()[-1]
    assert last.startswith("umbel: ")
    assert word in last


def test_a_delta_that_gives_one_node_away_is_warned_of(umbel: WarmCommand, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    words = ("run", str(app), "-c", "epsilon=3 delta=0.05 rounds=1", "--workers", "0")
    status, _, err = command(umbel, tmp_path, *words)
    assert status == 0
    assert "delta 0.05 is not below" in err


def test_ledgers_that_are_anothers_or_edited_stop_a_run(umbel: WarmCommand, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    words = ("run", str(app), "--workers", "0", "--json", "-c")
    given = "noise-multiplier=4 rounds=1 population=people"
    status, out, err = command(umbel, tmp_path, *words, given)
    assert status == 0, err
    run = json.loads(out.splitlines()[-1])["run"]
    ledger = data_folder() / "populations" / "people.sqlite"
    other = f"noise-multiplier=4 rounds=1 population=others ledger={ledger}"
    status, _, err = command(umbel, tmp_path, *words, other)
    assert status == 2
    assert "'people'" in err.splitlines()[-1]
    for file in (ledger, RunDirectory(tmp_path / "here" / run).ledger_path):
        with closing(sqlite3.connect(file)) as database:
            for (trigger,) in database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall():
                database.execute(f"DROP TRIGGER {trigger}")
            database.execute("UPDATE entry SET body = replace(body, '4.0', '9.0')")
            database.commit()
    status, _, err = command(umbel, tmp_path, *words, given)
    assert status in (2, 3)
    last = err.splitlines()[-1]
    assert last.startswith("umbel: ")
    assert "people.sqlite" in last
    status, _, err = command(umbel, tmp_path, "verify", run)
    assert status == 3


def test_verify_of_what_is_no_private_run(umbel: WarmCommand, tmp_path: Path) -> None:
    status, _, err = command(umbel, tmp_path, "verify", str(tmp_path))
    assert status == 2
    assert "not a run directory" in err


def test_planning_commands_are_mounted(umbel: WarmCommand, tmp_path: Path) -> None:
    words = ("--sampling-rate", "0.1", "--rounds", "100", "--delta", "1e-5", "--json")
    status, out, err = command(
        umbel, tmp_path, "privacy", "epsilon", "--noise-multiplier", "2", *words
    )
    assert status == 0, err
    assert json.loads(out)["epsilon"] == pytest.approx(2.3374, rel=5e-3)
    status, _, err = command(umbel, tmp_path, "privacy", "noise", "--epsilon", "-1", *words)
    assert status == 2
    assert "--epsilon" in err.splitlines()[-1]


def test_the_coordinators_key_is_its_own(umbel: WarmCommand, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    ended = umbel.run(cwd=tmp_path / "here", app=app, options={"noise-multiplier": 4.0}, workers=0)
    assert ended.status == 0, ended.err
    assert Path(os.environ["UMBEL_KEY"]).stat().st_mode & 0o077 == 0
