"""The node's own ledger against a coordinator that lies: it asks again, anew, under other names,
with other options, and puts the app's memory back."""

import copy
import json
import math
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from flwr.app import ConfigRecord

from tests.clients.node_asker import (
    DP_SGD,
    NODE,
    PLAIN,
    QueryRunner,
    examples,
    linear,
    secure_round,
    update_of,
)
from umbel.clients.ledger.database import Asked, settle
from umbel.clients.ledger.file import KEPT_REPLIES, REPLIES, GoneError, LedgerFile
from umbel.clients.ledger.names import DATA, LEDGER
from umbel.clients.ledger.node_ledger import Limits, StateLedger, total
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.core.errors import ConfigError, RunError
from umbel.federation import Federation
from umbel.privacy.budget.accounting import spent
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, ZERO_OUT, Charge
from umbel.privacy.masking import keys
from umbel.strategies import statement as statements
from umbel.strategies.collect import PlainSum
from umbel.strategies.policy.reading import POLICY
from umbel.strategies.private.clip import Clip
from umbel.strategies.release import Release
from umbel.strategies.secure.identity import enrolled_key
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts, Stateless
from umbel.transport.certificates import make_server_identity, open_authority, save_identity

LOCAL = {"epsilon": 5.0, "mechanism": "local", "rounds": 1}


def dp_sgd(folder: Path | None, **changes: Any) -> QueryRunner:
    return QueryRunner(DP_SGD, folder, {"rounds": 3, "batch-size": 10, **changes})


def row(folder: Path, scope: str = "data", name: str = "default") -> dict[str, Any]:
    found = [r for r in LedgerFile(folder).budget() if (r["scope"], r["name"]) == (scope, name)]
    (only,) = found
    return only


# ── the same message ──────────────────────────────────────────────────────────────────────────


def test_the_same_message_gets_the_same_bytes_and_is_charged_once(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path)
    first = node.ask(1)
    for _ in range(5):
        again = node.ask(1)
        assert torch.equal(update_of(first), update_of(again))
        assert statements.read(again.content) == statements.read(first.content)
    assert row(tmp_path)["participations"] == 1


def test_the_apps_memory_goes_where_it_was_after_the_answer(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path)
    node.ask(1)
    after = copy.deepcopy(node.memory)
    node.memory["later"] = ConfigRecord({"rounds": 9})
    node.ask(1)
    assert node.memory == after


def test_another_message_under_the_same_id_is_charged_like_any_other(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path)
    first = node.ask(1)
    other = node.ask(1, shift=0.5)
    assert not torch.equal(update_of(first), update_of(other))
    assert row(tmp_path)["participations"] == 2


def test_an_answer_that_is_kept_no_longer_is_not_given_again(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path)
    node.ask(1)
    for file in (tmp_path / REPLIES).iterdir():
        file.unlink()
    with pytest.raises(GoneError, match="keeps its reply no longer"):
        node.ask(1)
    assert row(tmp_path)["participations"] == 1


def test_only_the_latest_answers_take_room(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path)
    for number in range(KEPT_REPLIES + 5):
        ledger.keep(_asked(number), "d", b"reply")
        for file in (tmp_path / REPLIES).iterdir():
            os.utime(file, (0, 0))
    ledger.keep(_asked(1000), "d", b"reply")
    assert len(list((tmp_path / REPLIES).iterdir())) == KEPT_REPLIES
    assert ledger.answered(_asked(1000).message, "d") == b"reply"
    with pytest.raises(GoneError):
        ledger.answered(_asked(0).message, "d")
    assert ledger.answered("never asked", "d") is None


# ── other runs, other names, older memories ───────────────────────────────────────────────────


def test_a_new_run_does_not_forget(tmp_path: Path) -> None:
    """Eight runs of three rounds: what one run promised is what all of them get."""
    given = 0
    for run in range(1, 9):
        node = dp_sgd(tmp_path)
        node.run = run
        for number in range(1, 4):
            try:
                node.ask(number)
                given += 1
            except RunError as problem:
                assert "takes no further part" in str(problem)
                assert "first run about" in str(problem)
    assert given == 3
    assert row(tmp_path)["participations"] == given
    assert row(tmp_path)["epsilon"] <= 0.5
    assert row(tmp_path)["last_run"] == "1"


