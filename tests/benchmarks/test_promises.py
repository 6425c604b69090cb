"""Mechanisms that were broken on purpose in somebody's own app, and correct ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umbel.benchmarks.attack import promises
from umbel.benchmarks.attack.defences import skip_clip
from umbel.benchmarks.attack.suite import Report, Row
from umbel.benchmarks.attack.verdicts import Verdict
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers import private_sgd
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.federation import Federation
from umbel.privacy.bounds.clipping import clip
from umbel.privacy.noise.entropy import Entropy
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian, deviation_of, entropy, noised
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.samplers import Poisson
from umbel.strategies.stack import Stack
from umbel.strategies.transform import NodeContext, RoundContext

NODES = 20


def model() -> nn.Module:
    return nn.Linear(64, 10)


def app(**changes: Any) -> Federation:
    plain = Federation(trainer=TorchTrainer(model), data=Partitioned("digits"), name="own")
    return replace(plain, **changes)


def stacked(*layers: Any) -> Federation:
    return app(stack=Stack(layers, PlainSum(weighting="fixed")))


def verdicts(federation: Federation, **options: Any) -> dict[str, Verdict]:
    found = promises.examine(federation, {"rounds": 3, **options}, NODES)
    return {f"{one.what}/{one.adversary}": one for one in found}


def outcome(federation: Federation, what: str, **options: Any) -> str:
    found = verdicts(federation, **options)
    report = Report([Row("own", "", "", {}, [], [], list(found.values()))])
    assert found[what].outcome == "holds" or report.problems() or report.untested()
    return found[what].outcome


# ---- correct ones: each test of each promise, at its real size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epsilon": 1.0, "cohort-size": 5.0}, {"noise/model-user", "sampling/model-user"}),
        ({"epsilon": 4.0, "mechanism": "local"}, {"noise/model-user", "noise/server"}),
        ({"epsilon": 4.0, "mechanism": "tree", "separation": 4}, {"noise/model-user"}),
        ({"epsilon": 4.0, "clipping": "adaptive", "sampling": "all"}, {"noise/model-user"}),
        ({"epsilon": 4.0, "secure": True}, {"noise/model-user", "noise/server"}),
        ({}, set()),
    ],
)
def test_correct_mechanisms_hold(options: Mapping[str, Any], expected: set[str]) -> None:
    found = verdicts(app(), **options)
    assert found.keys() == expected
    assert {one.outcome for one in found.values()} <= {"holds"}
    for one in found.values():
        if one.what == "noise" and one.adversary == "server" and "mechanism" in options:
            assert one.measured > 0.8 * one.claimed  # little more noise than promised is seen too


def test_correct_privacy_of_records_holds() -> None:
    found = verdicts(app(trainer=PrivateSgd(trainer=TorchTrainer(model))))
    assert {one.outcome for one in found.values()} == {"holds"}
    assert found.keys() == {"records/server", "sampling of records/server"}


# ---- broken ones


@dataclass(frozen=True)
class QuarterLocal(LocalGaussian):
    """A quarter of the noise, under the claim of all of it."""

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        bound = float(ctx.config["bound"])
        deviation = self.noise_multiplier * bound / 4
        noisy = noised(clip(update, bound).update, deviation, entropy(None, 0))
        return noisy.to(update.dtype)


@dataclass(frozen=True)
class Faulty(Gaussian):
    """Noise of another size, or of another source, than is claimed."""

    part: float = 1.0
    seed: int | None = None

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        deviation = deviation_of(self.noise_multiplier, ctx.facts, self.name) * self.part
        source = Entropy() if self.seed is None else Entropy(self.seed)
        noisy = noised(total, deviation, source) if self.part else total.double()
        return noisy, state


@dataclass(frozen=True)
class Deaf(Gaussian):
    """All noise and no updates."""

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> tuple[Tensor, None]:
        return super().decode(torch.zeros_like(total), state, ctx)


Z = 1.5
BROKEN = {
    "half of the central noise": (stacked(Clip(1.0), Faulty(Z, part=0.5)), "noise/model-user"),
    "noise of zeros": (stacked(Clip(1.0), Faulty(Z, part=0.0)), "noise/model-user"),
    "the same noise in each run": (stacked(Clip(1.0), Faulty(Z, seed=7)), "noise/model-user"),
    "no clipping": (
        app(stack=skip_clip(stacked(Clip(1.0), Gaussian(Z)).stack)),
        "noise/model-user",
    ),
    "a quarter of the nodes' noise": (
        stacked(Clip(1.0), QuarterLocal(4.0, 1e-5)),
        "noise/server",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_noise_is_found(name: str) -> None:
    federation, what = BROKEN[name]
    assert outcome(federation, what, sampling="all") == "broken"


def test_a_sampler_that_always_takes_three_nodes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Poisson.draw

    def draw(self: Poisson, population: int, entropy: Any) -> list[int]:
        return sorted({*honest(self, population, entropy), 0, 1, 2})

    monkeypatch.setattr(Poisson, "draw", draw)
    options = {"epsilon": 4.0, "cohort-size": 5.0}
    found = verdicts(app(), **options)["sampling/model-user"]
    assert found.outcome == "broken"
    assert "unit 0 in 16, 1 in 16, 2 in 16 at a claimed rate of 0.25" in found.words


@pytest.mark.parametrize(("part", "seed"), [(0.01, None), (0.5, None), (1.0, 3)])
def test_training_with_too_little_noise_is_found(
    part: float, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def less(flat: Tensor, deviation: float, source: Entropy) -> Tensor:
        return noised(flat, deviation * part, source if seed is None else Entropy(seed))

    monkeypatch.setattr(private_sgd, "noised", less)
    trained = app(trainer=PrivateSgd(trainer=TorchTrainer(model)))
    assert outcome(trained, "records/server") == "broken"


def test_training_without_clipping_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = private_sgd.PerExample.clipped_sum

    def loose(self: Any, inputs: Any, targets: Any, losses: Any, norm: float) -> Any:
        return honest(self, inputs, targets, losses, 100 * norm)

    monkeypatch.setattr(private_sgd.PerExample, "clipped_sum", loose)
    trained = app(trainer=PrivateSgd(trainer=TorchTrainer(model)))
    assert outcome(trained, "records/server") == "broken"


def test_training_that_always_takes_some_records_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = private_sgd._Step._uniform

    def uniform(self: Any, count: int) -> Any:
        drawn = honest(self, count)
        drawn[3:5] = 0.0
        return drawn

    monkeypatch.setattr(private_sgd._Step, "_uniform", uniform)
    trained = app(trainer=PrivateSgd(trainer=TorchTrainer(model)))
    assert outcome(trained, "sampling of records/server") == "broken"


@dataclass(frozen=True)
class Failing(Clip):
    """Nodes that cannot answer."""

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        raise ValueError("no")


@pytest.mark.parametrize("layers", [(Clip(1.0), Deaf(Z)), (Failing(1.0), Gaussian(Z))])
def test_an_audit_in_which_no_update_was_used_says_so(layers: Any) -> None:
    assert outcome(stacked(*layers), "noise/model-user", sampling="all") == "not tested"


class OwnRecords:
    """Somebody's own trainer that promises privacy for records."""

    OPTIONS: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.inner = TorchTrainer(model)

    def privacy(self, options: Any) -> float:  # noqa: ARG002
        return 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_promise_without_a_test_says_so() -> None:
    assert outcome(app(trainer=OwnRecords()), "records/server") == "not tested"
