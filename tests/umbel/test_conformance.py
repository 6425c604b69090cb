"""The conformance checks of `umbel.testing`: all that ships passes, one broken part a law fails."""

# ruff: noqa: ARG001, ARG002, ARG005 - broken parts take the arguments of their protocols

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, SGDClassifier
from torch import nn

from umbel.clients.data.examples import Examples
from umbel.clients.data.partition import ByKey, BySize, Dirichlet, Iid, Shards
from umbel.clients.pytorch.one_step import OneStep
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Evaluated, Trained, Weights
from umbel.clients.trainers.function import FunctionTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.clients.trainers.sklearn import SklearnTrainer
from umbel.clients.trainers.softmax import SoftmaxTrainer
from umbel.core.errors import ConfigError
from umbel.privacy.budget.events import ADD_OR_REMOVE
from umbel.strategies.collect import PlainSum, Sum
from umbel.strategies.objective import Correction
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.banded_gaussian import BandedGaussian
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.tree_gaussian import TreeGaussian
from umbel.strategies.secure.distributed_skellam import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
)
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.secure.weigh import Weigh
from umbel.strategies.transform import Claim, Stateless
from umbel.testing import check_collect, check_layer, check_partitioner, check_trainer


def examples(count: int = 40) -> Examples:
    """Two classes of ten features."""
    x = np.random.default_rng(0).normal(size=(count, 10)).astype(np.float32)
    return Examples(x, (x[:, 0] > 0).astype(np.int64))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def linear() -> nn.Module:
    return nn.Linear(10, 2)


def fitted(arrays: Any, data: Any, job: Any) -> Any:
    step = np.asarray(data.x, np.float64).mean(0) + np.random.normal(size=10)
    return {"slope": arrays["slope"] + 0.1 * step}, len(data), {"loss": 1.0}


