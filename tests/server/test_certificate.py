"""Certificates against whoever edits them: strict, published in form, and never a traceback."""

import base64
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes import WarmCommand
from tests.server.test_private_run import Lab
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import dumps, loads, loads_strictly
from umbel.server.private.certificate import signed_text
from umbel.server.private.coordinator_key import coordinator_key, public_text, sign
from umbel.server.private.seal import seal
from umbel.server.private.shape import faults
from umbel.server.private.verify import check, schema, verify

EVERY_TYPE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1.5,
    10**400,
    "",
    "Infinity",
    [],
    [None],
    {},
    {"a": 1},
)
"""A value of every JSON type, and some that break arithmetic."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private run with its report; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UMBEL_KEY", str(folder / "coordinator.pem"))
        patch.setenv("XDG_DATA_HOME", str(folder))
        lab = Lab(folder)
        lab.run("run", noise_multiplier=4.0, release_metrics="loss:1")
        write_report(folder / "runs" / "run")
    return folder / "runs" / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, on the coordinator's own machine."""
    monkeypatch.setenv("UMBEL_KEY", str(finished.parent.parent / "coordinator.pem"))
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def certificate(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = loads_strictly((run / "certificate.json").read_bytes())
    return found


def put(run: Path, value: Any, *, signed: bool = False) -> None:
    """Write a certificate, signed by the coordinator itself where it is the one who lies."""
    if signed:
        rest = {name: part for name, part in value.items() if name != "signature"}
        value = rest | {"signature": sign(coordinator_key(), signed_text(rest))}
    (run / "certificate.json").write_text(json.dumps(value))
    seal(RunDirectory.open(run))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index in a JSON value; of lists the first entry stands for all."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield (*path, name)
            yield from places(part, (*path, name))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    after = copy.deepcopy(value)
    part = after
    for step in path[:-1]:
        part = part[step]
    change(part, path[-1])
    return after


def test_it_holds_and_has_the_published_form(run: Path) -> None:
    assert verify(run) == []
    value = certificate(run)
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(value)
    assert value["guarantees"][1]["epsilon"] == "Infinity"
    assert {"config.json", "metrics.jsonl", "MODEL_CARD.md", "model.safetensors"} <= set(
        value["files"]
    )
    page = (run / "report.html").read_text()
    box = page[page.index("Who is protected") : page.index('<dl class="figures">')]
    assert "Each of the 20 nodes" in box and "Not against the coordinator" in box
    assert "umbel verify RUN --key FILE" in box and page.count("Who is protected") == 1
    assert "epsilon" not in page[: page.index("Who is protected")].lower()
    assert len(value["provenance"]) == 1 and value["provenance"][0]["round"] == 0


def test_every_file_of_a_run_is_strict_json(run: Path) -> None:
    names = ["certificate.json", "config.json", "result.json", "seal.json"]
    for name in names:
        loads_strictly((run / name).read_bytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        loads_strictly(line)
    assert loads((run / "config.json").read_text())["options"]["epsilon"] == float("inf")


def test_no_edit_of_a_certificate_crashes_or_passes(run: Path) -> None:
    """Every key removed, and replaced by a value of every type; nobody could sign it anew."""
    value = certificate(run)
    tried = 0
    for path in places(value):
        for other in (..., *EVERY_TYPE):

            def change(part: Any, step: Any, other: Any = other) -> None:
                if other is ...:
                    del part[step]
                else:
                    part[step] = other

            after = changed(value, path, change)
            if after == value:
                continue
            (run / "certificate.json").write_text(json.dumps(after))
            checked = check(run)
            assert checked.problems, (path, other)
            assert [*checked.lines()] and dumps(checked.to_json())
            tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format": 2}', "{", '"x"', "[" * 5000, "\x00\xff", "NaN"]
)
def test_what_is_no_certificate_is_said(run: Path, text: str) -> None:
    (run / "certificate.json").write_text(text)
    assert verify(run)


def test_names_that_stand_there_twice_and_bare_infinities_are_refused(run: Path) -> None:
    text = (run / "certificate.json").read_text()
    (run / "certificate.json").write_text(text.replace('"format"', '"scope": "run", "format"', 1))
    assert "stands there twice" in verify(run)[0]
    (run / "certificate.json").write_text(text.replace('"Infinity"', "Infinity"))
    assert "is not JSON" in verify(run)[0]


def lie(*path: Any, to: Any) -> tuple[tuple[Any, ...], Any]:
    return path, to


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lie("guarantees", 0, "epsilon", to=0.5), "adds up to"),
        (lie("guarantees", 0, "relation", to="zero-out-one"), "relation against model-user"),
        (lie("guarantees", 0, "unit", to="record"), "unit against"),
        (lie("guarantees", 1, "epsilon", to=0.5), "epsilon against server"),
        (lie("total", 0, "epsilon", to=0.1), "the population's total"),
        (lie("scope", to="population"), None),
        (lie("events", 0, "times", to=1), "list of events"),
        (lie("provenance", 0, "model", to="0" * 64), "did not start from"),
        (lie("files", "metrics.jsonl", to="0" * 64), "metrics.jsonl is not"),
        (lie("files", "model.safetensors", to="0" * 64), "two models"),
        (lie("population", to="other people"), "of the population"),
        (lie("run", to="another@time"), "knows no run"),
        (lie("mechanism", "noise_multiplier", to=99.0), "mechanism: noise_multiplier"),
        (lie("mechanism", to=None), "neither a mechanism"),
        (lie("ledger", to=None), "no ledger"),
        (lie("ledger", "participation", to="0" * 64), "participations"),
    ],
)
def test_a_coordinator_that_signs_a_lie_is_found(
    run: Path, told: tuple[tuple[Any, ...], Any], words: str | None
) -> None:
    path, to = told

    def change(part: Any, step: Any) -> None:
        part[step] = to

    put(run, changed(certificate(run), path, change), signed=True)
    problems = "\n".join(verify(run))
    assert "signature" not in problems
    assert problems == "" if words is None else words in problems


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "MODEL_CARD.md", "model.safetensors"]
)
def test_a_file_that_people_read_cannot_be_edited(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert any(problem.startswith(f"{name} is not") for problem in verify(run))
    seal(RunDirectory.open(run))  # nor does the coordinator sign such a run's pages again
    path.unlink()
    assert f"{name} is missing" in verify(run)


@pytest.mark.parametrize("name", ["report.html", "metric-loss.png", "result.json"])
def test_nor_can_a_page(run: Path, name: str) -> None:
    path = run / name
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    assert f"{name} is not the one that the coordinator signed" in verify(run)
    path.write_bytes(before)
    assert verify(run) == []
    (run / "extra.png").write_bytes(b"not drawn by the coordinator")
    assert "extra.png is not the one that the coordinator signed" in verify(run)


def test_a_report_that_is_drawn_again_is_signed_again_by_the_coordinator_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "extra.png").write_bytes(b"a drawing")
    write_report(run)
    assert verify(run) == []
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "stranger.pem"))
    coordinator_key()
    (run / "extra.png").unlink()
    assert not seal(RunDirectory.open(run))
    assert "extra.png is not the one that the coordinator signed" in verify(run)
    (run / "seal.json").unlink()
    assert "seal.json is missing" in verify(run)[0]


