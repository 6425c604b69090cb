"""The verifier that needs nothing of Umbel says what `umbel verify` says, of good runs and bad."""

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NonPrivateDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
)

from tests.fakes import WarmCommand
from tests.server.test_certificate import certificate, finished, put
from tests.server.test_private_run import Lab
from tests.server.test_records import Clinics
from umbel.privacy.budget import events
from umbel.privacy.budget.accounting import poisson, spent
from umbel.privacy.budget.events import REPLACE, ZERO_OUT, Charge, relation_name, to_json
from umbel.privacy.budget.selection import SHAPES, SelectionDpEvent
from umbel.privacy.noise.skellam import SkellamDpEvent
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.seal import seal
from umbel.server.private.statements import STATEMENTS
from umbel.server.private.verify import verify

FILE = Path(__file__).parents[2] / "deploy" / "verify_certificate.py"
__all__ = ["finished"]


@pytest.fixture(scope="module")
def alone() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_certificate", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASES: list[dict[Charge, int]] = [
    {Charge(GaussianDpEvent(4.0)): 3},
    {Charge(GaussianDpEvent(4.0), REPLACE): 3},
    {Charge(GaussianDpEvent(1e-3)): 1},
    {Charge(poisson(0.6, 0.1), slack=1e-7): 6, Charge(GaussianDpEvent(20.0)): 2},
    {Charge(poisson(0.5, 0.5)): 300},
    {Charge(TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 2.0)): 4},
    {Charge(SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(4.0)), REPLACE): 5},
    {
        Charge(SingleEpochTreeAggregationDpEvent(5.0, 4), ZERO_OUT): 2,
        Charge(poisson(2.0, 0.1)): 3,
    },
    {Charge(SkellamDpEvent(100.0, 5.0, 20.0), ZERO_OUT): 4, Charge(GaussianDpEvent(9.0)): 1},
    {Charge(ZCDpEvent(0.01), ZERO_OUT): 3},
    {Charge(SelfComposedDpEvent(GaussianDpEvent(4.0), 5)): 2},
    {Charge(NonPrivateDpEvent()): 1},
    *(
        {
            Charge(SelectionDpEvent(((poisson(2.0, 0.1), 8),), 12.5, distribution)): 2,
            Charge(GaussianDpEvent(9.0)): 1,
        }
        for distribution in SHAPES
    ),
    {
        Charge(
            SelectionDpEvent(((SelfComposedDpEvent(GaussianDpEvent(9.0), 4), 2),), 1.0, "poisson"),
            ZERO_OUT,
        ): 1
    },
    {},
]


def test_every_mechanism_that_a_ledger_can_hold_is_added_up_here() -> None:
    source = inspect.getsource(events)
    named = set(re.findall(r'"mechanism": "([a-z-]+)"', source))
    walked = {
        name
        for charges in RELEASES
        for charge in charges
        for name in re.findall(r'"mechanism": "([a-z-]+)"', json.dumps(to_json(charge.event)))
    }
    assert len(named) > 8 and named - {"nothing"} <= walked


@pytest.mark.parametrize("charges", RELEASES)
def test_both_add_up_releases_alike(alone: ModuleType, charges: dict[Charge, int]) -> None:
    plain: Counter[Any] = Counter()
    for one, times in charges.items():
        event = json.dumps(to_json(one.event), sort_keys=True)
        plain[event, relation_name(one.relation), one.slack] += times
    for way in ("pld", "rdp"):
        try:
            ours = spent(charges, 1e-5, accountant=way)  # type: ignore[arg-type]
        except Exception:
            continue  # RDP does not know every kind
        epsilon, relation = alone.spent(plain, 1e-5, by_rdp=way == "rdp")
        assert epsilon == pytest.approx(ours.epsilon, rel=1e-6)
        assert relation == relation_name(ours.relation)