FUNCTIONS = FunctionTrainer(lambda options: {"slope": np.zeros(10)}, fitted)
TRAINERS = {
    "torch": (TorchTrainer(net, batch_size=8), {}),
    "torch-batch-norm": (TorchTrainer(normed, batch_size=8), {"momentum": 0.5}),
    "torch-linear": (TorchTrainer(linear, batch_size=8), {"batched": "on"}),
    "one-step": (OneStep(TorchTrainer(linear)), {}),
    "sklearn-fit": (SklearnTrainer(LogisticRegression(), 10, 2), {}),
    "sklearn-partial-fit": (SklearnTrainer(SGDClassifier(loss="log_loss"), 10, 2), {}),
    "softmax": (SoftmaxTrainer(10, 2), {}),
    "functions": (FUNCTIONS, {}),
    "private-sgd": (PrivateSgd(trainer=TorchTrainer(linear)), {"insecure-noise-seed": 1}),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_shipped_trainers_conform(kind: str) -> None:
    trainer, options = TRAINERS[kind]
    check_trainer(trainer, examples(), options)


def test_noise_of_the_operating_system_has_to_differ() -> None:
    private = PrivateSgd(trainer=TorchTrainer(linear))
    check_trainer(private, examples(), repeatable=False)
    with pytest.raises(AssertionError, match="differs in weight"):
        check_trainer(private, examples())
    with pytest.raises(AssertionError, match="never drawn twice"):
        check_trainer(private, examples(), {"insecure-noise-seed": 1}, repeatable=False)


LAYERS = [
    Clip(1.0),
    Clip(0.3, grid=False),
    AdaptiveClip(0.5),
    Gaussian(1.0, insecure_seed=1),
    Gaussian(insecure_seed=1),
    TreeGaussian(1, 1.0, insecure_seed=1),
    BandedGaussian(2, 2, 1.0, insecure_seed=1, rounds=8),
    LocalGaussian(1.0, 1e-5, insecure_seed=1),
    PrivateMetrics({"loss": 5.0}),
    DistributedSkellam(1.0, insecure_seed=1),
    DistributedDiscreteGaussian(1.0, insecure_seed=1),
    Quantize(),
    Rotate(),
    Weigh(10.0, {"loss": 5.0}),
]


@dataclass(frozen=True)
class Idle(Stateless):
    """Does nothing; the parent of the broken ones."""

    name: str = "idle"


@pytest.mark.parametrize("layer", [*LAYERS, Idle()], ids=lambda layer: str(layer))
@pytest.mark.parametrize("size", [1, 12])
def test_shipped_layers_conform(layer: Any, size: int) -> None:
    check_layer(layer, size)


@pytest.mark.parametrize(
    "layer",
    [
        Gaussian(1.0),
        TreeGaussian(1, 1.0),
        BandedGaussian(2, 2, 1.0, rounds=8),
        LocalGaussian(1.0, 1e-5),
        DistributedSkellam(1.0),
        DistributedDiscreteGaussian(1.0),
        Quantize(rounding="stochastic"),
    ],
    ids=lambda layer: str(layer),
)
def test_shipped_layers_with_real_randomness_conform(layer: Any) -> None:
    check_layer(layer, repeatable=False)


@pytest.mark.parametrize("weighting", ["examples", "equal", "fixed"])
def test_shipped_collects_conform(weighting: Any) -> None:
    check_collect(PlainSum(weighting=weighting))
    check_collect(PlainSum(weighting=weighting, hold_bytes=0), 1)


def test_a_collect_that_seals_is_not_played() -> None:
    with pytest.raises(AssertionError, match="seal"):
        check_collect(SecureSum())


@pytest.mark.parametrize(
    "partitioner",
    [
        Iid(),
        Iid(min_examples=3),
        Dirichlet(0.1),
        Dirichlet(100.0),
        Shards(),
        BySize(),
        BySize(sizes=[1, 2, 3, 4]),
        ByKey(),
        ByKey(np.arange(60) % 7),
    ],
    ids=str,
)
def test_shipped_partitioners_conform(partitioner: Any) -> None:
    check_partitioner(partitioner, np.arange(60) % 6)


# ---- broken ones, one a law


class Good:
    """A trainer that keeps the laws; `broken` changes one thing."""

    OPTIONS: ClassVar[dict[str, float]] = {"speed": 0.1}

    def initial(self, options: Any, seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        return Weights({"w": torch.randn(10, generator=generator)}, {"n": torch.tensor(0)})

    def train(self, weights: Weights, examples: Any, job: Any) -> Trained:
        generator = torch.Generator().manual_seed(job.seed)
        step = torch.as_tensor(examples.x).mean(0) + torch.randn(10, generator=generator)
        after = {"w": weights.parameters["w"] + 0.1 * step}
        return Trained(Weights(after, weights.buffers), len(examples), {"loss": 1.0})

    def evaluate(self, weights: Weights, examples: Any, options: Any) -> Evaluated:
        return Evaluated(len(examples), {"loss": float(weights.parameters["w"].sum())})

    def check_options(self, options: Any) -> None:
        if type(options["speed"]) is not float:
            raise ConfigError(f"speed is {options['speed']!r}; give a number")


def broken(method: str, change: Callable[..., Any]) -> Any:
    """`Good` whose method's result goes through `change(result, self, *arguments)`."""

    def changed(self: Any, *args: Any) -> Any:
        return change(getattr(Good, method, lambda *_: None)(self, *args), self, *args)

    return type("Broken", (Good,), {method: changed})()


def _weights(trained: Trained, **parameters: Any) -> Trained:
    return replace(trained, weights=Weights(parameters, trained.weights.buffers))


def _in_place(trained: Trained, _: Any, weights: Weights, *rest: Any) -> Trained:
    weights.parameters["w"].add_(1)
    return trained


def _spoils(trained: Trained, _: Any, weights: Any, data: Any, job: Any) -> Trained:
    data.x[0] = 0
    return trained


def _remembers(trained: Trained, self: Any, *rest: Any) -> Trained:
    self.seen = getattr(self, "seen", 0) + 1
    return _weights(trained, w=trained.weights.parameters["w"] + self.seen)


def _reuses(trained: Trained, self: Any, *rest: Any) -> Trained:
    self.room = getattr(self, "room", torch.zeros(10))
    return _weights(trained, w=self.room.copy_(trained.weights.parameters["w"]))


def _counts(trained: Trained, _: Any, weights: Any, data: Any, job: Any) -> Trained:
    return _weights(trained, w=trained.weights.parameters["w"] * len(job.options))


def _falls(trained: Trained, _: Any, weights: Any, data: Any, job: Any) -> Trained:
    if any("nobody" in name for name in job.options):
        raise KeyError("nobody")
    return trained


def _cohort(_: Any, self: Any, weights: Any, data: Any, jobs: Any) -> Any:
    return [Good.train(self, weights[0], data[0], jobs[0]) for _ in jobs]


def test_the_unbroken_trainer_conforms() -> None:
    check_trainer(Good(), examples())


W = torch.zeros(10)
BROKEN_TRAINERS: list[tuple[str, Callable[..., Any], str]] = [
    ("initial", lambda r, *_: Weights({"w": torch.randn(10)}), "same first weights"),
    ("initial", lambda r, *_: Weights({"n": torch.tensor(1)}), "real or complex"),
    ("train", _in_place, "`train` leaves the weights"),
    ("train", _spoils, "`train` leaves the examples"),
    ("train", _remembers, "whatever was done before"),
    ("train", lambda r, *_: _weights(r, w=torch.randn(10)), "whatever was done before"),
    ("train", _reuses, "stays as it is"),
    ("train", lambda r, *_: _weights(r, v=W), "names and order"),
    ("train", lambda r, *_: _weights(r, w=W.double()), "shapes and types"),
    ("train", lambda r, *_: _weights(r, w=W[:3]), "shapes and types"),
    ("train", lambda r, *_: _weights(r, w=W / 0), "finite weights"),
    ("train", lambda r, *_: replace(r, metrics={"loss": float("inf")}), "finite numbers"),
    ("train", lambda r, *_: replace(r, metrics={"loss": "low"}), "finite numbers"),
    ("train", lambda r, *_: replace(r, examples=0), "above 0"),
    ("evaluate", lambda r, *_: Evaluated(1, {"loss": float(torch.rand(1))}), "judged alike"),
    ("evaluate", lambda r, self, w, *_: (w.parameters["w"].mul_(2), r)[1], "`evaluate` leaves"),
    ("evaluate", lambda r, *_: Evaluated(1, {"loss": float("-inf")}), "metrics of `evaluate`"),
    ("train", _counts, "unknown option"),
    ("train", _falls, "unknown option"),
    ("train_cohort", _cohort, "`train_cohort` gives"),
    ("train_cohort", lambda r, *_: [], "`train_cohort` gives"),
]


@pytest.mark.parametrize(("method", "change", "law"), BROKEN_TRAINERS)
def test_broken_trainers_are_caught(method: str, change: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_trainer(broken(method, change), examples())


def test_options_that_are_not_checked_are_caught() -> None:
    careless = type("Careless", (Good,), {"check_options": lambda self, options: None})()
    with pytest.raises(AssertionError, match="wrong type is refused"):
        check_trainer(careless, examples())
    picky = type("Picky", (Good,), {"OPTIONS": {"speed": 1}})()
    with pytest.raises(AssertionError, match="its own defaults"):
        check_trainer(picky, examples())


def layer(**methods: Any) -> Any:
    return type("Broken", (Idle,), methods)(name="broken")


class _Counts(Idle):
    """Keeps its number of rounds on self."""

    def __init__(self) -> None:
        object.__setattr__(self, "name", "broken")
        object.__setattr__(self, "rounds", 0)

    def decode(self, total: Any, state: Any, ctx: Any) -> Any:
        object.__setattr__(self, "rounds", self.rounds + 1)  # type: ignore[attr-defined]
        return total, state


def _mutates_state(self: Any, total: Any, state: Any, ctx: Any) -> Any:
    state["rounds"] += 1
    return total, state


def _claim(**changes: Any) -> Callable[..., Claim]:
    from dp_accounting import GaussianDpEvent

    whole = Claim(GaussianDpEvent(1.0), "client", ADD_OR_REMOVE, "model-user")
    return lambda self, facts: replace(whole, **changes)


def _decode(self: Any, total: Any, state: Any, ctx: Any) -> Any:
    return total * 2, state


BROKEN_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"encode": lambda s, u, c: u.add_(1)}, "leaves its input alone"),
    ({"encode": lambda s, u, c: torch.cat([u, u])}, "size that `check` says"),
    ({"encode": lambda s, u, c: u / u.norm()}, "stays finite"),
    ({"encode": lambda s, u, c: u * 2}, "longer than the l2_bound"),
    ({"encode": lambda s, u, c: u / 3}, "on the grid"),
    ({"encode": lambda s, u, c: u + torch.rand(len(u)) * 0}, ""),
    ({"encode": lambda s, u, c: u * torch.rand(len(u))}, "same update and config"),
    ({"check": lambda s, f, st: f.replace(modulus=16)}, "below the modulus"),
    ({"decode": lambda s, t, st, c: (t[1:], st)}, "original size"),
    ({"decode": lambda s, t, st, c: (t * torch.rand(1), st)}, "same state and sum"),
    ({"init": lambda s, n: {"rounds": 0}, "decode": _mutates_state}, "leaves the state"),
    (
        {
            "init": lambda s, n: {"seen": {1, 2}},
        },
        "survives a checkpoint",
    ),
    (
        {
            "init": lambda s, n: {"seen": (1, 2)},
        },
        "survives a checkpoint",
    ),
    ({"init": lambda s, n: [1, 2]}, "survives a checkpoint"),
    ({"isometry": True, "decode": _decode}, "isometry is one"),
    ({"begin": lambda s, w, c: Correction(w.add_(1))}, "`begin` leaves the model"),
    ({"begin": lambda s, w, c: Correction(anchor=w[1:])}, "the anchor of a correction"),
    ({"begin": lambda s, w, c: Correction(strength=math.inf)}, "strength of a correction"),
    ({"claim": _claim(unit="house"), "decode": _decode}, "known unit"),
    ({"claim": _claim(relation="near"), "decode": _decode}, "known relation"),
    ({"claim": _claim(against="everybody"), "decode": _decode}, "known against"),
    ({"claim": _claim(extra_delta=-1.0), "decode": _decode}, "known slack"),
    ({"claim": _claim()}, "does something for it"),
]


