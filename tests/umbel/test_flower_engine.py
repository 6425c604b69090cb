"""Around Flower's own programs: what is left behind is ended, what does not fit is refused."""

import math
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import APPS
from umbel.commands.server import client, server
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.flower_engine import _SuperLink
from umbel.flower_node import toml
from umbel.flower_process import FlowerProcess, end_earlier, environment, program
from umbel.runner import Subject, prepare

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[FlowerProcess]:
    """A program whose parent did not end it."""
    process = FlowerProcess(tmp_path, SLEEP)
    yield process
    process.end()


def test_what_a_killed_start_left_behind_is_ended_by_the_next(
    tmp_path: Path, left_behind: FlowerProcess
) -> None:
    assert left_behind.running()
    following = FlowerProcess(tmp_path, SLEEP)
    try:
        assert left_behind.wait() == -15 and following.running()
    finally:
        following.end()
    assert not following.running() and not (tmp_path / "process").exists()


def test_a_process_that_is_another_program_by_now_is_left_alone(
    tmp_path: Path, left_behind: FlowerProcess
) -> None:
    number = (tmp_path / "process").read_text().partition(" ")[0]
    (tmp_path / "process").write_text(f"{number} /usr/bin/flower-superlink")
    end_earlier(tmp_path)
    assert left_behind.running()
    (tmp_path / "process").write_text("nonsense")
    end_earlier(tmp_path)
    end_earlier(tmp_path / "nowhere")


def test_flowers_programs_call_nobody_and_have_a_home_of_their_own(tmp_path: Path) -> None:
    found = environment(tmp_path / "home", UMBEL_STATE="x")
    assert found["FLWR_TELEMETRY_ENABLED"] == "0" and found["UMBEL_STATE"] == "x"
    assert found["FLWR_HOME"] == str(tmp_path / "home")
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0
    done = subprocess.run([program("flwr"), "--version"], capture_output=True, env=found)
    assert done.returncode == 0
    with pytest.raises(ConfigError, match="install flwr"):
        program("flower-nothing")


def test_the_app_that_flower_gets_names_every_option_that_was_changed(tmp_path: Path) -> None:
    """Flower refuses a change of an option that an app's own file does not name."""
    folder = open_app(APPS / "slope")
    prepared = prepare(Subject.of(folder), {"secure": True, "rounds": 2})
    changed = prepared.changes
    assert changed["secure"] is True and "secure" not in folder.options
    fake: Any = SimpleNamespace(_home=tmp_path)
    copy = _SuperLink._with_options(fake, folder, changed)
    project = tomllib.loads((copy / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"]["secure"] is True
    assert {k: v for k, v in open_app(copy).options.items() if k in folder.options} == dict(
        folder.options
    )
    assert (copy / "task.py").read_bytes() == (folder.path / "task.py").read_bytes()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.5, 3, True, 'a "b" \\ c', "ü 😀"])
def test_every_value_of_an_option_reaches_flower_as_it_is(value: object) -> None:
    assert tomllib.loads(f"v = {toml(value)}")["v"] == value


def test_options_of_the_other_engine_are_refused(tmp_path: Path) -> None:
    for words in ({"enough": 0.5}, {"stay": True}, {"out": tmp_path}):
        with pytest.raises(ConfigError, match="is of the link engine"):
            server(APPS / "slope", tmp_path, engine="flower", **words)
    with pytest.raises(ConfigError, match="--once is of the link engine"):
        client(tmp_path, APPS / "slope", engine="flower", once=True)
    assert not list(tmp_path.iterdir())
