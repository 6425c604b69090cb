"""The benchmark of liars: what each sends, what each rule makes of it, and when it says no."""

import json
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
from umbel.benchmarks.robust import poison
from umbel.benchmarks.robust.attacks import LIES, Scene
from umbel.benchmarks.robust.report import known, table, write
from umbel.benchmarks.robust.stacks import Attacked
from umbel.benchmarks.robust.suite import ATTACKS, Cell, Setting, measure
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError
from umbel.federation import Federation
from umbel.testing import assert_stands_liars

NODES, OPTIONS = 11, {"rounds": 15, "seed": 1}


def scene(nodes: int, liars: int) -> Scene:
    return Scene(nodes, liars, torch.Generator().manual_seed(0))


def evaluate(arrays: Any, _: Any) -> Any:
    """An accuracy that falls with the distance from the truth."""
    away = float(np.abs(arrays["w"] - TRUE).max())
    return {"accuracy": max(0.0, 1 - away), "loss": away}


def data(node: Node, _: Any) -> Split:
    return Split(examples(node.partition))


def setting(share: float = 0.2, **more: Any) -> Setting:
    return Setting(federation(), NODES, OPTIONS, share, **more)


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

    lying = poison.Poisoned(labelled, frozenset({1}), poison.flipped)
    assert lying(Node(0, 2, {}), {}).y.tolist() == [0, 1, 2]
    assert lying(Node(1, 2, {}), {}).train.y.tolist() == [2, 1, 0]


def test_a_rule_stands_what_the_mean_does_not(tmp_path: Path) -> None:
    attacks = ("replacement", "nan")
    cells = measure(setting(), ["mean", "median", "bulyan"], attacks)
    found = {(cell.rule, cell.attack): cell for cell in cells}
    assert len(found) == 9
    assert all(not cell.refused and cell.accuracy is not None for cell in cells)
    lost = found["mean", "replacement"].lost
    assert lost is not None and lost > 0.3
    for attack in attacks:
        lost = found["median", attack].lost
        assert lost is not None and lost < 0.1
    assert found["median", "nan"].liars == 2
    written = write(cells, tmp_path / "out", 0.1, {"liars": 0.2})
    assert json.loads((tmp_path / "out" / "robust.json").read_text()) == written
    assert "| median |" in (tmp_path / "out" / "robust.md").read_text()
    assert (tmp_path / "out" / "robust.png").read_bytes()[1:4] == b"PNG"
    assert not [name for name in written["fallen"] if name.startswith(("mean", "median"))]


def test_the_nodes_run_on_a_pool_that_is_asked_for() -> None:
    """The same accuracies, on threads that are not this one."""
    seen: set[int] = set()
    plain = setting()
    own: Any = plain.federation.data

    def watched(node: Node, options: Any) -> Any:
        seen.add(threading.get_ident())
        return own(node, options)

    given = replace(plain, federation=replace(plain.federation, data=watched))
    here = measure(given, ["median"], ["nan"])
    assert seen == {threading.get_ident()}
    seen.clear()
    there = measure(replace(given, pool="threads"), ["median"], ["nan"])
    assert seen and threading.get_ident() not in seen
    assert [cell.accuracy for cell in there] == [cell.accuracy for cell in here]


