"""`umbel compare`: real runs side by side, liars, and the page."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import APPS, WarmCommand
from umbel.core.errors import ConfigError
from umbel.server.output.comparing import Target, compare, write_page
from umbel.server.output.rundir import RunDirectory

SHARED: dict[str, Any] = {"rounds": 3, "learning-rate": 0.1}


@pytest.fixture(scope="module")
def pair(umbel: WarmCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real runs, `one` and `two`, that differ in two options."""
    where = tmp_path_factory.mktemp("pair")
    for name, change in (("one", {}), ("two", {"rounds": 2, "local-epochs": 2})):
        keywords = {"app": APPS / "digits", "options": SHARED | change, "workers": 0}
        assert umbel.run(cwd=where, **keywords, out=where / name).status == 0
    return where


def written(folder: Path, name: str, values: list[float], **more: Any) -> Path:
    """A run with one line a round; `more` goes into each."""
    run = RunDirectory.create(None, name, {"app": name, "options": {}}, out=folder / name)
    for at, value in enumerate(values):
        run.append_round({"round": at, "metrics": {"accuracy": value}, **more})
    return run.path


def test_the_table_says_what_the_runs_wrote(umbel: WarmCommand, pair: Path) -> None:
    asked = ("compare", "one", "two", "--target", "accuracy=0.2", "--json")
    found = json.loads(umbel.command(*asked, cwd=pair).out)
    assert (found["metric"], found["target"]) == ("accuracy", {"accuracy": 0.2})
    for line in found["runs"]:
        rounds = RunDirectory.open(pair / line["run"]).rounds()
        values = {one["round"]: one["metrics"]["accuracy"] for one in rounds}
        trained = [one for one in rounds if one["round"] > 0]
        assert line["rounds"] == len(trained) == {"one": 3, "two": 2}[line["name"]]
        assert line["last"] == rounds[-1]["metrics"]["accuracy"]
        assert line["best"] == max(values.values()) == values[line["best_round"]]
        reached = [at for at, value in values.items() if value >= 0.2]
        assert line["target_round"] == (min(reached) if reached else None)
        for name in ("bytes_down", "bytes_up"):
            assert line[name] == sum(one[name] for one in trained) > 0
        assert line["seconds"] == pytest.approx(sum(one["seconds"] for one in trained))
        assert line["epsilon"] is None
    options = {"rounds": [3, 2], "local-epochs": [1, 2]}
    assert found["differences"] == {"settings": {}, "options": options}


def test_people_read_a_table_and_below_it_the_differences(umbel: WarmCommand, pair: Path) -> None:
    shown = umbel.command("compare", "one", "two", cwd=pair).out
    above, below = (part.splitlines() for part in shown.strip().split("\n\n"))
    assert re.split(r" {2,}", above[0])[:4] == ["run", "rounds", "last accuracy", "best accuracy"]
    assert [line.split()[0] for line in above[1:]] == ["one", "two"]
    assert [line.split() for line in below] == [
        ["option", "one", "two"],
        ["local-epochs", "1", "2"],
        ["rounds", "3", "2"],
    ]


