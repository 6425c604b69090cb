"""Copies of a coordinator's state: whole, checked, and honest about what they cannot know."""

import io
import math
import tarfile
import threading
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent

from umbel.core.errors import CheckError, ConfigError
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge
from umbel.server.link.enrolment import Enrolment
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.population import Register
from umbel.server.upkeep.backup import back_up, restore

ROUND = Charge(GaussianDpEvent(2.0), ADD_OR_REMOVE)


def ledger_of(state: Path, register: Register) -> Ledger:
    return Ledger(
        state / "populations" / "people.sqlite", "people", coordinator_key(state), register
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A coordinator with two nodes, a run and a ledger of three rounds."""
    folder = tmp_path / "hub"
    enrolment = Enrolment(folder)
    authority = enrolment.authority()
    for name in ("ada", "grace"):
        enrolment.add(name, authority, "localhost:1")
    enrolment.close()
    with ledger_of(folder, Register(tmp_path / "register.db")) as ledger:
        for number in (1, 2, 3):
            ledger.charge("run", f"round {number}", "model-user", [ROUND], round=number)
    run = folder / "runs" / "one"
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "checkpoint" / "position.safetensors").write_bytes(bytes(range(256)) * 5000)
    return folder


def test_what_comes_back_is_what_was_there(state: Path, tmp_path: Path) -> None:
    file, fresh = tmp_path / "hub.tar", tmp_path / "new" / "hub"
    made = back_up(state, file, version="test")
    assert file.stat().st_mode & 0o077 == 0
    found, doubtful = restore(
        file, fresh, nothing_since=True, register=Register(tmp_path / "elsewhere.db")
    )
    assert found == made and doubtful == []
    for name in made.files:
        if not name.endswith(".sqlite"):
            assert (fresh / name).read_bytes() == (state / name).read_bytes()
            assert (fresh / name).stat().st_mode & 0o077 == 0
    enrolment = Enrolment(fresh)
    assert [node.name for node in enrolment.nodes()] == ["ada", "grace"]
    enrolment.authority()  # it is this database's
    enrolment.close()
    with ledger_of(fresh, Register(tmp_path / "elsewhere.db")) as ledger:
        assert ledger.spent("model-user") == {ROUND: 3}


def test_what_was_released_after_the_copy_is_infinite(state: Path, tmp_path: Path) -> None:
    file, fresh = tmp_path / "hub.tar", tmp_path / "again"
    back_up(state, file, version="test")
    register = Register(tmp_path / "elsewhere.db")
    _, doubtful = restore(file, fresh, register=register)
    assert doubtful == ["people"]
    with ledger_of(fresh, register) as ledger:
        assert ledger.is_open


def test_a_machine_that_knows_a_later_ledger_refuses_the_copy(state: Path, tmp_path: Path) -> None:
    file, register = tmp_path / "hub.tar", Register(tmp_path / "register.db")
    back_up(state, file, version="test")
    with ledger_of(state, register) as ledger:
        ledger.charge("run", "round 4", "model-user", [ROUND], round=4)
        ledger.remember()
    with pytest.raises(CheckError, match="set back to an earlier copy"):
        restore(file, tmp_path / "again", nothing_since=True, register=register)
    assert not (tmp_path / "again").exists()


def test_a_copy_of_a_database_that_is_being_written_is_sound(state: Path, tmp_path: Path) -> None:
    over = threading.Event()
    added: list[str] = []

    def write() -> None:
        enrolment = Enrolment(state)
        authority = enrolment.authority()
        while not over.is_set():
            added.append(f"n{len(added)}")
            enrolment.add(added[-1], authority, "localhost:1")
        enrolment.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            back_up(state, tmp_path / f"{number}.tar", version="test")
    finally:
        over.set()
        writer.join()
    for number in range(5):
        fresh = tmp_path / f"fresh-{number}"
        register = Register(tmp_path / f"register-{number}.db")
        restore(tmp_path / f"{number}.tar", fresh, nothing_since=True, register=register)
        enrolment = Enrolment(fresh)  # which checks the database
        names = {node.name for node in enrolment.nodes()}
        enrolment.close()
        assert names - {"ada", "grace"} == set(added[: len(names) - 2])


def altered(source: Path, target: Path, name: str, content: bytes | None, **fields: object) -> None:
    """A copy with one entry replaced (`content`), or added as a link or under a name."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for entry in old:
            data = old.extractfile(entry)
            assert data is not None
            body = data.read()
            if entry.name == name and content is not None:
                body, entry.size = content, len(content)
            new.addfile(entry, io.BytesIO(body))
        if content is None:
            added = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(added, key, value)
            new.addfile(added, io.BytesIO(b"x" * added.size))


@pytest.mark.parametrize(
    ("name", "content", "fields", "says"),
    [
        ("runs/one/config.json", b"{1}", {}, "is not what was copied"),
        ("umbel.sqlite", b"", {}, "is not what was copied"),
        ("../outside", None, {"size": 3}, "which no copy has"),
        ("/tmp/outside", None, {"size": 3}, "which no copy has"),
        ("link", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "which no copy has"),
        ("more", None, {"size": 3}, "which no copy has"),
        ("backup.json", b"{", {}, "is damaged"),
        ("backup.json", b'{"format": 9, "version": "7"}', {}, "put it back with that version"),
    ],
)
def test_an_altered_copy_is_refused_and_leaves_nothing(
    state: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    fields: dict[str, object],
    says: str,
) -> None:
    file, bad = tmp_path / "hub.tar", tmp_path / "bad.tar"
    back_up(state, file, version="test")
    altered(file, bad, name, content, **fields)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((CheckError, ConfigError), match=says):
        restore(bad, tmp_path / "again", register=Register(tmp_path / "hub" / "r.db"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_copy_that_was_cut_short_is_refused(state: Path, tmp_path: Path) -> None:
    file, bad = tmp_path / "hub.tar", tmp_path / "bad.tar"
    back_up(state, file, version="test")
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.9):
        bad.write_bytes(whole[: math.floor(len(whole) * share)])
        with pytest.raises((CheckError, ConfigError)):
            restore(bad, tmp_path / "again", register=Register(tmp_path / "r.db"))
        assert not (tmp_path / "again").exists()


def test_nothing_is_overwritten(state: Path, tmp_path: Path) -> None:
    file = tmp_path / "hub.tar"
    back_up(state, file, version="test")
    with pytest.raises(ConfigError, match="is there already"):
        back_up(state, file, version="test")
    with pytest.raises(ConfigError, match="is not empty"):
        restore(file, state)
    with pytest.raises(ConfigError, match="no coordinator's state"):
        back_up(tmp_path / "nowhere", tmp_path / "other.tar", version="test")