def test_a_certificate_that_a_stranger_signed_is_of_an_unknown_signer(run: Path) -> None:
    stranger = Ed25519PrivateKey.generate()
    value = {**certificate(run), "key": public_text(stranger)}
    rest = {name: part for name, part in value.items() if name != "signature"}
    put(run, rest | {"signature": sign(stranger, signed_text(rest))})
    problems = "\n".join(verify(run))
    assert "is not signed with the key of the certificate" in problems


def test_verify_says_who_signed_about_what_and_for_whom(
    umbel: WarmCommand, run: Path, tmp_path: Path
) -> None:
    def said(*words: Any) -> list[str]:
        ended = umbel.command(*words, cwd=tmp_path / "here")
        assert ended.status == 0, ended.err
        return ended.out.splitlines()

    unknown = said("verify", run)
    assert unknown[0].startswith("the signer is unknown")
    assert "about: the model" in unknown[1]
    assert any("for: each node" in line and "against model-user" in line for line in unknown)
    assert unknown[-1] == "the certificate holds"
    (printed,) = said("key", run)
    file = tmp_path / "coordinator.pub"
    file.write_text(printed + "\n")
    assert said("verify", run, "--key", file)[0].startswith("signed by the coordinator whose key")
    pem = tmp_path / "coordinator.pub.pem"
    pem.write_bytes(
        coordinator_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert said("verify", run, "--key", pem)[-1] == "the certificate holds"
    told = json.loads(said("verify", run, "--key", file, "--json")[-1])
    assert told["ok"] and told["signer_known"] and told["key"] == printed
    stranger = base64.b64encode(b"\x01" * 32).decode()
    ended = umbel.command("verify", run, "--key", stranger, cwd=tmp_path / "here")
    assert ended.status == 3 and "another key" in ended.out
    assert ended.out.startswith("the signer is unknown")
    ended = umbel.command("verify", run, "--key", tmp_path / "none", cwd=tmp_path / "here")
    assert ended.status == 2 and "is no public key" in ended.err


def test_the_key_of_a_state_is_its_own(
    umbel: WarmCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_KEY", "")
    state = tmp_path / "state"
    state.mkdir()
    keys = [
        umbel.command("key", *words, cwd=tmp_path / "here").out
        for words in ((), ("--state", state), ("--state", state))
    ]
    assert keys[0] != keys[1] == keys[2]
    assert (state / "coordinator.pem").stat().st_mode & 0o077 == 0
    ended = umbel.command("key", "--state", tmp_path / "none", cwd=tmp_path / "here")
    assert ended.status == 2 and "no state folder" in ended.err


def test_the_schema_is_read_here_as_elsewhere() -> None:
    """Our reader of schemas and the reference one agree on what is wrong."""
    small = {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {
            "a": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "x"}]},
            "b": {"type": "array", "minItems": 1, "items": {"enum": ["p", "q"]}},
            "c": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "d": {"type": "string", "pattern": "^[0-9]+$"},
            "e": {"type": "object", "additionalProperties": {"type": "boolean"}},
        },
    }
    reference = jsonschema.Draft202012Validator(small)
    values: tuple[Any, ...] = (
        None,
        True,
        0,
        1,
        2.0,
        0.5,
        "x",
        "12",
        [],
        ["p"],
        ["z"],
        {},
        {"k": True},
    )
    for name in "abcde":
        for value in values:
            for whole in ({name: value}, {"a": 1, name: value}, {"a": 1, "z": value}):
                assert bool(list(faults(whole, small))) != reference.is_valid(whole), whole
    for whole in values:
        assert bool(list(faults(whole, small))) != reference.is_valid(whole), whole
