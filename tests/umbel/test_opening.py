"""What is refused of an app before torch is imported, and what has to wait for the app itself."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from umbel.core.errors import ConfigError
from umbel.opening import opened
from umbel.scaffold import new_app
from umbel.strategies import groups

HEAVY = ("torch", "flwr", "numpy", "pandas", "dp_accounting", "cryptography")

PROGRAM = """
import contextlib, io, json, sys
import umbel.commands.cli as cli
said = []
lines, heavy = json.loads(sys.argv[1])
for line in lines:
    sys.argv, into = ["umbel", *line], io.StringIO()
    with contextlib.redirect_stderr(into):
        try:
            cli.main()
        except SystemExit as stop:
            said.append([stop.code, into.getvalue()])
    loaded = sorted(set(heavy) & set(sys.modules))
    assert not loaded, (line, loaded)
print(json.dumps(said))
"""


def refusals(*lines: list[str], without: Sequence[str] = HEAVY) -> list[tuple[int, str]]:
    """Exit status and words of commands, none of which imports any of some packages."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps([lines, list(without)])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return new_app(tmp_path / "mine")


def test_a_bad_value_of_any_group_is_refused_without_torch() -> None:
    bad = {
        "rounds=0": "rounds is 0; it must be at least 1",
        "rounds=many": "rounds is 'many', but it must be a whole number, such as 10",
        "method=nosuch": "method is 'nosuch'; it can be fedavg, fedprox, scaffold",
        "cohort=nosuch": "cohort is 'nosuch'; it can be all, fixed, poisson, power-of-choice",
        "optimizer=nosuch": "optimizer is 'nosuch'; it can be fedavg, fedavgm, fedadam",
        "aggregator=nosuch": "aggregator is 'nosuch'; it can be mean, median",
        "compression=nosuch": "compression is 'nosuch'; it can be none, random-k",
        "mode=nosuch": "mode is 'nosuch'; it can be sync, async",
        "epsilon=inf": "epsilon",
        "secure-levels=-1": "secure-levels is -1; it must be at least 0",
        "liars=1.5": "liars is 1.5; it must be from 0 up to 1",
        "tau=0": "adaptive-epsilon is 0.0; it must be above 0",
    }
    found = refusals(*(["run", "-c", change] for change in bad))
    for (status, words), (change, expected) in zip(found, bad.items(), strict=True):
        assert status == 2, change
        assert words.startswith(f"umbel: {expected}"), (change, words)


def test_every_command_that_opens_an_app_refuses_it_as_early(app: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    commands = [
        ["run", str(app)],
        ["server", str(app), "--state", state],
        ["tune", str(app), "--space", "batch-size=[16,32]"],
        ["bench", "robust", "--app", str(app)],
        ["bench", "privacy", "--app", str(app)],
    ]
    for status, words in refusals(*([*line, "-c", "rounds=0"] for line in commands)):
        assert (status, words.splitlines()[-1]) == (2, "umbel: rounds is 0; it must be at least 1")
    assert not Path(state).exists()
    (app / "task.py").write_text("def broken(:\n")
    commands += [["options", str(app)], ["client", str(app), "--state", state]]
    for status, words in refusals(*commands):
        assert status == 2
        assert "the app does not import: SyntaxError" in words, words


def test_a_task_that_raises_loads_only_what_it_imports_itself(app: Path) -> None:
    (app / "task.py").write_text("raise RuntimeError('no data here')\nfederation = None\n")
    [(status, words)] = refusals(
        ["run", str(app)], without=("torch", "pandas")
    )  # a ServerApp is Flower's
    assert status == 2
    assert f"no data here ({app}/task.py, line 1)" in words


def test_a_value_of_the_apps_own_file_is_looked_at_too(app: Path) -> None:
    file = app / "pyproject.toml"
    text = file.read_text().replace("[tool.flwr.app.config]", "[tool.flwr.app.config]\ndelta = 2.0")
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"delta is 2\.0; it must be between 0 and 1"):
        opened(app, {})
    assert opened(app, {"delta": 0.1}).name  # a change goes before it


def test_what_only_the_app_knows_waits_for_its_import(app: Path, tmp_path: Path) -> None:
    opened(app, {"an-option-of-its-trainer": 1})
    with pytest.raises(ConfigError, match="cohort is 'mine'"):
        opened(app, {"cohort": "mine"})
    task = (app / "task.py").read_text()
    (app / "task.py").write_text(f"{task}\nfrom umbel import register\n")
    opened(app, {"cohort": "mine"})  # which it may register
    (app / "task.py").write_text(f"{task}\nimport parts_of_somebody\n")
    opened(app, {"cohort": "mine"})  # as may another package
    own = tmp_path / "own"
    own.mkdir()
    for name in ("server_app", "client_app"):
        (own / f"{name}.py").write_text("app = None\n")
    (own / "pyproject.toml").write_text(
        "[tool.flwr.app.components]\nserverapp='server_app:app'\nclientapp='client_app:app'\n"
        "[tool.flwr.app.config]\nrounds=3\n"
    )
    opened(own, {"rounds": 0})  # means what that app likes


def test_a_zero_that_stands_for_what_is_derived_is_left_to_the_app(app: Path) -> None:
    file = app / "pyproject.toml"
    file.write_text(file.read_text() + "\n[tool.flwr.app.config.more]\nx = 1\n")
    text = "".join(line for line in file.read_text().splitlines(True) if "rounds" not in line)
    file.write_text(text.replace("[tool.flwr.app.config]", "[tool.flwr.app.config]\nrounds = 0", 1))
    opened(app, {})
    with pytest.raises(ConfigError, match="rounds is 0"):
        opened(app, {"rounds": 0})


def test_no_default_is_refused(app: Path) -> None:
    given = groups.defaults()
    del given["epsilon"]  # infinity is what nobody may write down
    opened(app, given)