def test_the_page_has_the_table_and_the_plot_and_fetches_nothing(
    umbel: WarmCommand, pair: Path
) -> None:
    ended = umbel.command("compare", "one", "two", "--out", "page.html", cwd=pair)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, "page.html")
    page = (pair / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") == 2, "the brand and one plot"
    assert "Accuracy by round" in page
    assert '<th scope="row">local-epochs</th><td>1</td><td>2</td>' in page
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import|<script", page)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["one"], "1 run cannot be compared; give at least two"),
        (["one", "../pair/one"], "is given twice"),
        (["one", "nowhere"], "nowhere is not a directory"),
        (["one", "."], "is not a run directory"),
        (["one", "two", "--target", "f1=0.5"], "no run has the metric 'f1' of --target; they have"),
        (["one", "two", "--target", "accuracy"], "--target is 'accuracy'; give NAME=NUMBER"),
        (["one", "two", "--target", "accuracy=nan"], "--target is 'accuracy=nan'"),
        (["one", "two", "--target", "height=3"], "whether more or less is better"),
        (["one", "two", "--out", "page.pdf"], "the page is HTML"),
        (["one", "two", "--out", "one/page.html"], "in a run's own directory"),
        (["one", "two", "--out", "no/page.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    umbel: WarmCommand, pair: Path, asked: list[str], sentence: str
) -> None:
    asked = [word.replace("../pair/", f"../{pair.name}/") for word in asked]
    ended = umbel.command("compare", *asked, cwd=pair)
    assert ended.status == (1 if "written" in sentence else 2)
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert sentence in ended.err


def test_less_of_a_loss_is_better_and_what_is_not_finite_is_never_best(tmp_path: Path) -> None:
    for name, losses in (("one", [3.0, 1.0, math.inf, 2.0]), ("two", [3.0, math.nan])):
        run = RunDirectory.create(None, name, {"app": "x"}, out=tmp_path / name)
        for at, loss in enumerate(losses):
            run.append_round({"round": at, "metrics": {"loss": loss}, "epsilon": math.inf})
    found = compare([tmp_path / "one", tmp_path / "two"], Target.parse("loss=1.5"))
    one, two = found.lines()
    assert (one["best"], one["best_round"], one["target_round"], one["last"]) == (1.0, 1, 1, 2.0)
    assert (two["best"], two["best_round"], two["target_round"]) == (3.0, 0, None)
    assert math.isnan(two["last"])
    assert one["epsilon"] == math.inf, "infinite is not none"
    assert found.table().rows[0][-1] == "infinite"


def test_values_of_nodes_stand_in_for_the_coordinators_and_that_is_said(tmp_path: Path) -> None:
    central = written(tmp_path, "central", [0.1, 0.5])
    nodes = RunDirectory.create(None, "nodes", {"app": "x"}, out=tmp_path / "nodes")
    fair = {"accuracy": {"mean": 0.7, "worst_decile": 0.2}}
    nodes.append_round({"round": 1, "metrics": {}, "federated": fair})
    found = compare([central, nodes.path])
    assert [line["last"] for line in found.lines()] == [0.5, 0.7]
    assert [line["measured"] for line in found.lines()] == ["coordinator", "nodes"]
    (note,) = found.notes()
    assert "in nodes, and by the coordinator elsewhere" in note
    assert not compare([central, written(tmp_path, "more", [0.2])]).notes()


def test_options_are_compared_as_values_under_todays_names(tmp_path: Path) -> None:
    each: list[dict[str, Any]] = [
        {"tau": 0.5, "seed": 2**60, "lr": 1, "secure": True, "clip": math.inf, "only": ""},
        {"adaptive-epsilon": 0.5, "seed": 2**60 + 1, "lr": 1.0, "secure": 1, "clip": math.inf},
    ]
    for at, options in enumerate(each):
        RunDirectory.create(None, "x", {"app": "x", "options": options}, out=tmp_path / str(at))
    found = compare([tmp_path / "0", tmp_path / "1"])
    assert found.differences()["options"] == {
        "only": ["", None],
        "secure": [True, 1],
        "seed": [2**60, 2**60 + 1],
    }
    assert found.differing().rows[0] == ["only", '""', "-"]
    assert (found.metric, found.plot()) == (None, None), "no round yet: no metric, no plot"


def test_names_are_escaped_and_told_apart(tmp_path: Path) -> None:
    liar = "<script>x&$a_b$"
    one, two = written(tmp_path / "a", liar, [0.1]), written(tmp_path / "b", liar, [0.2])
    found = compare([one, two, written(tmp_path, "c", [0.3])])
    names = [line["name"] for line in found.lines()]
    assert names == [f"a/{liar}", f"b/{liar}", f"{tmp_path.name}/c"]
    page = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(names[0]) in page


def test_more_runs_than_can_be_told_apart_are_all_listed(tmp_path: Path) -> None:
    found = compare([written(tmp_path, f"{at:02}-{50 * 'n'}", [at / 20]) for at in range(15)])
    plot = found.plot()
    assert plot is not None
    assert "the first 14 runs" in plot.sentence
    assert len(found.table().rows) == 15


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    one, two = written(tmp_path, "one", [0.1]), written(tmp_path, "two", [0.1])
    (two / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"two.config\.json cannot be read as JSON"):
        compare([one, two])