@pytest.mark.parametrize(("methods", "law"), BROKEN_LAYERS)
def test_broken_layers_are_caught(methods: dict[str, Any], law: str) -> None:
    if not law:
        check_layer(layer(**methods))
        return
    with pytest.raises(AssertionError, match=law):
        check_layer(layer(**methods))


def test_state_on_self_is_caught() -> None:
    with pytest.raises(AssertionError, match="keeps nothing on self"):
        check_layer(_Counts())


def test_noise_that_repeats_is_caught() -> None:
    with pytest.raises(AssertionError, match="never drawn twice"):
        check_layer(Gaussian(1.0, insecure_seed=1), repeatable=False)


class Bent(PlainSum):
    """A plain sum whose result goes through `bend`."""

    def bend(self, sum_: Sum, round_: Any) -> Sum:
        return sum_

    def gather(self, requests: Any, round_: Any) -> Any:
        return self.bend((yield from super().gather(requests, round_)), round_)


def bent(bend: Callable[[Sum, Any], Sum], weighting: Any = "examples", **methods: Any) -> Any:
    return type("Bent", (Bent,), {"bend": lambda s, x, r: bend(x, r), **methods})(weighting)


def _first_come(self: Any, requests: Any, round_: Any) -> Any:
    replies = list((yield requests))
    factor = 1.0 + replies[0].metadata.src_node_id if replies else 1.0
    inner = PlainSum.gather(self, requests, round_)
    next(inner)
    try:
        inner.send(iter(replies))
    except StopIteration as end:
        return replace(end.value, total=end.value.total * factor)


