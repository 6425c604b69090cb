"""Samplers that look at losses: power of choice and Oort, and where they are refused."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel
from tests.umbel.test_methods_run import FEDERATION
from umbel.core.errors import ConfigError, RunError
from umbel.strategies.oort import Oort
from umbel.strategies.power_of_choice import PowerOfChoice
from umbel.strategies.samplers import NodeHistory, SamplingContext, choose
from umbel.testing import check_sampler

FALSE_ALARM = 1e-7
"""Of each statistical test below, when the code is right."""


@dataclass(frozen=True)
class Node:
    partition: int

    @property
    def name(self) -> str:
        return str(self.partition)


NODES = [Node(place) for place in range(40)]


def told(losses: dict[int, float], number: int = 50, examples: Any = None) -> SamplingContext:
    history = {
        str(place): NodeHistory(
            1, 1, {"loss": loss, "num-examples": (examples or {}).get(place, 9)}
        )
        for place, loss in losses.items()
    }
    return SamplingContext(number, [3, number], history)


@pytest.mark.parametrize("sampler", [PowerOfChoice(6), PowerOfChoice(6, 40), Oort(6)], ids=str)
def test_they_keep_the_laws_of_samplers(sampler: Any) -> None:
    check_sampler(sampler)
    for known in (0, 3, 40):
        found = choose(sampler, NODES, told({place: 1.0 + place for place in range(known)}))
        assert len(found) == 6
    assert sampler.select([], told({})) == []


def test_of_all_candidates_the_worst_take_part_and_new_ones_come_first() -> None:
    losses = {place: float(place) for place in range(40)}
    found = PowerOfChoice(5, 40).select(NODES, told(losses))
    assert [node.partition for node in found] == [35, 36, 37, 38, 39]
    del losses[0], losses[1]
    found = PowerOfChoice(5, 40).select(NODES, told(losses))
    assert {0, 1} < {node.partition for node in found}


def test_candidates_are_drawn_by_their_examples() -> None:
    """One node has half of all examples; it is the one candidate in half of the rounds."""
    losses, examples = dict.fromkeys(range(40), 1.0), {0: 39 * 9}
    drawn = [
        PowerOfChoice(1, 1).select(NODES, told(losses, number, examples))[0].partition
        for number in range(2000)
    ]
    share = np.mean(np.array(drawn) == 0)
    assert abs(share - 0.5) < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * 2000))  # Hoeffding


def test_as_many_candidates_as_nodes_of_a_cohort_is_drawing_by_chance() -> None:
    losses = {place: float(place) for place in range(40)}
    found = [PowerOfChoice(5, 5).select(NODES, told(losses, number)) for number in range(400)]
    mean = np.mean([node.partition for cohort in found for node in cohort])
    assert abs(mean - 19.5) < 39 * math.sqrt(math.log(2 / FALSE_ALARM) / (2 * 2000))


def test_oort_explores_less_and_less_and_takes_what_is_worth_most() -> None:
    half = {place: 10.0 if place < 10 else 0.1 for place in range(20)}
    for number, new in ((1, 9), (20, round(10 * 0.9 * 0.98**19)), (500, 2)):
        found = [node.partition for node in Oort(10).select(NODES, told(half, number))]
        assert sum(place >= 20 for place in found) == new
        assert all(place < 10 for place in found if place < 20)


def test_oort_counts_examples_and_how_long_ago_a_node_was_there() -> None:
    alike = dict.fromkeys(range(40), 1.0)
    found = Oort(3).select(NODES, told(alike, 9, {5: 900, 6: 900, 7: 900}))
    assert {node.partition for node in found} == {5, 6, 7}
    recent = {
        str(place): NodeHistory(1, 2 if place < 4 else 90, {"loss": 0.001, "num-examples": 1})
        for place in range(40)
    }
    found = Oort(4).select(NODES, SamplingContext(100, [1], recent))
    assert {node.partition for node in found} == {0, 1, 2, 3}


@pytest.mark.parametrize("metrics", [{"num-examples": 3.0}, {"loss": math.nan}])
def test_a_node_without_a_loss_is_a_sentence(metrics: dict[str, float]) -> None:
    ctx = SamplingContext(2, [1], {"4": NodeHistory(1, 1, metrics)})
    for sampler in (PowerOfChoice(3), Oort(3)):
        with pytest.raises(RunError, match=r"node 4 said (none|nan); return a finite loss"):
            sampler.select(NODES, ctx)


@pytest.mark.parametrize("cohort", ["power-of-choice", "oort"])
def test_runs_choose_by_losses_and_repeat_themselves(cohort: str, tmp_path: Path) -> None:
    options = {"rounds": 5, "cohort": cohort, "cohort-size": 2.0}
    runs = [
        umbel.run(FEDERATION, options=options, nodes=6, out=tmp_path / name) for name in ("a", "b")
    ]
    models = [one.path.joinpath("model.safetensors").read_bytes() for one in runs]
    assert models[0] == models[1]
    first = umbel.run(FEDERATION, options={**options, "rounds": 3}, nodes=6, out=tmp_path / "c")
    went_on = umbel.run(FEDERATION, options={"rounds": 5}, resume=first.path)
    assert went_on.path.joinpath("model.safetensors").read_bytes() == models[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"secure": True}, "may see because updates are hidden"),
        ({"epsilon": 8.0}, "may see because the run is private"),
        ({"cohort-size": 0.0}, "needs cohort-size"),
        ({"cohort-candidates": 1}, "cohort-candidates is 1, below cohort-size 2"),
        ({"cohort": "fixed", "cohort-candidates": 4}, "but cohort is fixed; give"),
        ({"mode": "async"}, "mode=async has no cohorts"),
    ],
)
def test_what_cannot_be_had_is_a_sentence(given: Any, words: str, tmp_path: Path) -> None:
    options = {"cohort": "power-of-choice", "cohort-size": 2.0, **given}
    with pytest.raises(ConfigError, match=words):
        umbel.run(FEDERATION, options=options, nodes=6, out=tmp_path / "refused")