KINDS: dict[str, dict[str, Any]] = {
    "poisson": {"epsilon": 3.0, "cohort_size": 10.0},
    "everyone": {"epsilon": 3.0, "population": "people"},
    "fixed": {"noise_multiplier": 4.0, "sampling": "fixed", "cohort_size": 5.0},
    "truncated": {"noise_multiplier": 4.0, "cohort_size": 5.0, "cohort_cap": 8},
    "banded": {"epsilon": 3.0, "mechanism": "banded", "separation": 2, "rounds": 4},
    "local": {"epsilon": 8.0, "mechanism": "local"},
    "seeded": {"noise_multiplier": 1.0, "insecure_noise_seed": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_say_that_a_good_run_holds(alone: ModuleType, tmp_path: Path, kind: str) -> None:
    lab = Lab(tmp_path)
    lab.run(**KINDS[kind])
    assert verify(lab.directory().path) == []
    assert alone.check(lab.directory().path) == []


def test_both_say_so_of_a_secure_sum_beside_another_run(alone: ModuleType, tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    (lab.app / "client_app.py").write_text(
        "from task import federation\n\napp = federation.client_app()\n"
    )
    lab.run("one", epsilon=3.0)
    lab.run("two", epsilon=6.0, secure=True, rounds=1)
    for name in ("one", "two"):
        assert verify(lab.directory(name).path) == []
        assert alone.check(lab.directory(name).path) == []
    card = (lab.directory("two").path / "MODEL_CARD.md").read_text()
    secure = certificate(lab.directory("two").path)["secure_sum"]
    assert f"({secure['mode']} mode" in card and "taken on first use" in card
    assert f"at least {secure['quorum']} of a round's 20 nodes agree" in card
    assert "Each node adds its share of the noise" in card
    assert "Not against the coordinator" not in card


def test_both_find_the_same_forgeries(
    alone: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_KEY", str(finished.parent.parent / "coordinator.pem"))
    assert alone.check(finished) == []

    def forged(number: int) -> Path:
        shutil.copytree(finished, tmp_path / str(number))
        return tmp_path / str(number)

    edits: list[tuple[tuple[Any, ...], Any]] = [
        (("guarantees", 0, "epsilon"), 0.5),
        (("guarantees", 0, "relation"), "zero-out-one"),
        (("guarantees", 1, "epsilon"), 0.5),
        (("total", 0, "epsilon"), 0.1),
        (("events", 0, "times"), 1),
        (("events",), []),
        (("provenance", 0, "model"), "0" * 64),
        (("files", "metrics.jsonl"), "0" * 64),
        (("mechanism", "noise_multiplier"), 99.0),
        (("mechanism",), None),
        (("ledger",), None),
        (("ledger", "head"), "0" * 64),
        (("population",), "others"),
    ]
    for number, (path, to) in enumerate(edits):
        for signed in (False, True):
            run = forged(2 * number + signed)
            value = certificate(run)
            part = value
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = to
            put(run, value, signed=signed)
            assert verify(run), path
            assert alone.check(run), path
    for number, name in enumerate(
        ["metrics.jsonl", "model.safetensors", "report.html", "result.json", "ledger.sqlite"], 100
    ):
        run = forged(number)
        (run / name).write_bytes((run / name).read_bytes()[:-40])
        assert verify(run) and alone.check(run), name
        (run / name).unlink()
        assert verify(run) and alone.check(run), name
    for number, text in enumerate(["", "[]", "{", '{"format": 2}', "[" * 5000, "NaN"], 200):
        run = forged(number)
        (run / "certificate.json").write_text(text)
        assert alone.check(run)


@pytest.mark.parametrize(
    ("format_", "versions", "issuer"),
    [
        (1, {"umbel": "0.9.1"}, "Umbel 0.9.1"),
        (1, None, "the version that issued it"),
        (3, {"umbel": "9\x1b[2J\nholds"}, "Umbel 9"),
    ],
)
def test_a_certificate_of_another_format_is_left_to_its_issuer(
    umbel: WarmCommand,
    alone: ModuleType,
    finished: Path,
    tmp_path: Path,
    format_: int,
    versions: Any,
    issuer: str,
) -> None:
    """Nothing of it is checked, and both say so, whatever else is wrong with it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    put(run, certificate(run) | {"format": format_, "versions": versions, "key": "nobody's"})
    (run / "ledger.sqlite").unlink(missing_ok=True)
    (problem,) = verify(run)
    assert f"is of format {format_}, and this version checks format 2" in problem
    assert "nothing of it was checked" in problem and f"check it with {issuer}" in problem
    assert "What its run has spent counts on" in problem and problem.isprintable()
    ended = umbel.command("verify", run, cwd=tmp_path / "here")
    assert ended.status == 3 and problem in ended.out and "the certificate holds" not in ended.out
    (other,) = alone.problems_of(run, None)
    assert f"is of format {format_}, and this file checks format 2" in other
    assert "nothing of it was checked" in other


def test_both_read_the_statements_of_nodes(alone: ModuleType, tmp_path: Path) -> None:
    clinics = Clinics(tmp_path)
    clinics.run("good", bad="0:unsigned")
    clinics.run("silent", bad="2:silent")
    clinics.run("liar", bad="1:liar")
    for name, holds in (("good", True), ("silent", True), ("liar", False)):
        run = clinics.directory(name).path
        assert (verify(run) == []) is holds
        assert (alone.check(run) == []) is holds, alone.check(run)
    path = clinics.directory("good").path / STATEMENTS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["signature"] = lines[2]["signature"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seal(RunDirectory.open(path.parent))
    assert any("not signed with the key" in said for said in alone.check(path.parent))


def test_it_is_a_program_that_does_not_know_umbel(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    block = "import sys, runpy; sys.modules['umbel'] = None; "
    code = f"{block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", code, str(FILE), str(tmp_path / "run"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    ended = said()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("the signer is unknown")
    assert ended.stdout.endswith("the certificate holds\n")
    key = certificate(tmp_path / "run")["key"]
    write_report(tmp_path / "run")  # by another user, who has no key of that run
    ended = said("--key", key, "--json")
    assert json.loads(ended.stdout)["ok"] is (ended.returncode == 0)
    (tmp_path / "run" / "config.json").write_text("{}")
    assert said("--key", key).returncode == 3
    assert said("--key", "nonsense").returncode == 2