def _breaks(self: Any, requests: Any, round_: Any) -> Any:
    replies = list((yield requests))
    if any(reply.has_error() for reply in replies):
        raise RuntimeError("a node failed")
    inner = PlainSum.gather(self, requests, round_)
    next(inner)
    try:
        inner.send(iter(replies))
    except StopIteration as end:
        return end.value


def _believes(self: Any, reply: Any, round_: Any) -> Any:
    try:
        return PlainSum._read(self, reply, round_)
    except ValueError:
        if reply.has_error():
            raise
        return torch.ones(round_.size), 1.0, 0


BROKEN_COLLECTS: list[tuple[Any, str]] = [
    (bent(lambda s, r: s, gather=_first_come), "order of arrival"),
    (bent(lambda s, r: replace(s, denominator=s.denominator * 2)), "mean of equal updates"),
    (bent(lambda s, r: replace(s, total=s.total.abs())), "mean of equal|no other update"),
    (bent(lambda s, r: replace(s, total=s.total.sort().values)), "mean of equal|no other update"),
    (bent(lambda s, r: replace(s, weight=s.weight + 1)), "`weight` is the sum"),
    (
        bent(lambda s, r: s, check=lambda s, f: f.replace(kind="sum", weight_bound=0.5)),
        "weight_bound",
    ),
    (
        bent(
            lambda s, r: s,
            check=lambda s, f: f.replace(kind="sum", public_denominator=True),
        ),
        "public denominator",
    ),
    (
        bent(lambda s, r: s, check=lambda s, f: f.replace(size=f.size + 1)),
        "does not change the size",
    ),
    (bent(lambda s, r: s, _read=_believes), "costs its sender only"),
    (bent(lambda s, r: s, gather=_breaks), "the round broke off"),
    (bent(lambda s, r: replace(s, rejected=())), "`rejected` names"),
    (bent(lambda s, r: s if s.replies else replace(s, total=s.total + 1)), "without replies"),
]