def test_another_population_is_the_same_data(tmp_path: Path) -> None:
    for number in range(1, 4):
        dp_sgd(tmp_path).ask(number)
    with pytest.raises(RunError, match="first run about the data 'default'"):
        QueryRunner(
            DP_SGD, tmp_path, {"rounds": 3, "batch-size": 10, "population": "b"}, run=2
        ).ask(1)
    assert [r["name"] for r in LedgerFile(tmp_path).budget() if r["scope"] == "population"] == [
        "default"
    ]


def test_other_data_of_the_same_node_have_a_budget_of_their_own(tmp_path: Path) -> None:
    for number in range(1, 4):
        dp_sgd(tmp_path).ask(number)
    ward = QueryRunner(
        DP_SGD,
        tmp_path,
        {"rounds": 3, "batch-size": 10, "population": "b"},
        run=2,
        more={DATA: "ward-b"},
    )
    ward.ask(1)
    assert row(tmp_path, name="ward-b")["participations"] == 1
    assert row(tmp_path)["participations"] == 3


def test_an_older_memory_of_the_app_lowers_nothing(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path)
    before = copy.deepcopy(node.memory)
    for number in range(1, 4):
        node.memory = copy.deepcopy(before)
        node.ask(number)
    node.memory = copy.deepcopy(before)
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(4)
    assert row(tmp_path)["participations"] == 3


@pytest.mark.parametrize(
    "lie",
    [
        {"example_epsilon": 1.0},
        {"example_noise": 1e-3},
        {"insecure_noise_seed": 1},
        {"rounds": 1, "example_epsilon": 1.0},
        {"example_delta": 1e-3, "example_epsilon": 1.0},
        {"local_steps": 40, "example_epsilon": 1.0},
    ],
)
def test_options_that_change_cannot_raise_what_was_promised(
    tmp_path: Path, lie: dict[str, Any]
) -> None:
    node = dp_sgd(tmp_path)
    node.ask(1)
    before = row(tmp_path)
    with pytest.raises(RunError, match="run 1 promised it in its first message"):
        node.ask(2, **lie)
    with pytest.raises(RunError, match="the first run about the population 'default'"):
        node.ask(2, run=2, **lie)
    assert row(tmp_path) == before


def test_noise_that_was_chosen_by_hand_is_a_promise_too(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path, **{"example-noise": 4.0})
    for number in range(1, 4):
        node.ask(number)
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(4)


def test_local_noise_that_was_planned_for_one_participation_is_drawn_once(tmp_path: Path) -> None:
    node = QueryRunner(PLAIN, tmp_path, LOCAL)
    first = node.ask(1)
    for number in range(40):
        with pytest.raises(RunError, match="takes no further part"):
            node.ask(1, name=f"again {number}")
    assert torch.equal(update_of(node.ask(1)), update_of(first))
    found = row(tmp_path)
    assert (found["unit"], found["participations"]) == ("node", 1)
    assert 4.9 < found["epsilon"] <= 5.0
    assert found["relation"] == "replace-one"


def test_planned_participations_of_local_noise_all_fit(tmp_path: Path) -> None:
    node = QueryRunner(PLAIN, tmp_path, LOCAL | {"rounds": 5})
    for number in range(1, 6):
        node.ask(number)
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(6)
    assert row(tmp_path)["epsilon"] <= 5.0


def test_more_rounds_later_are_no_way_round_it(tmp_path: Path) -> None:
    """The noise grows with the rounds that are planned, so some more fit, and the sum holds."""
    node = QueryRunner(PLAIN, tmp_path, LOCAL)
    node.ask(1)
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(2, rounds=10_000, name="more")
    assert row(tmp_path)["epsilon"] <= 5.0


