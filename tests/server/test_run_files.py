"""The files of a run are strict JSON of the published form, and other languages read them."""

import json
import math
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.fakes import APPS
from umbel.running import run
from umbel.server.output import strict
from umbel.server.output.progress import SilentProgress

NODE = """
const fs = require("fs"), path = process.argv[1] + "/";
const lines = name => fs.existsSync(path + name)
  ? fs.readFileSync(path + name, "utf8").split("\\n").filter(Boolean).map(JSON.parse) : [];
const object = name => JSON.parse(fs.readFileSync(path + name, "utf8"));
const read = {config: object("config.json"), result: object("result.json"),
              rounds: lines("metrics.jsonl"), nodes: lines("nodes.jsonl")};
if (!read.config.app) throw "no app";
process.stdout.write(JSON.stringify(read));
"""
PERL = """
use JSON::PP; my $json = JSON::PP->new; my $path = shift;
sub text { open(my $file, "<", "$path/" . shift) or return ""; local $/; <$file> }
sub lines { [map { $json->decode($_) } split /\\n/, text(shift)] }
die unless $json->decode(text("config.json"))->{app};
print $json->encode({result => $json->decode(text("result.json")),
  rounds => lines("metrics.jsonl"), nodes => lines("nodes.jsonl")});
"""
READERS = {"node": ("node", "-e", NODE), "perl": ("perl", "-MJSON::PP", "-e", PERL)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain run, one whose epsilon is infinite, and one of an app that keeps its own rounds."""
    folder = tmp_path_factory.mktemp("runs")
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("slope", {"rounds": 2}),
        "seeded": ("slope", {"rounds": 2, "noise-multiplier": 1.0, "insecure-noise-seed": 1}),
        "own rounds": ("plain", {}),
    }
    for name, (app, options) in wanted.items():
        quiet = SilentProgress()
        run(APPS / app, options=options, workers=0, out=folder / name, progress=quiet)
    return {name: folder / name for name in wanted}


def whole(path: Path) -> dict[str, Any]:
    """All files of a run, each read as it stands: nothing but JSON."""

    def lines(name: str) -> list[Any]:
        file = path / name
        text = file.read_text() if file.is_file() else ""
        return [strict.loads_strictly(line) for line in text.splitlines()]

    def one(name: str) -> Any:
        return strict.loads_strictly((path / name).read_text())

    return {
        "config": one("config.json"),
        "result": one("result.json"),
        "rounds": lines("metrics.jsonl"),
        "nodes": lines("nodes.jsonl"),
    }


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and text of a value, by the way to it."""
    if not isinstance(value, dict | list):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in parts for k, v in flat(part, f"{name}.{key}").items()}


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same; another language may end a number sooner."""
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def schema() -> Any:
    text = resources.files("umbel.server.output").joinpath("run.schema.json").read_text()
    return json.loads(text)


@pytest.mark.parametrize("name", ["plain", "seeded", "own rounds"])
def test_every_file_has_the_published_form(runs: dict[str, Path], name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    found = whole(runs[name])
    jsonschema.validate(found, schema())
    assert found["rounds"], "there was something to check"
    for key, wrong in (("rounds", "2"), ("metrics", {"loss": "small"}), ("epsilon", "inf")):
        bent = {**found, "result": {**found["result"], key: wrong}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bent, schema())


@pytest.mark.parametrize("reader", READERS)
def test_another_language_reads_the_same(runs: dict[str, Path], reader: str) -> None:
    command = READERS[reader]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    for path in runs.values():
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
        read, ours = json.loads(done.stdout), whole(path)
        for part in ("result", "rounds", "nodes"):
            one, other = flat(read[part]), flat(ours[part])
            assert one.keys() == other.keys()
            assert all(alike(one[name], other[name]) for name in one), part
    assert whole(runs["seeded"])["result"]["epsilon"] == "Infinity"
