"""Flower apps that do not know Umbel, run by its command: what they get, and what they are told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.fakes import APPS, WarmCommand


def run(umbel: WarmCommand, where: Path, app: str, *words: str) -> Any:
    return umbel.command("run", APPS / app, "--workers", "0", "--json", *words, cwd=where)


def test_the_model_that_the_strategy_returned_is_saved(umbel: WarmCommand, tmp_path: Path) -> None:
    out = tmp_path / "said.json"
    ended = run(umbel, tmp_path, "plain", "-c", f'out="{out}"')
    assert ended.status == 0, ended.err
    model = load_file(tmp_path / ended.result["run"] / "model.safetensors")
    np.testing.assert_array_equal(model["w"], np.float32(json.loads(out.read_text())["w"]))
    assert "what the strategy returned" in ended.result["model"] and "model: " in ended.err


def test_every_run_has_an_id_of_its_own_and_the_model_of_an_old_strategy_is_saved(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    """An app of the old kind returns nothing, but evaluates what it has aggregated."""
    ids = set()
    for number in (1, 2):
        ended = run(umbel, tmp_path, "legacy", "--out", str(tmp_path / f"run{number}"))
        assert ended.status == 0, ended.err
        ids.add(json.loads((tmp_path / f"run{number}" / "config.json").read_text())["run_id"])
    assert len(ids) == 2
    assert load_file(tmp_path / "run1" / "model.safetensors")
    assert "what was evaluated in round 2" in ended.result["model"]


def test_an_app_that_shows_no_arrays_is_told_that_no_model_was_saved(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    ended = run(umbel, tmp_path, "unruly", "--nodes", "1")
    assert ended.status == 0, ended.err
    assert "no model was saved: this app keeps its own rounds" in ended.err
    again = umbel.command("run", "--resume", ended.result["run"], cwd=tmp_path)
    assert again.status == 2 and "keeps its own rounds, so Umbel cannot continue it" in again.err


def test_a_run_that_is_stopped_says_that_it_cannot_go_on(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    place = ("umbel.server.round_recorder:RoundRecorder._complete", 3, "stop")
    ended = umbel.command(
        "run", APPS / "plain", "--workers", "0", "--out", "run", cwd=tmp_path, deaths=[place]
    )
    assert ended.status == 130
    assert "stopped after 2 rounds; this app keeps its own rounds" in ended.err
    assert load_file(tmp_path / "run" / "model.safetensors"), "what was evaluated in round 1"
