"""What is refused of an app before torch and Flower are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from umbel.core.errors import ConfigError
from umbel.first_look import GROUPS, look

PROJECT = """\
[project]
name = "app"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
rounds = {rounds}
"""

HEAVY = """\
import atexit, sys
from umbel.commands.cli import main
heavy = lambda: sorted({'torch', 'flwr'} & set(sys.modules))
atexit.register(lambda: sys.stderr.write(f"heavy: {heavy()}"))
main()
"""


def an_app(folder: Path, *, rounds: int = 3, task: str = "federation = Federation()\n") -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT.format(rounds=rounds))
    (folder / "task.py").write_text(f"import torch\nfrom umbel import Federation\n{task}")
    for half in ("server", "client"):
        (folder / f"{half}_app.py").write_text("from task import federation\napp = federation\n")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["run", "APP", "-c", "rounds=0"],
        ["server", "APP", "--state", "STATE", "-c", "rounds=0"],
        ["tune", "APP", "--space", "seed=[1,2]", "-c", "rounds=0"],
        ["bench", "privacy", "--app", "APP", "-c", "rounds=0"],
        ["bench", "robust", "--app", "APP", "-c", "rounds=0"],
    ],
    ids=lambda words: words[0] if words[0] != "bench" else words[1],
)
def test_an_impossible_value_is_refused_without_importing_anything_heavy(
    tmp_path: Path, words: list[str]
) -> None:
    app = an_app(tmp_path / "app")
    names = {"APP": str(app), "STATE": str(tmp_path / "state")}
    said = subprocess.run(
        [sys.executable, "-c", HEAVY, *(names.get(word, word) for word in words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.stderr == "umbel: rounds is 0; it must be at least 1\nheavy: []"
    assert said.returncode == 2
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("changes", [{"rounds": "many"}, {"epsilon": -1.0}, {"liars": 2.0}])
def test_each_group_is_looked_at(tmp_path: Path, changes: dict[str, float | str]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name} is"):
        look(an_app(tmp_path / "app"), changes)


def test_the_apps_own_options_are_looked_at_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounds is 0"):
        look(an_app(tmp_path / "app", rounds=0))


def test_an_app_of_another_kind_says_what_its_options_mean(tmp_path: Path) -> None:
    look(an_app(tmp_path / "app", rounds=0, task="federation = object()\n"))


def test_names_of_parts_wait_for_the_app_that_may_bring_its_own(tmp_path: Path) -> None:
    look(an_app(tmp_path / "app"), {"cohort": "of-the-app", "method": "its-own"})


def test_no_default_is_refused(tmp_path: Path) -> None:
    defaults = {name: value for group in GROUPS for name, value in group.defaults().items()}
    look(an_app(tmp_path / "app"), defaults)
