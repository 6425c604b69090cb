"""Robust aggregation by options: a liar is named and does no harm, in the clear and in secret."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel
from umbel.scaffold import new_app
from umbel.server.output.report import write_report

TRUE = np.array([1.0, -1.0])
LIAR = 3
NODES = 12


def examples(seed: int, sign: float = 1.0) -> umbel.Examples:
    x = np.random.default_rng(seed).normal(size=(20, 2))
    return umbel.Examples(x, sign * x @ TRUE)


def data(node: umbel.Node, _: Any) -> umbel.Examples:
    return examples(node.partition, -100.0 if node.partition == LIAR else 1.0)


def train(arrays: Any, given: Any, _: Any) -> Any:
    error = given.x @ arrays["w"] - given.y
    return {"w": arrays["w"] - 0.02 * given.x.T @ error}, len(error), {}


def federation(**parts: Any) -> umbel.Federation:
    trainer = umbel.FunctionTrainer(lambda _: {"w": np.zeros(2)}, train)
    return umbel.Federation(trainer, data, **parts)


def ran(tmp_path: Path, app: umbel.Federation | None = None, **given: Any) -> umbel.Result:
    options = {name.replace("_", "-"): value for name, value in given.items()}
    app = app or federation()
    return umbel.run(app, options={"rounds": 6, **options}, nodes=NODES, out=tmp_path / "run")


def lines(result: umbel.Result) -> list[dict[str, Any]]:
    text = (result.path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "given",
    [
        {"aggregator": "median"},
        {"aggregator": "multi-krum"},
        {"aggregator": "geometric-median"},
        {"aggregator": "trimmed-mean", "bucket_size": 2, "liars": 0.1},
        {"aggregator": "median", "secure": True, "bucket_size": 3, "liars": 0.1},
        {"aggregator": "geometric-median", "secure": True, "bucket_size": 3, "liars": 0.1},
    ],
    ids=str,
)
def test_a_liar_does_no_harm_and_is_named(tmp_path: Path, given: dict[str, Any]) -> None:
    result = ran(tmp_path, **given)
    assert np.abs(result.model()["w"] - TRUE).max() < 0.3
    every = lines(result)
    for line in every:
        assert str(LIAR) in [row["node"] for row in line["judged"]]
        assert line["clients"] == NODES
    write_report(result.path)
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert "Updates left out or weighed down" in page
    if given.get("secure"):
        assert {line["secure"]["buckets"] for line in every} == {NODES // 3}
        assert len(every[-1]["judged"]) % 3 == 0  # nobody can tell the liar in its bucket


def test_the_mean_stands_no_liar(tmp_path: Path) -> None:
    result = ran(tmp_path, aggregator="mean")
    assert np.abs(result.model()["w"] - TRUE).max() > 1
    assert "judged" not in lines(result)[-1]


def test_buckets_are_drawn_anew_each_round_and_the_same_by_one_seed(tmp_path: Path) -> None:
    given = {"aggregator": "median", "secure": True, "bucket_size": 3, "liars": 0.1}
    results = [ran(tmp_path / str(i), **given) for i in range(2)]
    first, second = ([line["judged"] for line in lines(result)] for result in results)
    assert first == second
    assert len({tuple(row["node"] for row in judged) for judged in first}) > 1
    assert (results[0].model()["w"] == results[1].model()["w"]).all()


def test_the_coordinators_own_examples_decide_whom_to_trust(tmp_path: Path) -> None:
    result = ran(tmp_path, federation(root=lambda _: examples(99)), aggregator="fltrust")
    assert np.abs(result.model()["w"] - TRUE).max() < 0.3
    assert [row["node"] for row in lines(result)[0]["judged"]] == [str(LIAR)]


def of_another_kind(_: Any) -> umbel.Examples:
    return umbel.Examples(np.ones((4, 3)), np.ones(4))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"aggregator": "mode"}, "it can be mean, median"),
    ({"aggregator": "median", "liars": 0.5}, "median stands fewer than 0.5"),
    ({"aggregator": "bulyan", "cohort": "fixed", "cohort_size": 6}, "bulyan needs 7 updates"),
    ({"aggregator": "median", "liars": 0.2, "bucket_size": 3}, "take smaller buckets"),
    ({"aggregator": "fltrust"}, "give Federation\\(root="),
    ({"aggregator": "median", "epsilon": 3.0}, "choice among the updates"),
    ({"aggregator": "median", "secure": True}, "give bucket-size=N"),
    (
        {"aggregator": "median", "secure": True, "bucket_size": 2, "liars": 0.1},
        "no secure sum is made of fewer than 3",
    ),
    (
        {"aggregator": "median", "secure": True, "bucket_size": 30, "liars": 0.01},
        "bucket-size is 30, but at most 12 nodes come",
    ),
    (
        {"aggregator": "krum", "secure": True, "bucket_size": 3, "liars": 0.1},
        "krum needs 5 updates to stand 1 liar",
    ),
    ({"liars": 0.3}, "stands no liar; give aggregator=median"),
    ({"aggregator": "mean", "bucket_size": 3}, "bucket-size is 3"),
    ({"aggregator": "median", "buffers": "mean"}, "averages of running statistics"),
    ({"aggregator": "median", "max_examples": 5}, "does not weigh nodes by their examples"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED, ids=[str(g) for g, _ in REFUSED])
def test_what_cannot_be_given_is_refused_in_a_sentence(
    tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(umbel.UmbelError, match=sentence):
        ran(tmp_path, **given)


@pytest.mark.parametrize("root", [of_another_kind])
def test_root_examples_that_do_not_fit_are_refused(
    tmp_path: Path, root: Callable[[Any], Any]
) -> None:
    with pytest.raises(umbel.UmbelError, match="cannot train on its own root examples"):
        ran(tmp_path, federation(root=root), aggregator="fltrust")


def test_local_noise_stands_under_a_rule(tmp_path: Path) -> None:
    result = ran(tmp_path, aggregator="median", mechanism="local", epsilon=50.0)
    assert (result.path / "certificate.json").is_file()


def test_workers_and_a_resumed_run_make_the_same_model(tmp_path: Path) -> None:
    app = new_app(tmp_path / "digits")
    given = {"aggregator": "multi-krum", "bucket-size": 2, "liars": 0.1, "rounds": 4}
    given |= {"schedule": "constant", "cohort": "all", "seed": 5}

    def digest(**how: Any) -> bytes:
        options = {**given, **how.pop("changes", {})}
        return (umbel.run(options=options, **how).path / "model.safetensors").read_bytes()

    whole = digest(app=app, nodes=14, workers=0, out=tmp_path / "whole")
    assert digest(app=app, nodes=14, workers=2, out=tmp_path / "workers") == whole
    half = tmp_path / "half"
    digest(app=app, nodes=14, workers=0, out=half, changes={"rounds": 2})
    assert digest(resume=half, workers=0) == whole
