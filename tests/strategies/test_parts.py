"""Parts as values or names: what is taken, what is refused, and what the accounting makes of it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from torch import Tensor

from umbel.core import registry
from umbel.core.errors import ConfigError, RunError
from umbel.core.registry import register
from umbel.server.private.plan import charge_for
from umbel.server.private.plan import check_sampler as check_private_sampler
from umbel.strategies.optimizers import FedAvg, advance
from umbel.strategies.parts import check_given, default_names, part_for, required_part
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import (
    Everyone,
    FixedSize,
    NodeHistory,
    Poisson,
    Sampling,
    SamplingContext,
    check_bounds,
    choose,
    remember,
)
from umbel.strategies.transform import Claim, Facts
from umbel.testing import check_optimizer, check_sampler

OPTIONS: dict[str, Any] = {**RunOptions.defaults()}


@dataclass(frozen=True)
class Node:
    name: str
    partition: int


NODES = [Node(str(i), i) for i in range(10)]


@dataclass(frozen=True)
class Some:
    """The nodes at these places, whatever else is true."""

    places: tuple[int, ...] = (1, 3)
    most: int = 2
    sampling: Sampling | None = None
    name: str = "some"

    def bounds(self, population: int) -> tuple[float, int]:
        return min(2.0, population), min(self.most, population)

    def select(self, nodes: Any, ctx: SamplingContext) -> Any:  # noqa: ARG002
        return [nodes[i] for i in self.places]


@dataclass(frozen=True)
class Jump:
    """Goes where the update points, and misbehaves where it is told to."""

    fault: str = ""
    name: str = "jump"
    kept: list[float] = field(default_factory=list, compare=False)

    def init(self, parameters: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {"steps": torch.zeros(1)}

    def step(
        self, parameters: Tensor, update: Tensor, slots: dict[str, Tensor]
    ) -> tuple[Any, dict[str, Any]]:
        self.kept.append(1.0)
        if self.fault == "mutates":
            parameters.add_(update)
        if self.fault == "shape":
            return parameters[:-1], slots
        if self.fault == "numbers":
            return parameters + update, {"steps": 3}
        extra = len(self.kept) if self.fault == "keeps" else 0
        return parameters + update + extra, {"steps": slots["steps"] + 1}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield
    registry._installed.cache_clear()


# ---- values, functions, names


def test_a_value_a_function_and_a_name_give_the_same_part() -> None:
    part = Jump()
    register("optimizer", "jump", lambda options: replace(part, name=str(options["cohort"])))
    for given, named, name in (
        (part, "app", "jump"),
        (lambda options: replace(part, name=str(options["cohort"])), "app", "all"),
        (functools.partial(lambda _, made: made, made=part), "app", "jump"),
        (None, "jump", "all"),
        (FedAvg(), "jump", "all"),  # an option goes before the app's own
    ):
        found = required_part("optimizer", given, {**OPTIONS, "optimizer": named})
        assert found.name == name
    assert part_for("objective", None, OPTIONS) is None


def test_what_the_app_brings_is_the_options_default() -> None:
    given = {"optimizer": Jump(), "sampler": "poisson", "aggregator": None, "objective": None}
    assert default_names(given) == {"optimizer": "app", "cohort": "poisson"}


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        ("optimizer", Jump, r"class Jump; give an object, such as Jump\(\)"),
        ("optimizer", Some(), "optimizer is a Some without init and step"),
        ("sampler", 3, "sampler is a int without bounds and name and sampling and select"),
    ],
)
def test_what_cannot_be_a_part_is_refused_when_it_is_handed_over(
    kind: str, part: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_given(kind, part)


def test_what_a_function_makes_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="optimizer is a Some without init and step"):
        part_for("optimizer", lambda _: Some(), {**OPTIONS, "optimizer": "app"})


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("optimiser", "mine", "no kind of part 'optimiser'; it can be optimizer, sampler"),
        ("optimizer", "my own", "'my own'; give it a name without spaces"),
        ("optimizer", "", "give it a name"),
        ("optimizer", "fedavg", "'fedavg' is Umbel's own"),
        ("sampler", "app", "'app' is Umbel's own"),
    ],
)
def test_a_name_that_no_option_can_have_is_refused(kind: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        register(kind, name, Jump())


def test_a_name_that_nobody_registered_lists_those_there_are() -> None:
    register("sampler", "some", Some())
    assert RunOptions(cohort="some").cohort == "some"
    known = "all, fixed, poisson, power-of-choice, oort, some, app"
    with pytest.raises(ConfigError, match=rf"cohort is 'sone'; .* {known}"):
        RunOptions(cohort="sone")
    with pytest.raises(ConfigError, match=r"optimizer=app .* brings none; it can be fedavg"):
        required_part("optimizer", None, {**OPTIONS, "optimizer": "app"})


def test_an_installed_package_brings_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought.py").write_text("def make(options): return ('made', options['seed'])\n")
    folder = tmp_path / "brought-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
    points = "[umbel.parts]\npool.brought = brought:make\nsampler.broken = nowhere:make\n"
    (folder / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    assert registry.is_known("pool", "brought")
    assert registry.make("pool", "brought", {"seed": 3}) == ("made", 3)
    with pytest.raises(ConfigError, match=r"'broken' of an installed package .* cannot be import"):
        registry.make("sampler", "broken", {})


def test_built_in_names_need_no_look_at_installed_packages() -> None:
    registry._installed.cache_clear()
    RunOptions(optimizer="fedadam", cohort="poisson", cohort_size=3.0, method="app")
    assert registry._installed.cache_info().misses == 0


# ---- what a part does in a round


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Some((1, 1)), "chose a node twice for round 7"),
        (Some((1, 2, 3)), "chose 3 nodes for round 7, and says in bounds that there are 2 at most"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(sampler: Some, words: str) -> None:
    with pytest.raises(RunError, match=words):
        choose(sampler, NODES, SamplingContext(7))


def test_a_node_of_nowhere_is_refused() -> None:
    class Stranger(Some):
        def select(self, nodes: Any, ctx: SamplingContext) -> Any:  # noqa: ARG002
            return [Node("stranger", 99)]

    with pytest.raises(RunError, match="which is not one of the nodes"):
        choose(Stranger(), NODES, SamplingContext(1))


def test_bounds_are_numbers_of_a_round() -> None:
    for expected, most in ((0.0, 2), (3.0, 2), (2.0, 11), (float("nan"), 2)):

        class Off(Some):
            limits: ClassVar[tuple[float, int]] = (expected, most)

            def bounds(self, population: int) -> tuple[float, int]:  # noqa: ARG002
                return self.limits

        with pytest.raises(ConfigError, match="let bounds return"):
            check_bounds(Off(), 10)


def test_history_counts_rounds_and_keeps_the_last_measurement() -> None:
    after = remember({}, 1, NODES[:2], {"0": {"loss": 2.0}})
    after = remember(after, 4, NODES[:1], {})
    assert after == {"0": NodeHistory(2, 4, {"loss": 2.0}), "1": NodeHistory(1, 1, {})}
    assert SamplingContext(5, None, after).of(NODES[9]) == NodeHistory()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("shape", r"returned \(63,\) in place of a model of \(64,\)"),
        ("numbers", "keeps 'steps' as a int; keep tensors only"),
        ("mutates", "leaves the model, the update and the state alone"),
        ("keeps", "the same model, update and state give the same bits"),
    ],
)
def test_the_laws_of_an_optimizer_are_tried(fault: str, words: str) -> None:
    check_optimizer(Jump())
    with pytest.raises(AssertionError, match=words):
        check_optimizer(Jump(fault))


def test_an_update_comes_in_the_type_of_the_model() -> None:
    after, _ = advance(
        Jump(), torch.zeros(3), torch.ones(3, dtype=torch.float64), {"steps": torch.zeros(1)}
    )
    assert after.dtype == torch.float32


def test_the_laws_of_a_sampler_are_tried() -> None:
    for sampler in (Everyone(), FixedSize(3), Poisson(3.0), Poisson(3.0, cap=5), Some()):
        check_sampler(sampler)

    class Moody(Some):
        drawn: ClassVar[list[int]] = []

        def select(self, nodes: Any, ctx: SamplingContext) -> Any:  # noqa: ARG002
            self.drawn.append(1)
            return nodes[len(self.drawn) % 5 :][:2]

    with pytest.raises(AssertionError, match="the same round, seed and history give the same"):
        check_sampler(Moody())


# ---- accounting


def claim() -> Claim:
    facts = Facts(
        size=1, l2_bound=1.0, weight_bound=1.0, public_denominator=True, kind="sum", grid=2.0**-17
    )
    found = Gaussian(noise_multiplier=2.0).claim(facts)
    assert found is not None
    return found


def test_a_sampler_gets_the_amplification_that_it_claims_and_no_other() -> None:
    assert isinstance(charge_for(claim(), Poisson(2.0), 10).event, PoissonSampledDpEvent)
    assert isinstance(charge_for(claim(), Some(), 10).event, GaussianDpEvent)
    assert isinstance(charge_for(claim(), Everyone(), 10).event, GaussianDpEvent)


@pytest.mark.parametrize(
    ("sampler", "privacy", "separation", "words"),
    [
        (Some(sampling=Sampling("poisson", 2.0)), PrivacyOptions(), 1, "which nobody can check"),
        (Some(), PrivacyOptions(sampling="fixed"), 1, "leave sampling out"),
        (Some(), PrivacyOptions(), 6, "each must rest 6 rounds; let it take 1 at most"),
    ],
)
def test_what_the_accounting_could_not_count_on_is_refused(
    sampler: Some, privacy: PrivacyOptions, separation: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_private_sampler(sampler, privacy, 10, separation)
