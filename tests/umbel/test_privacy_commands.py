"""`umbel privacy` prints what the accountant says, and bad values in one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel.commands.privacy import app
from umbel.core.errors import ConfigError

SCHEDULE = ["--sampling-rate", "0.1", "--rounds", "100", "--delta", "1e-5"]


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False, standalone_mode=False)
    return result.stdout


def test_epsilon_as_json() -> None:
    said = json.loads(run("epsilon", "--noise-multiplier", "2", *SCHEDULE, "--json"))
    assert said["epsilon"] == pytest.approx(2.3374, rel=5e-3)
    assert said["epsilon_rdp"] == pytest.approx(2.5806, rel=1e-3)
    words = ["epsilon", "--noise-multiplier", "2", *SCHEDULE, "--accountant", "rdp", "--json"]
    assert json.loads(run(*words))["epsilon"] == pytest.approx(2.5806, rel=1e-3)


def test_noise_as_json() -> None:
    said = json.loads(run("noise", "--epsilon", "1", *SCHEDULE, "--json"))
    assert said["noise_multiplier"] == pytest.approx(3.9418, rel=5e-3)
    assert said["epsilon"] <= 1


def test_a_person_reads_the_number_and_against_whom_it_holds() -> None:
    text = run("epsilon", "--noise-multiplier", "2", *SCHEDULE)
    assert text.startswith("epsilon 2.33")
    assert "not from the server" in text


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "curve.png"
    run("noise", "--epsilon", "1", *SCHEDULE, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["epsilon", "--noise-multiplier", "0", *SCHEDULE], "--noise-multiplier"),
        (["epsilon", "--noise-multiplier", "nan", *SCHEDULE], "--noise-multiplier"),
        (["noise", "--epsilon", "-1", *SCHEDULE], "--epsilon"),
        (["noise", "--epsilon", "inf", *SCHEDULE], "--epsilon"),
        (["noise", "--epsilon", "1", *SCHEDULE, "--delta", "1"], "--delta"),
        (["noise", "--epsilon", "1", *SCHEDULE, "--sampling-rate", "2"], "--sampling-rate"),
        (["noise", "--epsilon", "1", *SCHEDULE, "--rounds", "0"], "--rounds"),
        (
            ["epsilon", "--noise-multiplier", "1", *SCHEDULE, "--accountant", "gdp"],
            "--accountant",
        ),
    ],
)
def test_bad_values_are_named(words: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        run(*words)


def test_a_plot_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    words = ["epsilon", "--noise-multiplier", "2", *SCHEDULE, "--plot"]
    with pytest.raises(ConfigError, match="--plot"):
        run(*words, str(tmp_path / "missing" / "curve.png"))


def test_other_mechanisms_are_planned_with_the_options_of_a_run() -> None:
    words = ["--epsilon", "3", *SCHEDULE, "--nodes", "1000", "--parameters", "1000000"]
    said = run("noise", *words, "-c", "mechanism=tree separation=20")
    assert "zero out one" in said
    assert "note: that noise drowns the sum at this cohort" in said
    found = json.loads(run("noise", *words, "-c", "secure=true", "--json"))
    assert found["against"] == "server"
    assert found["stack"].endswith("secure-sum")
    with pytest.raises(ConfigError, match="--run-config needs --nodes and --parameters"):
        run("noise", "--epsilon", "3", *SCHEDULE, "-c", "secure=true")
    with pytest.raises(ConfigError, match="follows from epsilon; ask for it with: umbel privacy"):
        run("epsilon", "--noise-multiplier", "1", *words[2:], "-c", "mechanism=local epsilon=3")


def test_where_no_table_fits_an_upper_bound_answers_and_says_so() -> None:
    text = run("epsilon", "--noise-multiplier", "0.001", *SCHEDULE)
    assert "accountant gaussian" in text
    assert "note: out of reach of the exact accountant" in text
    with pytest.raises(ConfigError, match="which is no noise"):
        run("epsilon", "--noise-multiplier", "1e-300", *SCHEDULE)