def test_without_a_folder_the_nodes_records_hold_the_ledger() -> None:
    node = QueryRunner(PLAIN, None, LOCAL)
    node.ask(1)
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(1, name="again")
    assert StateLedger(node.memory).participations("node") == 1


def test_a_run_that_is_not_private_leaves_no_ledger(tmp_path: Path) -> None:
    node = QueryRunner(PLAIN, tmp_path)
    reply = node.ask(1)
    assert statements.read(reply.content) == []
    assert list(tmp_path.iterdir()) == []
    assert len(node.memory) == 0


def test_the_ledger_is_its_owners_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    dp_sgd(tmp_path).ask(1)
    for file in (tmp_path / LEDGER, *(tmp_path / REPLIES).iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(b"this is no database" * 100)
    with pytest.raises((RunError, ConfigError), match="ledger"):
        dp_sgd(tmp_path).ask(1)


def test_a_ledger_of_a_later_format_lets_nothing_leave(tmp_path: Path) -> None:
    """What an older version does not understand, it does not count as nothing spent."""
    node = dp_sgd(tmp_path)
    assert update_of(node.ask(1)) is not None
    path = LedgerFile(tmp_path).path
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version=2")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"of format 2; this version of Umbel knows 1"):
        LedgerFile(tmp_path).budget()
    with pytest.raises((ConfigError, RunError), match=r"of format 2"):
        node.ask(2)
    assert path.read_bytes() == before


@dataclass(frozen=True)
class OwnNoise(Stateless):
    """An app's own layer of local noise, of which Umbel knows nothing but its claim."""

    name: str = "own-noise"
    against: Any = "server"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        return facts.replace(l2_bound=None)

    def claim(self, facts: Facts) -> Claim:  # noqa: ARG002
        return Claim(GaussianDpEvent(4.0), "client", REPLACE, self.against, sampled=False)


def test_an_apps_own_layer_is_charged_for_what_it_claims(tmp_path: Path) -> None:
    def app(against: str) -> Federation:
        stack = Stack((Clip(1.0), OwnNoise(against=against)), PlainSum(weighting="fixed"))
        return Federation(TorchTrainer(linear), data=examples, stack=stack)

    node = QueryRunner(app("server"), tmp_path / "node", {"rounds": 2})
    for number in (1, 2):
        (signed,) = statements.read(node.ask(number).content)
        assert signed.statement().mechanism == "own-noise"
    with pytest.raises(RunError, match="takes no further part"):
        node.ask(3)
    expected = spent({Charge(GaussianDpEvent(4.0), REPLACE): 2}, 1e-5).epsilon
    assert row(tmp_path / "node")["epsilon"] == pytest.approx(expected)
    central = QueryRunner(app("model-user"), tmp_path / "other", {"rounds": 2})
    assert statements.read(central.ask(1).content) == []


# ── the owner's limits ────────────────────────────────────────────────────────────────────────


def _asked(number: int = 1, run: str = "1", population: str = "p") -> Asked:
    return Asked(run, number, population, "d", "hub", f"{run}/{number}", f"{run}-{number}")


def _noise(multiplier: float = 10.0, promised: float | None = None, **changes: Any) -> Release:
    fields: dict[str, Any] = {
        "unit": "node",
        "mechanism": "local-gaussian",
        "charge": Charge(GaussianDpEvent(multiplier), REPLACE),
        "count": 1,
        "planned": 1000,
        "promised": promised,
        "delta": 1e-5,
        "noise_multiplier": multiplier,
        "norm": 1.0,
    }
    return Release(**fields | changes)


def test_the_owners_limit_stands_in_for_the_first_promise(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path, Limits(epsilon=1.5))
    for number in range(1, 100):
        try:
            ledger.account(_asked(number)).charge(_noise())
        except RunError as problem:
            assert "policy of this node" in str(problem)
            break
    whole = {Charge(GaussianDpEvent(10.0), REPLACE): number}
    assert spent(whole, 1e-5).epsilon > 1.5  # one more would have been too many
    found = ledger.budget()[0]
    assert found["participations"] == number - 1
    assert (found["epsilon_limit"], found["limit_from"]) == (1.5, "policy")
    # Within it, a new run has what it promises first.
    more = LedgerFile(tmp_path, Limits(epsilon=50.0))
    more.account(_asked(1, run="2")).charge(_noise(promised=0.9))
    with pytest.raises(RunError, match="run 2 promised"):
        more.account(_asked(2, run="2")).charge(_noise(0.5, promised=90.0))


@pytest.mark.parametrize("said", ['"unlimited"', "inf"])
def test_an_owner_who_wants_no_limit_over_runs_says_so(tmp_path: Path, said: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    node = QueryRunner(DP_SGD, state, {"rounds": 1, "batch-size": 10})
    node.ask(1)
    with pytest.raises(
        RunError, match='by record-epsilon = NUMBER or record-epsilon = "unlimited"'
    ):
        node.ask(1, run=2)
    node.more = {POLICY: str(_policy(tmp_path, f"record-epsilon = {said}"))}
    for run in (2, 3, 4):
        node.ask(1, run=run)
        with pytest.raises(RunError, match=f"run {run} promised it in its first message"):
            node.ask(2, run=run)  # each run is held to its own word all the same
    (found,) = [
        r
        for r in LedgerFile(state, Limits(record_epsilon=math.inf)).budget()
        if r["scope"] == "data"
    ]
    assert found["participations"] == 4 and found["epsilon"] > 0.9
    assert (found["epsilon_limit"], found["limit_from"]) == (None, "policy")


def test_without_a_limit_what_was_held_is_weighed_again_all_the_same(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path, Limits(epsilon=math.inf))
    one, two = ledger.account(_asked(1)), ledger.account(_asked(1, run="2"))
    one.hold(b"1", [_noise()])
    two.hold(b"2", [_noise()])
    two.settle(b"2")
    one.settle(b"1")
    assert ledger.budget()[0]["participations"] == 2


def test_participations_are_limited_over_runs(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path, Limits(participations=3))
    for run in ("1", "2", "3"):
        ledger.account(_asked(1, run, population=f"p{run}")).charge(_noise())
    with pytest.raises(RunError, match="allows 3 participations"):
        ledger.account(_asked(1, "4")).charge(_noise())


def test_a_limit_on_participations_counts_bare_updates_too(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    more = {POLICY: str(_policy(tmp_path, "participations = 2"))}
    node = QueryRunner(PLAIN, tmp_path / "state", more=more)
    for number in (1, 1, 2):
        assert statements.read(node.ask(number).content) == []
    with pytest.raises(RunError, match="allows 2 participations"):
        node.ask(3)
    found = row(tmp_path / "state")
    assert (found["participations"], found["epsilon"], found["epsilon_limit"]) == (2, 0.0, None)


def test_records_and_the_node_are_counted_apart(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path, Limits(epsilon=1.0, record_epsilon=5.0))
    charge = Charge(GaussianDpEvent(2.0), ADD_OR_REMOVE)
    account = ledger.account(_asked(1))
    account.charge(_noise(unit="record", mechanism="dp-sgd", charge=charge))
    account.charge(_noise())
    assert {(r["unit"], r["participations"]) for r in ledger.budget()} == {
        ("record", 1),
        ("node", 1),
    }
    with pytest.raises(RunError, match="records"):
        ledger.account(_asked(2)).charge(_noise(unit="record", charge=charge, count=30))


def test_releases_that_no_accountant_adds_are_added_as_bounds() -> None:
    local, shares = Charge(GaussianDpEvent(8.0), REPLACE), Charge(GaussianDpEvent(8.0), ZERO_OUT)
    together, relation = total({local: 2, shares: 3}, 1e-5)
    apart = spent({local: 2}, 5e-6).epsilon + spent({shares: 3}, 5e-6).epsilon
    assert together == pytest.approx(apart, rel=1e-3)
    assert relation == "zero-out-one"
    assert total({Charge(NonPrivateDpEvent()): 1}, 1e-5)[0] == math.inf
    assert total({}, 1e-5)[0] == 0.0


# ── what a secure sum will take ───────────────────────────────────────────────────────────────


def test_what_is_held_counts_once_it_leaves(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path)
    for number in range(1, 5):  # sessions that are given up cost nothing
        (receipt,) = ledger.account(_asked(number)).hold(bytes([number]) * 32, [_noise()])
        assert receipt.participations == 1
    assert ledger.budget() == []
    settle(tmp_path, bytes([4]) * 32)
    settle(tmp_path, bytes([4]) * 32)
    settle(tmp_path, bytes([9]) * 32)
    assert row(tmp_path, name="d")["participations"] == 1


def test_two_sessions_cannot_both_take_what_is_left(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path, Limits(participations=1))
    for number in (1, 2):
        ledger.account(_asked(number)).hold(bytes([number]) * 32, [_noise()])
    settle(tmp_path, bytes([1]) * 32)
    with pytest.raises(RunError, match="takes no further part"):
        settle(tmp_path, bytes([2]) * 32)
    assert row(tmp_path, name="d")["participations"] == 1


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_secure_sums_noise_is_charged_when_the_masked_update_leaves(
    tmp_path: Path, with_folder: bool
) -> None:
    options = {"secure": True, "noise-multiplier": 4.0, "sampling": "all", "rounds": 2}
    nodes = {
        id_: QueryRunner(PLAIN, tmp_path / str(id_) if with_folder else None, options)
        for id_ in (1001, 1002, 1003)
    }

    def charged() -> list[int]:
        if with_folder:
            found = [LedgerFile(tmp_path / str(id_)).budget() for id_ in nodes]
            return [rows[0]["participations"] if rows else 0 for rows in found]
        return [StateLedger(node.memory).participations("node") for node in nodes.values()]

    for until in ("share", "mask"):  # sessions of which nothing has left cost nothing
        assert secure_round(nodes, 1, until=until) is None
        assert charged() == [0, 0, 0]
    assert secure_round(nodes, 1, until="agree") is None  # the masked updates are out
    assert charged() == [1, 1, 1]
    done = secure_round(nodes, 2)
    assert done is not None and done.replies == 3
    assert charged() == [2, 2, 2]
    if with_folder:
        refused = secure_round(nodes, 3)
        assert refused is not None and refused.replies == 0
        assert all("takes no further part" in each.reason for each in refused.rejected)
        assert charged() == [2, 2, 2]


# ── statements ────────────────────────────────────────────────────────────────────────────────


def _policy(folder: Path, text: str) -> Path:
    file = folder / "policy.toml"
    file.write_text(text + "\n")
    return file


def _enrol(folder: Path) -> bytes:
    """Give the node a key, as enrolment does; its public half."""
    authority = open_authority(folder / "authority")
    save_identity(folder / "identity.pem", make_server_identity(authority, ["node"]))
    return keys.public_identity(enrolled_key(str(folder / "identity.pem")))


def test_a_reply_carries_what_its_nodes_ledger_says_over_the_nodes_key(tmp_path: Path) -> None:
    public = _enrol(tmp_path)
    node = dp_sgd(tmp_path)
    said = [statements.read(node.ask(number).content) for number in (1, 2)]
    node.run = 2
    node.more = {POLICY: str(_policy(tmp_path, "record-epsilon = 9.0"))}
    said.append(statements.read(node.ask(1).content))
    previous = ""
    for number, (signed,) in enumerate(said, 1):
        assert statements.verify(signed, public)
        it = signed.statement()
        assert (it.node, it.unit, it.mechanism) == (str(NODE), "record", "dp-sgd")
        assert (it.population, it.relation) == ("default", "add-or-remove-one")
        assert (it.participations, it.previous) == (number, previous)
        assert (it.sampling_rate, it.steps, it.norm) == (0.25, 4, 1.0)
        previous = signed.digest
    one, two, other = (signed.statement() for (signed,) in said)
    assert one.epsilon is not None and two.epsilon is not None and other.epsilon is not None
    assert one.epsilon < two.epsilon < other.epsilon
    assert (two.run, two.round, two.run_epsilon, two.limit) == ("1", 2, two.epsilon, 0.5)
    assert (other.run, other.round, other.run_epsilon) == ("2", 1, one.epsilon)
    assert two.epsilon == pytest.approx(row(tmp_path)["epsilon"], rel=1) and two.epsilon <= 0.5


def test_a_node_without_a_key_says_so_by_saying_it_unsigned(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        (signed,) = statements.read(dp_sgd(folder).ask(1).content)
        assert not signed.is_signed and not statements.verify(signed)
        assert signed.statement().participations == 1


def test_seeded_noise_is_stated_as_no_privacy_at_all(tmp_path: Path) -> None:
    node = dp_sgd(tmp_path, **{"insecure-noise-seed": 1})
    (signed,) = statements.read(node.ask(1).content)
    assert (signed.statement().epsilon, signed.statement().limit) == (None, None)
    assert row(tmp_path)["epsilon"] is None


def test_noise_of_the_node_over_dp_sgd_is_stated_for_both_units(tmp_path: Path) -> None:
    node = QueryRunner(DP_SGD, tmp_path, {**LOCAL, "batch-size": 10})
    said = [signed.statement() for signed in statements.read(node.ask(1).content)]
    assert [(it.unit, it.mechanism) for it in said] == [
        ("record", "dp-sgd"),
        ("node", "local-gaussian"),
    ]


# ── several processes ─────────────────────────────────────────────────────────────────────────


def test_two_processes_cannot_spend_the_same_budget(
    tmp_path: Path, fresh_processes: ForkServerContext
) -> None:
    workers = [
        fresh_processes.Process(target=_spend, args=(tmp_path, name), daemon=True)
        for name in ("a", "b", "c")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    given = sum(len((tmp_path / name).read_text()) for name in ("a", "b", "c"))
    assert given == 7
    assert row(tmp_path, name="d")["participations"] == 7


def _spend(folder: Path, name: str) -> None:
    ledger = LedgerFile(folder, Limits(participations=7))
    with (folder / name).open("w") as sent:
        for number in range(6):
            try:
                ledger.account(_asked(number, name)).charge(_noise())
            except RunError:
                continue
            sent.write("x")


# ── killed at any instant ─────────────────────────────────────────────────────────────────────

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from tests.clients.node_asker import PLAIN, QueryRunner
from umbel.clients.ledger.file import LedgerFile

folder, instants = Path(sys.argv[1]), int(sys.argv[2])
options = {"epsilon": 5.0, "mechanism": "local", "rounds": 100000}
app = PLAIN.client_app()
# Imports, the plan of the options, and how long an answer takes on this machine now.
for number in (1, 2, 3):
    began = time.monotonic()
    QueryRunner(PLAIN, folder / "warm", options, app=app).ask(number)
span = time.monotonic() - began
sent = os.open(folder / "sent", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
found = []
for instant in range(instants):
    child = os.fork()
    if child == 0:
        node = QueryRunner(PLAIN, folder, options, run=1, app=app)
        number = 0
        while True:
            number += 1
            node.ask(number, name=f"{instant}/{number}")
            os.write(sent, b"x")
    # Half of the instants are in the first answer; the others in the first few.
    time.sleep(random.random() * span * random.choice((1.2, 5)))
    while instant == instants - 1 and not os.fstat(sent).st_size:
        time.sleep(0.001)  # on a slow day none before it came so far
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rows = [r for r in LedgerFile(folder).budget() if r["scope"] == "data"]
    found.append((rows[0]["participations"] if rows else 0, os.fstat(sent).st_size))
print(json.dumps(found))
"""


@pytest.mark.parametrize("instants", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_node_that_is_killed_has_charged_at_least_what_left(
    tmp_path: Path, instants: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(tmp_path), str(instants)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == instants
    for killed, (charged, left) in enumerate(found, 1):
        assert left <= charged <= left + killed  # one answer at most dies with each process
    assert found[-1][1] > 0
