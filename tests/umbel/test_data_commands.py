"""`umbel data`: one JSON object or lines on stdout, progress on stderr, errors with a status."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel.clients.data.datasets import CATALOGUE
from umbel.commands.data import app
from umbel.core.errors import ConfigError

runner = CliRunner()


def test_list_shows_every_data_set_in_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_CACHE", str(tmp_path))
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["name", *CATALOGUE]
    assert {line[0]: line[-1] for line in lines[1:]} == {
        name: "no" if name == "fashion-mnist" else "yes" for name in CATALOGUE
    }


def test_list_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_CACHE", str(tmp_path))
    result = runner.invoke(app, ["list", "--json"])
    shown = json.loads(result.stdout)
    assert shown["cache"] == str(tmp_path)
    assert [entry["name"] for entry in shown["datasets"]] == list(CATALOGUE)
    assert {entry["name"]: entry["place"] for entry in shown["datasets"]}["wine"] == "scikit-learn"
    assert shown["datasets"][-1]["place"] is None


def test_fetch_brings_the_data_and_says_where_they_are() -> None:
    result = runner.invoke(app, ["fetch", "fashion-mnist", "--json"])
    assert result.exit_code == 0
    shown = json.loads(result.stdout.splitlines()[-1])
    assert shown["train"] == 60_000
    assert (Path(shown["place"]) / "train-images.npy").is_file()
    assert "checking" in result.stderr
    plain = runner.invoke(app, ["fetch", "digits"])
    assert plain.stdout == "digits: 1,437 training and 360 test examples, from scikit-learn\n"


def test_fetch_of_an_unknown_name_is_a_configuration_error() -> None:
    result = runner.invoke(app, ["fetch", "fashion"])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_status == 2
    assert "did you mean fashion-mnist" in str(result.exception)
