"""Reports: one page that stands alone, escapes what apps say, and draws only what is there."""

import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from umbel.core.errors import ConfigError
from umbel.server.output.figures import Round, is_share, metric_text, plots_of, size_text
from umbel.server.output.pages import Table
from umbel.server.output.plots import BLUE, Line, clean, draw_lines, thin
from umbel.server.output.report import Section, write_report
from umbel.server.output.rundir import RunDirectory

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png>$\\frac{1$"


class Page(HTMLParser):
    """The tags, attributes, headings and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self._silent = 0
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def round_line(number: int, **changes: Any) -> dict[str, Any]:
    accuracy = 0.9 - 0.5 / (number + 1)
    line = {
        "round": number,
        "seconds": 0.5,
        "phases": {"train": 0.4, "aggregate": 0.05},
        "bytes_down": 1_000_000,
        "bytes_up": 500_000,
        "clients": 10,
        "failed": [],
        "metrics": {"accuracy": accuracy, "loss": 1 - accuracy},
        "train": {"loss": 0.4},
        "federated": {
            "accuracy": {"mean": accuracy, "spread": 0.1, "worst_decile": 0.3, "nodes": 10}
        },
        "epsilon": None,
    }
    return {**line, **changes}


def short_line(number: int, **changes: Any) -> dict[str, Any]:
    """A round with as few things to draw as there can be."""
    return {"round": number, "metrics": {"accuracy": 0.5 + 0.1 * number}, **changes}


def write(
    path: Path,
    rounds: list[dict[str, Any]],
    result: Mapping[str, Any] | None = None,
    nodes: list[dict[str, Any]] | None = None,
    **config: Any,
) -> Page:
    run = RunDirectory.create(None, "t", {"app": "fashion", "nodes": 100, **config}, out=path)
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in rounds))
    if result is not None:
        run.write_result(result)
    if nodes is not None:
        run.write_nodes(nodes)
    report = write_report(path)
    assert report == run.report_path
    return Page(report)


def pngs(path: Path) -> set[str]:
    return {file.stem for file in path.glob("*.png")}


def assert_alone(page: Page) -> None:
    """Nothing on the page runs, or loads anything from anywhere."""
    assert page.count("script") == page.count("link") == page.count("img") == 0
    assert page.count("iframe") == page.count("object") == 0
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None and value.startswith("#"), (name, value)
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_a_finished_run_is_told_in_words_figures_and_plots(tmp_path: Path) -> None:
    result = {
        "rounds": 5,
        "metrics": {"accuracy": 0.8125, "loss": 0.52},
        "epsilon": None,
        "seconds": 75.0,
        "stopped": "rounds",
    }
    nodes = [{"node": f"n{i}", "examples": 10 * i + 5, "accuracy": i / 50} for i in range(50)]
    rounds = [round_line(n) for n in range(1, 6)]
    page = write(tmp_path / "run", rounds, result, nodes, options={"lr": 0.05, "seed": 7})
    assert_alone(page)
    assert "trained for 5 rounds on 100 nodes" in page.text
    assert "81.2\u00a0% accuracy and loss 0.520" in page.text.replace("81.2 %", "81.2\u00a0%")
    assert "all the rounds that were asked for" in page.text
    assert "Nobody: this run made no promise of differential privacy" in page.text
    for shown in ("1 min 15 s", "7.5 MB", "lr", "0.05", "seed"):
        assert shown in page.text.replace("\u00a0", " ")
    assert pngs(tmp_path / "run") == {
        "metric-accuracy", "metric-loss", "nodes", "bytes", "seconds",
    }  # fmt: skip
    assert page.count("figure") == 5
    assert page.source.count("<svg") == 6, "five drawings and the flower"
    assert "Failures" not in page.text


def test_nothing_is_shown_for_what_is_missing(tmp_path: Path) -> None:
    page = write(tmp_path / "empty", [])
    assert_alone(page)
    assert page.count("figure") == 0 and pngs(tmp_path / "empty") == set()
    assert "has not finished a round" in page.text
    assert "What happened" not in page.text and "ended with" not in page.text
    page = write(tmp_path / "bare", [{"round": 1}, {"round": 2, "metrics": {}}])
    assert page.count("figure") == 0
    assert "trained for 2 rounds" in page.text and "has not ended" in page.text


def test_one_round(tmp_path: Path) -> None:
    page = write(tmp_path / "run", [round_line(1)])
    assert "trained for 1 round on" in page.text
    assert pngs(tmp_path / "run") == {"metric-accuracy", "metric-loss", "bytes", "seconds"}


def test_ten_thousand_rounds_stay_a_small_page(tmp_path: Path) -> None:
    rounds = [round_line(n, epsilon=n**0.5) for n in range(1, 10_001)]
    rounds[4_567]["metrics"] = {"accuracy": 0.0123, "loss": 55.0}
    page = write(tmp_path / "run", rounds, {"rounds": 10_000, "epsilon": 100.0, "delta": 1e-5})
    assert len(page.source) < 1_000_000
    assert "epsilon" in pngs(tmp_path / "run")
    assert "Nobody yet: a private run promises something once it has ended" in page.text
    assert "Charged against model users so far: epsilon 100." in page.text
    assert "Each bar is the mean of 100 rounds" in page.text


@given(
    arrays.arrays(np.float64, st.integers(0, 3000), elements=st.floats(allow_nan=True)),
    st.integers(1, 50),
)
def test_thinning_keeps_ends_and_extremes(values: np.ndarray[Any, Any], buckets: int) -> None:
    kept = thin(values, buckets)
    assert len(kept) <= max(4 * buckets, 0) or len(kept) == len(values)
    assert np.all(np.diff(kept) > 0)
    if len(values):
        assert kept[0] == 0 and kept[-1] == len(values) - 1
    finite = values[np.isfinite(values)]
    if len(finite):
        drawn = values[kept][np.isfinite(values[kept])]
        assert drawn.min() == finite.min() and drawn.max() == finite.max()


def test_names_from_apps_are_text_and_nothing_else(tmp_path: Path) -> None:
    lines = [
        {
            "round": number,
            "seconds": 1.0,
            "phases": {HOSTILE: 0.5},
            "metrics": {HOSTILE: 0.5, "_hidden": 1.0, "$x$\x00\n": 2.0, "日本": 3.0},
            "federated": {HOSTILE: {"mean": 0.5, "spread": 0.1}},
            "failed": [{"node": HOSTILE, "reason": HOSTILE}],
        }
        for number in (1, 2)
    ]
    nodes = [{"node": HOSTILE, "examples": 3, HOSTILE: 0.5}, {"node": "b", HOSTILE: 0.7}]
    page = write(
        tmp_path / "run",
        lines,
        {"stopped": HOSTILE, "summary": {HOSTILE: {HOSTILE: HOSTILE}}},
        nodes,
        app=HOSTILE,
        options={HOSTILE: HOSTILE},
        command=[HOSTILE],
    )
    assert_alone(page)
    assert "alert('x')" in page.text
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in pngs(tmp_path / "run"))


def test_values_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    lines = [round_line(1)]
    for bad in (math.nan, math.inf, -math.inf, 1e308, None, "text", [1], {}, True):
        lines.append(dict.fromkeys(lines[0], bad) | {"round": len(lines) + 1})
        inner = {"accuracy": {"mean": bad, "spread": bad, "worst_decile": bad}, "loss": bad}
        broken = {"metrics": {"loss": bad}, "federated": inner, "failed": [bad], "train": inner}
        lines.append({**broken, "round": len(lines) + 1, "phases": {"train": bad}})
        end = {"metrics": {"accuracy": bad}, "seconds": bad, "epsilon": bad, "rounds": bad}
        page = write(tmp_path / f"run{len(lines)}", [], end)
        assert_alone(page)
        assert "nan s" not in page.text
    page = write(tmp_path / "run", lines)
    assert_alone(page)
    assert {"metric-accuracy", "metric-loss"} <= pngs(tmp_path / "run")


def test_divergence_is_said(tmp_path: Path) -> None:
    page = write(tmp_path / "run", [short_line(1), short_line(2, metrics={"loss": math.nan})])
    assert "Its loss is not a number, which means that training diverged." in page.text


def test_metrics_of_other_tasks(tmp_path: Path) -> None:
    rounds = [short_line(n, metrics={"rmse": 40 / n, "r2": 1 - 2 / n}) for n in range(1, 9)]
    result = {"metrics": {"rmse": 6.5, "r2": 0.75}, "stopped": "early-stop", "rounds": 8}
    page = write(tmp_path / "run", rounds, result)
    assert "It ended with rmse 6.5," in page.text
    assert "The best was 5, after round 8." in page.text
    assert "stopped early" in page.text
    assert {"metric-rmse", "metric-r2"} <= pngs(tmp_path / "run")


def test_an_infinite_epsilon_is_no_privacy(tmp_path: Path) -> None:
    page = write(tmp_path / "run", [short_line(1, epsilon=math.inf)], {"epsilon": math.inf})
    assert "Nobody yet" in page.text and "infinite (no protection)" in page.text
    assert "epsilon" not in pngs(tmp_path / "run")


def test_failures_are_counted_by_node(tmp_path: Path) -> None:
    failures = [{"node": "clinic-3", "reason": "deadline of 30 s passed"}]
    others = [{"node": f"n{i:02}", "reason": "gone"} for i in range(30)]
    rounds = [short_line(1, failed=failures), short_line(2), short_line(3, failed=failures)]
    page = write(tmp_path / "run", [*rounds, short_line(4, failed=others)])
    assert "clinic-3 2 1 to 3 deadline of 30 s passed (2 ×)" in page.text
    assert "11 more nodes failed less often" in page.text


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        ("a  b\nc  d", "a b c d"),
        ({"federated": {"accuracy": 0.9}, "local": {"accuracy": 0.8, "n": 5}}, "accuracy n"),
        ([{"who": "federated", "accuracy": 0.9}], "who accuracy federated 0.9"),
        ({"gain": 0.1, "detail": {"x": 1}}, "gain 0.1"),
        (3.5, "3.5"),
    ],
)
def test_a_summary_by_the_app(tmp_path: Path, summary: object, shown: str) -> None:
    page = write(tmp_path / "run", [], {"summary": summary})
    assert "Summary by the app" in page.text and shown in page.text


def test_other_parts_may_be_added(tmp_path: Path) -> None:
    RunDirectory.create(None, "t", {}, out=tmp_path)
    line = Line("one", BLUE, [1, 2], [0.5, 0.25])
    plot = draw_lines("extra", "Extra", "It falls.", [line], unit="things")
    table = Table(("unit", "epsilon"), [("client", "1.5"), ("<b>", "2")])
    page = Page(write_report(tmp_path, [Section("Privacy", "One.\n\nTwo.", [table], [plot])]))
    assert_alone(page)
    assert "Privacy One. Two. unit epsilon client 1.5" in page.text
    assert (tmp_path / "extra.png").read_bytes().startswith(b"\x89PNG")


def test_the_drawings_follow_the_page_and_the_pngs_do_not(tmp_path: Path) -> None:
    page = write(tmp_path / "run", [short_line(n) for n in range(1, 4)])
    drawings = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)[1:]
    assert all("var(--blue)" in drawing and BLUE not in drawing for drawing in drawings)
    image = (tmp_path / "run" / "metric-accuracy.png").read_bytes()
    width, height = struct.unpack(">II", image[16:24])
    assert width > 600 and height > 300
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    write(tmp_path / "run", [short_line(n) for n in range(1, 4)])
    before = (tmp_path / "run" / "report.html").read_bytes()
    assert write_report(tmp_path / "run").read_bytes() == before


def test_there_is_no_report_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        write_report(tmp_path)


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, umbel.server.output.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_texts() -> None:
    assert metric_text("accuracy", 0.8125).replace("\u00a0", " ") == "81.2 %"
    assert metric_text("accuracy", 81.25) == "81.2"
    assert metric_text("loss", 0.5) == "0.500"
    assert is_share("eval/acc", [0.1, math.nan]) and not is_share("accurate_bytes", [0.1])
    sizes = [size_text(n).replace("\u00a0", " ") for n in (0, 999, 999_999, 1.5e9, 4e13)]
    assert sizes == ["0 B", "999 B", "1 MB", "1.5 GB", "40 TB"]
    assert clean("_a\n b\x07") == " _a b" and len(clean("x" * 99)) == 48


def test_one_round_has_no_more_than_it_says() -> None:
    assert plots_of([Round.of({"round": 1})], []) == []
    assert plots_of([], [{"node": "a", "accuracy": 0.5}]) == [], "one node is no spread"