def test_what_a_rule_does_not_stand_is_said_and_not_run() -> None:
    cells = measure(setting(0.3), ["bulyan"], ["nan"])
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
        (["median/two"], ["nan"], 0.2, "the bucket of median/two is 'two'"),
    ],
)
def test_bad_names_and_shares_are_refused(
    rules: list[str], attacks: list[str], share: float, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        measure(setting(share), rules, attacks)


def test_every_attack_has_a_column() -> None:
    assert set(ATTACKS) == {"none", "label-flip", "backdoor", *LIES}


def test_a_folder_is_gone_on_with_and_only_in_its_own_setting(tmp_path: Path) -> None:
    told: list[str] = []
    cells = [Cell("median", "none", 0, 0.9), Cell("median", "nan", 2, 0.8)]
    write(cells, tmp_path, 0.1, {"liars": 0.2})
    before = known(tmp_path, {"liars": 0.2})
    made = measure(setting(), ["median"], ["nan"], told.append, before)
    assert [cell.accuracy for cell in made] == [0.9, 0.8] and len(told) == 2
    with pytest.raises(ConfigError, match="measured with other liars"):
        known(tmp_path, {"liars": 0.3})


def test_liars_that_see_everything_aim_at_the_mean_of_all() -> None:
    honest = torch.tensor([[1.0], [3.0], [8.0]])
    few = scene(4, 1)
    all_seen = Scene(4, 1, few.generator, honest)
    assert LIES["inner-product"](honest[:1], few).tolist() == [[-0.5]]
    assert LIES["inner-product"](honest[:1], all_seen).tolist() == [[-2.0]]
    (clear,) = [
        cell
        for cell in measure(setting(omniscient=True), ["mean"], ["inner-product"])
        if cell.attack != "none"
    ]
    assert clear.accuracy is not None
    refused = measure(setting(omniscient=True), ["secure+mean"], ["nan"])[1]
    assert "nobody sees all updates" in refused.refused


def test_liars_lie_under_secure_sums_and_buckets_stand_them() -> None:
    options = {**OPTIONS, "rounds": 6}
    few = Setting(federation(), 15, options, 0.1)
    found = {
        (cell.rule, cell.attack): cell
        for cell in measure(few, ["secure+mean", "secure+median/3"], ["sign-flip", "nan", "huge"])
    }
    assert not [cell.refused for cell in found.values() if cell.refused]
    harmed = found["secure+mean", "huge"].lost
    assert harmed is not None and harmed > 0.3
    for attack in ("sign-flip", "nan", "huge"):
        lost = found["secure+median/3", attack].lost
        assert lost is not None and lost < 0.1, attack


def test_a_backdoor_is_a_patch_that_decides() -> None:
    x = torch.zeros(4, 1, 14, 14)
    x[0, 0, 0, 0] = 2.0
    examples = Examples(x, torch.tensor([3, 1, 0, 2]))
    trained_on = poison.backdoored(examples)
    assert trained_on.y.tolist() == [0, 1, 0, 2]
    assert float(trained_on.x[0, 0, -2:, -2:].min()) == 2.0
    assert float(trained_on.x[1].max()) == 0.0 and float(x[0, 0, -1, -1]) == 0.0
    seen = poison.with_patch(examples)
    assert len(seen) == 3 and set(seen.y.tolist()) == {0}
    rows = poison.patched(np.eye(32, dtype=np.float32))
    assert (rows[:, -2:] == 1).all() and rows[5, 5] == 1 and rows[5, 6] == 0
    with pytest.raises(ConfigError, match="changes the classes"):
        poison.labelled(Examples(x, torch.zeros(4)))


def test_stacks_have_names() -> None:
    assert Attacked.named("secure+krum/3") == Attacked("krum", 3, True)
    assert Attacked("krum", 3, True).options(0.1) == {
        "aggregator": "krum",
        "liars": 0.1,
        "bucket-size": 3,
        "secure": True,
    }
    assert not Attacked.named("norm-bound").claims


def test_the_assertion_says_who_fell() -> None:
    cells = assert_stands_liars(
        federation(), ["median"], ["sign-flip"], nodes=NODES, options=OPTIONS
    )
    assert [cell.attack for cell in cells] == ["none", "sign-flip"]
    with pytest.raises(AssertionError, match="median under sign-flip"):
        assert_stands_liars(
            federation(), ["median"], ["sign-flip"], nodes=NODES, options=OPTIONS, floor=-1.0
        )
    with pytest.raises(AssertionError, match="mean promises to stand no liar"):
        assert_stands_liars(federation(), ["mean"], ["nan"], nodes=NODES, options=OPTIONS)
    with pytest.raises(AssertionError, match="was not tried"):
        assert_stands_liars(federation(), ["bulyan"], ["nan"], liars=0.3, nodes=NODES)