@pytest.mark.parametrize(("collect", "law"), BROKEN_COLLECTS)
def test_broken_collects_are_caught(collect: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_collect(collect)


def test_a_choice_among_updates_need_not_be_linear() -> None:
    """A median of signs, say: where `kind` is 'each' only what holds for every mean is asked."""

    def middle(sum_: Sum, round_: Any) -> Sum:
        return replace(sum_, total=sum_.total.double().pow(3).sign() * sum_.total.abs())

    check_collect(bent(middle, check=lambda s, f: f.replace(kind="each")))


class Parts:
    """Divides rows in turn, after `change(rows, seed)`."""

    def __init__(self, change: Callable[[Any, int], Any], careful: bool = True) -> None:
        self.change, self.careful = change, careful

    def split(self, labels: Any, parts: int, seed: int = 0) -> Any:
        if self.careful and parts > len(labels):
            raise ConfigError("too few")
        return self.change([np.arange(i, len(labels), parts) for i in range(parts)], seed)


BROKEN_PARTITIONERS: list[tuple[Any, str]] = [
    (Parts(lambda rows, seed: rows[:-1]), "one array of row numbers"),
    (Parts(lambda rows, seed: [rows[0][:0], *rows[1:]]), "no node is empty"),
    (Parts(lambda rows, seed: [rows[0][::-1], *rows[1:]]), "sorted"),
    (Parts(lambda rows, seed: [rows[0][1:], *rows[1:]]), "exactly one node"),
    (Parts(lambda rows, seed: [rows[1], *rows[1:]]), "exactly one node"),
    (Parts(lambda rows, seed: [np.append(rows[0], 99), *rows[1:]]), "exactly one node"),
    (
        Parts(lambda rows, seed: [rows[i] for i in np.random.permutation(len(rows))]),
        "same seed",
    ),
    (Parts(lambda rows, seed: rows, careful=False), "no node is empty|refused"),
]


@pytest.mark.parametrize(("partitioner", "law"), BROKEN_PARTITIONERS)
def test_broken_partitioners_are_caught(partitioner: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_partitioner(partitioner, np.arange(60) % 6)


def test_labels_that_are_changed_are_caught() -> None:
    class Sorts(Iid):
        def split(self, labels: Any, parts: int, seed: int = 0) -> Any:
            labels.sort()
            return super().split(labels, parts, seed)

    with pytest.raises(AssertionError, match="read, never changed"):
        check_partitioner(Sorts(), np.arange(60) % 6)
