"""The benchmark of liars: what each sends, what each rule makes of it, and when it says no."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.umbel.test_robust import TRUE, examples, train
from umbel.benchmarks.robust import suite
from umbel.benchmarks.robust.attacks import ATTACKS, LIES, FlippedLabels, Scene
from umbel.benchmarks.robust.suite import Cell, measure, table, write
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError
from umbel.federation import Federation

NODES, OPTIONS = 11, {"rounds": 15, "seed": 1}


def scene(nodes: int, liars: int) -> Scene:
    return Scene(nodes, liars, torch.Generator().manual_seed(0))


def evaluate(arrays: Any, _: Any) -> Any:
    """An accuracy that falls with the distance from the truth."""
    away = float(np.abs(arrays["w"] - TRUE).max())
    return {"accuracy": max(0.0, 1 - away), "loss": away}


def data(node: Node, _: Any) -> Split:
    return Split(examples(node.partition))


def federation() -> Federation:
    trainer = FunctionTrainer(lambda _: {"w": np.zeros(2)}, train, evaluate)
    return Federation(trainer, data, test=lambda _: examples(500))


@given(st.integers(1, 6), st.integers(0, 99))
def test_lies_have_the_shape_of_updates_and_leave_those_as_they_are(liars: int, seed: int) -> None:
    own = torch.randn(liars, 5, generator=torch.Generator().manual_seed(seed))
    before = own.clone()
    for name, lie in LIES.items():
        sent = lie(own, scene(15, liars))
        assert sent.shape == own.shape, name
        assert torch.equal(own, before), name
        assert bool(torch.isfinite(sent).all()) == (name != "nan")


def test_a_replacement_takes_the_place_of_the_average() -> None:
    honest = torch.ones(8, 3)
    lies = LIES["replacement"](honest[:2], scene(10, 2))
    average = torch.cat([honest, lies]).mean(0)
    assert torch.allclose(average, 0.8 * torch.ones(3) - 1.0)


def test_min_max_stays_among_the_updates() -> None:
    own = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    sent = LIES["min-max"](own, scene(30, 6))[0]
    farthest = torch.cdist(own, own).max()
    assert float((own - sent).norm(dim=1).max()) == pytest.approx(float(farthest), rel=1e-3)


def test_little_is_enough_is_less_than_a_deviation_or_two_away() -> None:
    own = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    away = (LIES["little-is-enough"](own, scene(50, 10))[0] - own.mean(0)) / own.std(0)
    assert bool((away <= 0).all()) and bool((away > -2).all())


def test_labels_are_turned_round_on_liars_only() -> None:
    def labelled(_: Node, __: Any) -> Examples:
        return Examples(torch.zeros(3, 1), torch.tensor([0, 1, 2]))

    lying = FlippedLabels(labelled, frozenset({1}))
    assert lying(Node(0, 2, {}), {}).y.tolist() == [0, 1, 2]
    assert lying(Node(1, 2, {}), {}).train.y.tolist() == [2, 1, 0]


def test_a_rule_stands_what_the_mean_does_not(tmp_path: Path) -> None:
    attacks = ("replacement", "nan")
    cells = measure(federation(), NODES, OPTIONS, ["mean", "median", "bulyan"], attacks, 0.2)
    found = {(cell.rule, cell.attack): cell for cell in cells}
    assert len(found) == 9
    assert all(not cell.refused and cell.accuracy is not None for cell in cells)
    lost = found["mean", "replacement"].lost
    assert lost is not None and lost > 0.3
    for attack in attacks:
        lost = found["median", attack].lost
        assert lost is not None and lost < 0.1
    assert found["median", "nan"].liars == 2
    written = write(cells, tmp_path / "out", 0.1)
    assert json.loads((tmp_path / "out" / "robust.json").read_text()) == written
    assert "| median |" in (tmp_path / "out" / "robust.md").read_text()
    assert not [name for name in written["fallen"] if name.startswith(("mean", "median"))]


def test_the_nodes_run_on_a_pool_that_is_asked_for() -> None:
    """The same accuracies, on threads that are not this one."""
    seen: set[int] = set()
    plain = federation()
    own: Any = plain.data

    def watched(node: Node, options: Any) -> Any:
        seen.add(threading.get_ident())
        return own(node, options)

    given = replace(plain, data=watched, test=plain.test or own.central_test)
    here = measure(given, NODES, OPTIONS, ["median"], ["nan"], 0.2)
    assert seen == {threading.get_ident()}
    seen.clear()
    there = measure(given, NODES, OPTIONS, ["median"], ["nan"], 0.2, pool="threads")
    assert seen and threading.get_ident() not in seen
    assert [cell.accuracy for cell in there] == [cell.accuracy for cell in here]


def test_what_a_rule_does_not_stand_is_said_and_not_run() -> None:
    cells = measure(federation(), NODES, OPTIONS, ["bulyan"], ["nan"], 0.3)
    assert all("stands fewer than 0.25" in cell.refused for cell in cells)
    assert "refused" in table(cells)


def test_a_rule_that_falls_is_named() -> None:
    assert Cell("median", "nan", 2, 0.5, 0.3).falls(0.1)
    assert Cell("median", "nan", 2, None, None).falls(0.1)
    for stands in (
        Cell("median", "nan", 2, 0.8, 0.05),
        Cell("mean", "nan", 2, 0.5, 0.3),
        Cell("median", "nan", 2, refused="too few"),
    ):
        assert not stands.falls(0.1)


@pytest.mark.parametrize(
    ("rules", "attacks", "share", "sentence"),
    [
        (["mode"], ["nan"], 0.2, "the rule is 'mode'"),
        (["median"], ["gossip"], 0.2, "the attack is 'gossip'"),
        (["median"], ["nan"], 0.01, "0 liars; take some"),
    ],
)
def test_bad_names_and_shares_are_refused(
    rules: list[str], attacks: list[str], share: float, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        measure(federation(), NODES, OPTIONS, rules, attacks, share)


def test_every_attack_has_a_column() -> None:
    assert set(ATTACKS) == {"none", "label-flip", *LIES} and math.isclose(suite.FLOOR, 0.1)
