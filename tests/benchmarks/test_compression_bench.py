"""The table of compression: every way once, what has ended is not run again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbel.benchmarks.compression import suite
from umbel.benchmarks.speed import compression as speed
from umbel.strategies.compression.options import CompressionOptions


def test_every_cell_is_run_once_and_a_stopped_table_goes_on(tmp_path: Path) -> None:
    played: list[tuple[Any, Any]] = []

    def play(options: Mapping[str, Any], place: Path) -> Any:
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append((options["seed"], place.name))
        bytes_ = 100 if options.get("compression", "none") == "none" else 5
        lines = [{"round": 0}, {"round": 1, "clients": 2, "bytes_up": bytes_}]
        return {"accuracy": 0.9 - options["seed"] / 100}, lines

    for _ in range(3):
        try:
            cells = suite.measure(play, [0, 1], ["plain"], "rounds=1", tmp_path)
        except KeyboardInterrupt:
            played.clear()
    assert len(cells) == 2 * len(suite.WAYS["plain"])
    before = len(played)
    assert suite.measure(play, [0, 1], ["plain"], "rounds=1", tmp_path) == cells
    assert len(played) == before
    suite.write(cells, tmp_path)
    shown = (tmp_path / "compression.md").read_text(encoding="utf-8")
    assert "| plain, qsgd-2 | `compression=qsgd-2` | 2 | 20.0 | 89.5 (90.0, 89.0) | +0.0 |" in shown
    assert len(json.loads((tmp_path / "compression.json").read_text())["cells"]) == len(cells)


def test_the_ways_are_ones_that_a_run_takes() -> None:
    from umbel.core.options import parse

    for ways in suite.WAYS.values():
        assert next(iter(ways)) == "none"
        for options in ways.values():
            CompressionOptions.read({**CompressionOptions.defaults(), **parse(options.split())})


def test_speed_is_measured_beside_a_copy_and_topk() -> None:
    figures = speed.measure(quick=True)
    named = {figure.what.partition(",")[0]: figure for figure in figures}
    assert {"qsgd-8", "qsgd-4", "qsgd-2", "half", "sign", "top-k"} <= set(named)
    assert named["qsgd-8"].target == named["qsgd-4"].target and named["top-k"].target
    assert all(figure.value > 0 for figure in figures)
