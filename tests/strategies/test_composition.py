"""Every order of shipped layers, under every kind of option: charged rightly, or refused.

Two exact experiments stand behind "rightly", both without any noise:

sensitivity   two cohorts that differ by one node, in float64: what the noise is put on differs
              by no more than the claim's event is for
blackout      the noised value is replaced by zeros: whatever else the server makes of the two
              cohorts is then the same, to the last bit
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, NoOpDpEvent
from flwr.app import RecordDict
from torch import Tensor

from tests.fakes import PlusOne, Times, collected, gathering, reply
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError, RunError, StackError, UmbelError
from umbel.federation import Federation
from umbel.privacy.noise.skellam import SkellamDpEvent
from umbel.strategies import composition
from umbel.strategies.collect import Gather, Gathering, PlainSum, Sum
from umbel.strategies.private import banded_gaussian, gaussian, local_gaussian, tree_gaussian
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.banded_gaussian import BandedGaussian
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.tree_gaussian import TreeGaussian
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure import distributed_noise
from umbel.strategies.secure.distributed_skellam import DistributedSkellam
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.secure.weigh import Weigh
from umbel.strategies.stack import Stack
from umbel.strategies.transform import (
    Claim,
    Facts,
    NodeContext,
    Round,
    RoundContext,
    Stateless,
    Transform,
)

SIZE = 6
NODES = 9
LAYERS: Mapping[str, Transform[Any]] = {
    layer.name: layer
    for layer in (
        Clip(1.0),
        AdaptiveClip(0.5),
        PrivateMetrics({"loss": 5.0}),
        Weigh(400.0),
        Rotate(),
        Quantize(1 << 12),
        Gaussian(2.0),
        LocalGaussian(1.0, 1e-5),
        TreeGaussian(3, 2.0),
        BandedGaussian(2, 3, 2.0),
        DistributedSkellam(2.0, min_cohort=6),
    )
}
COLLECTS = (
    PlainSum(),
    PlainSum("equal"),
    PlainSum("fixed"),
    SecureSum(),
    SecureSum(weighting="fixed"),
)
ASKED: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "epsilon": {"epsilon": 3.0},
    "secure": {"secure": True},
    "secure and epsilon": {"secure": True, "epsilon": 3.0},
    "local": {"epsilon": 3.0, "mechanism": "local"},
    "tree": {"epsilon": 3.0, "mechanism": "tree", "separation": 3},
    "banded": {"epsilon": 3.0, "mechanism": "banded", "separation": 3},
}
BEFORE = Facts(size=SIZE, round=1, expected_replies=float(NODES), max_replies=NODES)


def complete(**given: Any) -> dict[str, Any]:
    known = {**RunOptions.defaults(), **PrivacyOptions.defaults(), **SecureOptions.defaults()}
    return {**known, "rounds": 3, **{name.replace("_", "-"): v for name, v in given.items()}}


def compose(stack: Stack, **given: Any) -> Stack:
    return composition.compose(stack, complete(**given), lambda: SIZE)


# ---- a round without noise


@dataclass
class Recorder:
    """Stands in place of noise: writes down what it would be put on, and adds none of it."""

    black: bool = False

    def __post_init__(self) -> None:
        self.values: list[tuple[Tensor, float]] = []

    def noised(self, value: Tensor, deviation: float, source: Any) -> Tensor:  # noqa: ARG002
        self.values.append((value.double().clone(), deviation))
        return torch.zeros_like(value, dtype=torch.float64) if self.black else value.double()


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (gaussian, local_gaussian, tree_gaussian, banded_gaussian):
        monkeypatch.setattr(module, "noised", recorder.noised)
    for draw in ("sample_skellam", "sample_discrete_gaussian"):
        zeros = lambda _, size, __: torch.zeros(size).numpy()  # noqa: E731
        monkeypatch.setattr(distributed_noise, draw, zeros)
    return recorder


def cohort() -> list[tuple[Tensor, dict[str, float]]]:
    """Updates of all sizes, and one node of extremes, which is the last."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        (torch.randn(SIZE, generator=generator) * 10.0**-k, {"num-examples": 2.0, "loss": 0.1 * k})
        for k in range(NODES - 1)
    ]
    return [*rows, (torch.full((SIZE,), 7.0), {"num-examples": 400.0, "loss": -1e9})]


def summed(stack: Stack, sent: Sequence[tuple[Tensor, Any]], facts: Facts) -> Sum:
    """By the collect itself, or as a secure sum adds: integers of the grid, exactly."""
    if isinstance(stack.collect, PlainSum):
        nodes = range(1, len(sent) + 1)
        replies = [
            reply(node, update, said.get("num-examples", 1), metrics=said)
            for node, (update, said) in zip(nodes, sent, strict=True)
        ]
        round_ = gathering(facts.size, facts=facts, cohort=float(NODES))
        found = collected(stack.collect, replies, list(nodes), round_)
        assert not found.rejected, found.rejected
        return found
    total = torch.zeros(facts.size, dtype=torch.float64)
    for update, _ in sent:
        whole = update.double() / (facts.grid or math.nan)
        assert torch.equal(whole, whole.round())
        total += whole
    denominator = NODES if stack.collect.weighting == "fixed" else len(sent)  # type: ignore[attr-defined]
    count = len(sent)
    return Sum(total * (facts.grid or 0), float(count), count, float(denominator))


Sent = Sequence[tuple[Tensor, dict[str, float]]]


def sent_by(stack: Stack, rows: Sent) -> Sent:
    """The nodes' halves of round 1."""
    told = stack.publish(stack.init(SIZE), BEFORE)
    return [stack.encode(update, told, RecordDict(), said) for update, said in rows]


def played(stack: Stack, sent: Sent) -> tuple[Any, ...]:
    """The server's half of round 1 on what these nodes sent."""
    states = stack.init(SIZE)
    facts = stack.check(BEFORE, states)
    found = summed(stack, sent, facts)
    rnd = Round(1, float(NODES), found.replies, found.weight, facts, torch.Generator())
    average, after, metrics = stack.decode(found, states, rnd, BEFORE)
    kept = [
        state
        for layer, state in zip(stack.layers, after, strict=True)
        if not isinstance(layer, TreeGaussian | BandedGaussian)  # they hold exact sums, and say so
    ]
    return found, average, metrics, kept


def bound_of(claim: Claim, deviation: float) -> float:
    """How far apart two sums may lie for a claim to be right, in the update's unit.

    A Gaussian event is for an update that comes or goes; one that is replaced moves twice as far.
    """
    if isinstance(claim.event, NoOpDpEvent):
        return 0.0
    assert isinstance(claim.event, GaussianDpEvent)
    times = 2 if claim.relation == NeighboringRelation.REPLACE_ONE else 1
    return float(times * deviation / claim.event.noise_multiplier)


def check_claims(stack: Stack, recorder: Recorder) -> None:
    """Both experiments on a finished stack that is private."""
    bottom = stack.check(BEFORE, stack.init(SIZE))
    claims = stack.claims(bottom)
    assert claims
    recorder.black = False
    recorder.values.clear()
    sent = sent_by(stack, cohort())
    on_nodes = list(recorder.values)
    recorder.values.clear()
    with_, without = played(stack, sent), played(stack, sent[:-1])
    for claim in claims:
        if isinstance(claim.event, SkellamDpEvent):
            gap = (with_[0].total - without[0].total) / bottom.grid
            assert 0 < float(gap.norm()) <= claim.event.l2 * (1 + 1e-12)
        elif claim.mechanism == "local":
            value, deviation = on_nodes[-1]  # replaced by any other, it moves twice its length
            assert 0 < 2 * float(value.norm()) <= bound_of(claim, deviation)
        else:
            (one, deviation), (other, _) = recorder.values
            assert 0 < float((one - other).norm()) <= bound_of(claim, deviation)
    if all(claim.against == "model-user" for claim in claims):
        recorder.black = True
        (_, *seen), (_, *seen_without) = played(stack, sent), played(stack, sent[:-1])
        assert same(seen, seen_without), f"{stack} releases something that no noise covers"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def walk(cases: Iterable[tuple[tuple[str, ...], Any, str]], recorder: Recorder) -> Counter[str]:
    """Compose each case, and put every private stack that comes of it to both experiments."""
    counts: Counter[str] = Counter()
    tried: set[str] = set()
    for names, collect, asked in cases:
        try:
            app = Stack(tuple(LAYERS[name] for name in names), collect)
            stack = compose(app, **ASKED[asked]).with_noise(2.0)
            composition.check_rounds(stack, replace(BEFORE, round=0))
        except (ConfigError, StackError) as error:
            assert "; " in str(error) and len(str(error)) > 40, str(error)
            counts[f"{asked}: refused"] += 1
            continue
        if "secure" in ASKED[asked]:
            assert isinstance(stack.collect, SecureSum)
        if "epsilon" in ASKED[asked]:
            assert stack.private
        counts[f"{asked}: {'private' if stack.private else 'open'}"] += 1
        key = repr((stack.layers, stack.collect))
        if stack.private and key not in tried:
            tried.add(key)
            check_claims(stack, recorder)
    counts["tried"] = len(tried)
    return counts


def test_every_pair_is_charged_rightly_or_refused(without_noise: Recorder) -> None:
    few = [itertools.permutations(LAYERS, count) for count in (0, 1, 2)]
    counts = walk(itertools.product(itertools.chain(*few), COLLECTS, ASKED), without_noise)
    assert counts["tried"] > 100
    for asked in ASKED:
        kind = "open" if asked in ("nothing", "secure") else "private"
        assert counts[f"{asked}: {kind}"] > 50, asked
        assert counts[f"{asked}: refused"] > 50, asked


@pytest.mark.slow
@pytest.mark.parametrize("collect", COLLECTS, ids=lambda one: f"{one.name}-{one.weighting}")
def test_every_triple_is_charged_rightly_or_refused(without_noise: Recorder, collect: Any) -> None:
    triples = itertools.permutations(LAYERS, 3)
    counts = walk(itertools.product(triples, (collect,), ASKED), without_noise)
    assert counts["tried"] > 50


# ---- orders, one by one

FIXED = PlainSum("fixed")
ABOVE = {
    "a weighted mean": (Weigh(400.0), Gaussian(2.0)),
    "a weighted mean over tree noise": (Weigh(400.0), TreeGaussian(3, 2.0)),
    "a metric": (PrivateMetrics({"loss": 5.0}), Gaussian(2.0)),
    "a metric over banded noise": (PrivateMetrics({"loss": 5.0}), BandedGaussian(2, 3, 2.0)),
    "a count of clipped updates": (AdaptiveClip(0.5), Gaussian(2.0)),
    "a foreign layer": (Times(), Gaussian(2.0)),
}


@pytest.mark.parametrize("pair", ABOVE.values(), ids=ABOVE)
def test_what_is_made_of_a_sum_is_made_after_the_noise(pair: Any, without_noise: Recorder) -> None:
    other, noise = pair
    check_claims(Stack((Clip(1.0), other, noise), FIXED), without_noise)
    wrong = Stack((Clip(1.0), noise, other), FIXED)
    with pytest.raises(StackError, match=f"put {other.name} before {noise.name}"):
        wrong.check(BEFORE, wrong.init(SIZE))
    with pytest.raises(StackError, match=f"put {other.name} before {noise.name}"):
        compose(wrong)


def test_a_metric_may_not_join_an_update_that_has_its_noise() -> None:
    layers = (Clip(1.0), LocalGaussian(1.0, 1e-5), AdaptiveClip(1.0))
    with pytest.raises(StackError, match="after their noise was made"):
        compose(Stack(layers, FIXED))


def test_a_rotation_and_a_grid_may_stand_below_noise(without_noise: Recorder) -> None:
    layers = (Clip(1.0), Gaussian(2.0), Rotate(), Quantize(1 << 12))
    check_claims(Stack(layers, SecureSum(weighting="fixed")), without_noise)


@dataclass(frozen=True)
class Sure(Stateless):
    """Says that it is an isometry."""

    kind: str = "turns"
    isometry: bool = True  # type: ignore[misc]
    name: str = "sure"

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> Any:
        match self.kind:
            case "turns":
                return -total, state
            case "tells":
                ctx.report("largest", float(total.max()))
                return total, state
            case "keeps":
                return total, {"seen": total}
            case "lengthens":
                return 2 * total, state
        return total.abs(), state


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("tells", "releases largest"),
        ("keeps", "keeps something"),
        ("lengthens", "makes sums longer"),
        ("bends", "is not linear"),
    ],
)
def test_an_isometry_is_tried_and_not_believed(
    kind: str, why: str, without_noise: Recorder
) -> None:
    check_claims(Stack((Clip(1.0), Gaussian(2.0), Sure()), FIXED), without_noise)
    with pytest.raises(StackError, match=why):
        compose(Stack((Clip(1.0), Gaussian(2.0), Sure(kind)), FIXED))


def test_no_layer_of_a_private_stack_learns_how_many_came() -> None:
    """`PlusOne` takes the sum of the weights off: over noise, the expected cohort's."""
    stack = Stack((PlusOne(), Clip(1.0), Gaussian(1e-6)), FIXED)
    states = stack.init(SIZE)
    facts = stack.check(BEFORE, states)
    rnd = Round(1, 9.0, 2, 2.0, facts, torch.Generator())
    sum_ = Sum(torch.zeros(facts.size, dtype=torch.float64), 2.0, 2, 9.0)
    _, _, metrics = stack.decode(sum_, states, rnd, BEFORE)
    assert metrics["plus-one.replies"] == 9.0


def test_a_stack_that_would_end_in_a_later_round_does_not_begin() -> None:
    layers = (Clip(1.0), TreeGaussian(3, 2.0), Quantize(1 << 12))
    composition.check_rounds(Stack(layers, SecureSum(weighting="fixed")), BEFORE)
    moving = Stack((AdaptiveClip(1.0), TreeGaussian(3, 2.0)), FIXED)
    with pytest.raises(StackError, match=r"put Clip before it.*in round 2"):
        composition.check_rounds(moving, BEFORE)


@pytest.mark.parametrize("norm", [1e-30, 1e-5, 1.0, 1e30])
@pytest.mark.parametrize("noise", [Gaussian(1.0), TreeGaussian(3, 2.0), BandedGaussian(2, 3, 2.0)])
def test_a_norm_of_any_size_is_played_with_sums_of_its_size(
    norm: float, noise: Transform[Any]
) -> None:
    """Ones under a norm of 1e-30 are further off than noise has places for."""
    composition.check_rounds(Stack((Clip(norm), noise), FIXED), BEFORE)


# ---- what is asked is in the stack


@dataclass(frozen=True)
class Choice:
    """A median whose author says whatever is convenient."""

    says: Mapping[str, Any]
    name: str = "choice"

    def check(self, facts: Facts) -> Facts:
        return facts.replace(**self.says)

    def gather(self, requests: Any, round_: Gathering) -> Gather:
        raise NotImplementedError

    def answers(self) -> Mapping[str, Any]:
        return {}


CONVENIENT = {"kind": "sum", "weight_bound": 1.0, "public_denominator": True}


@pytest.mark.parametrize("asked", [name for name in ASKED if name != "nothing"])
@pytest.mark.parametrize(
    "says", [{}, {"kind": "each"}, {**CONVENIENT, "server_sees": "sum"}], ids=str
)
def test_a_collect_of_the_apps_own_gets_no_certificate(asked: str, says: Any) -> None:
    for layers in ((), (Clip(1.0),)):
        with pytest.raises(UmbelError, match="choice"):
            compose(Stack(layers, Choice(says)), **ASKED[asked])
    compose(Stack((), Choice(says)))  # without protection it may do what it likes


def test_a_collect_derived_from_umbels_own_is_its_authors_word() -> None:
    class Mine(PlainSum):
        """Looks like a sum."""

    with pytest.raises(StackError, match="not one of Umbel's own"):
        compose(Stack((), Mine()), epsilon=3.0)
    with pytest.raises(ConfigError, match="leave out secure=true"):
        compose(Stack((), Mine()), secure=True)


def test_a_secure_sum_of_the_apps_own_gets_the_noise_that_is_asked_for() -> None:
    stack = compose(Stack((), SecureSum(min_cohort=5)), secure=True, epsilon=3.0)
    assert str(stack) == "clip -> rotate -> quantize -> skellam -> secure-sum"
    assert stack.collect == SecureSum(min_cohort=5, weighting="fixed")
    central = compose(Stack((Clip(1.0), Weigh(400.0), Quantize()), SecureSum()), epsilon=0.5)
    assert str(central) == "clip -> weigh -> quantize -> gaussian -> secure-sum"


@dataclass(frozen=True)
class Claiming(Stateless):
    """A layer of somebody's own that only has a `claim`."""

    some: bool = True
    name: str = "claiming"

    def claim(self, facts: Facts) -> Claim | None:
        if not self.some and facts.size != SIZE + 1:
            return None
        event = GaussianDpEvent(0.5)
        return Claim(event, "client", NeighboringRelation.ADD_OR_REMOVE_ONE, "model-user")


def test_a_claim_makes_a_stack_private() -> None:
    stack = compose(Stack((Clip(1.0), Claiming()), FIXED))
    assert stack.private
    assert len(stack.claims(stack.check(BEFORE, stack.init(SIZE)))) == 1
    hidden = Stack((Clip(1.0), Claiming(some=False)), FIXED)
    assert not hidden.private
    with pytest.raises(StackError, match="on some facts only"):
        hidden.claims(BEFORE.replace(size=SIZE + 1))


REFUSED: Mapping[str, tuple[Stack, Mapping[str, Any], str]] = {
    "central noise of the app's under a secure sum": (
        Stack((Clip(1.0), Gaussian(1.0), Quantize()), SecureSum(weighting="fixed")),
        {"secure": True, "epsilon": 3.0},
        "leave out secure=true",
    ),
    "another mechanism than the app's": (
        Stack((Clip(1.0), Gaussian()), FIXED),
        {"epsilon": 3.0, "mechanism": "local"},
        "mechanism=local",
    ),
    "another multiplier than the app's": (
        Stack((Clip(1.0), Gaussian(2.0)), FIXED),
        {"noise_multiplier": 1.0},
        "noise-multiplier is 1",
    ),
    "another norm than the app's": (
        Stack((Clip(7.0),)),
        {"epsilon": 3.0, "clipping_norm": 2.0},
        "clipping-norm is 2",
    ),
    "adaptive clipping, where the app clips": (
        Stack((Clip(7.0),)),
        {"epsilon": 3.0, "clipping": "adaptive"},
        "clipping=adaptive",
    ),
    "metrics that the app's stack does not release": (
        Stack((Clip(1.0), Gaussian()), FIXED),
        {"epsilon": 3.0, "release_metrics": "loss:5"},
        "release-metrics asks for loss",
    ),
    "a mode that the app's collect has not": (
        Stack((Clip(1.0), Quantize()), SecureSum(mode="semi-honest")),
        {"secure": True, "secure_mode": "malicious"},
        "secure-mode is malicious",
    ),
    "a larger cohort than the app's": (
        Stack((Clip(1.0), Quantize()), SecureSum()),
        {"secure": True, "secure_min_cohort": 20},
        "secure-min-cohort is 20",
    ),
    "buffers beside noise": (Stack(), {"epsilon": 3.0, "buffers": "mean"}, "running statistics"),
    "buffers beside a secure sum": (
        Stack(),
        {"secure": True, "buffers": "mean"},
        "running statistics",
    ),
    "buffers that nobody averages": (Stack((), Choice({})), {"buffers": "mean"}, "buffers=mean"),
    "a limit of examples that nothing weighs": (
        Stack((), PlainSum("equal")),
        {"max_examples": 50},
        "max-examples is 50",
    ),
    "a mechanism without a budget": (Stack(), {"mechanism": "local"}, "nothing asks for noise"),
    "noise that nothing decides": (
        Stack((Clip(1.0), Gaussian()), FIXED),
        {},
        "waits for its noise",
    ),
    "a mode without a secure sum": (Stack(), {"secure_mode": "malicious"}, "give secure=true"),
    "a secure limit by the wrong name": (
        Stack(),
        {"secure": True, "max_examples": 50},
        "secure-weight-cap",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_asked_and_not_in_the_stack_is_refused(name: str) -> None:
    stack, options, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as refused:
        compose(stack, **options)
    assert "; " in str(refused.value)


def test_both_sides_of_a_federation_refuse() -> None:
    trainer = FunctionTrainer(lambda _: {"w": np.zeros(3)}, lambda arrays, *_: (arrays, 1, {}))
    federation = Federation(trainer, lambda *_: 1, stack=Stack((), Choice(CONVENIENT)))
    options = federation.complete({"epsilon": 3.0})
    for side in (federation.check_options, federation.job, federation.client_app().half.stack):
        with pytest.raises(StackError, match="not one of Umbel's own"):
            side(options)


def test_the_option_decides_noise_that_the_app_leaves_open() -> None:
    stack = compose(Stack((Clip(1.0), Gaussian()), FIXED), noise_multiplier=1.5)
    assert stack.noise_multiplier == 1.5
    assert not stack.waiting


def test_privacy_of_examples_that_the_trainer_does_not_know_is_refused() -> None:
    trainer = FunctionTrainer(lambda _: {}, lambda arrays, *_: (arrays, 1, {}))
    federation = Federation(trainer, lambda *_: 1)
    with pytest.raises(ConfigError, match="wrap the trainer in PrivateSgd"):
        federation.stack_for(federation.complete({"example-epsilon": 1.0}))


# ---- layers that lengthen the update


@dataclass(frozen=True)
class Longer(Stateless):
    """Puts one more coordinate behind the update, and says its bound or does not."""

    says: bool = False
    name: str = "longer"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        after = facts.replace(size=facts.size + 1)
        if self.says and facts.l2_bound is not None:
            return after.replace(l2_bound=math.hypot(facts.l2_bound, 1.0))
        return after

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return torch.cat([update, torch.ones(1, dtype=update.dtype)])

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> Any:
        ctx.report("last", float(total[-1]))
        return total[:-1], state


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((Longer(),), "longer -> clip -> gaussian"),
        ((Clip(1.0), Longer()), "clip -> longer -> clip-below -> gaussian"),
        ((Clip(1.0), Longer(says=True)), "clip -> longer -> gaussian"),
    ],
)
def test_a_longer_update_is_bounded_again(layers: Any, text: str, without_noise: Recorder) -> None:
    stack = compose(Stack(layers), epsilon=3.0).with_noise(2.0)
    assert str(stack) == f"{text} -> plain-sum"
    check_claims(stack, without_noise)
    secret = compose(Stack(layers), secure=True, secure_metrics="", secure_weighting="equal")
    assert str(secret) == f"{text.replace('gaussian', 'rotate -> quantize')} -> secure-sum"
    facts = secret.check(BEFORE, secret.init(SIZE))
    found, average, _, _ = played(secret, sent_by(secret, cohort()))
    assert found.total.shape == (facts.size,)
    assert average.shape == (SIZE,)


@dataclass(frozen=True)
class Louder(Stateless):
    """Makes updates a hundred times as long, and does not say so."""

    name: str = "louder"

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return update * 100


def test_a_bound_that_a_layer_does_not_keep_costs_its_nodes(without_noise: Recorder) -> None:
    """A plain sum measures what arrives; under a secure sum each node measures what it sends."""
    layers = (Clip(1.0), Louder())
    with pytest.raises(AssertionError, match="is the longest taken"):
        check_claims(compose(Stack(layers), epsilon=3.0).with_noise(2.0), without_noise)
    for options in ({}, {"epsilon": 3.0}):
        for app in (Stack(layers), Stack((*layers, Quantize(1 << 12)), SecureSum())):
            stack = compose(app, secure=True, **options).with_noise(2.0)
            with pytest.raises(RunError, match="update"):
                sent_by(stack, cohort())


# ---- what is left of a short update


@pytest.mark.parametrize("app", [Stack(), Stack((Clip(100.0), Quantize(1 << 20)), SecureSum())])
def test_a_secure_sum_keeps_updates_much_shorter_than_its_norm(app: Stack) -> None:
    """A million parameters, an update of length 0.1, a norm of 100: all of it was lost."""
    size = 1 << 20
    options = {"secure_metrics": "", "secure_weighting": "equal"}
    stack = compose(app, secure=True, **options)
    before = Facts(size=size, round=1, expected_replies=9.0, max_replies=9)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(size, generator=generator)
    update *= 0.1 / float(update.norm())
    told = stack.publish(stack.init(size), before)
    sent, _ = stack.encode(update, told, RecordDict())
    facts = stack.check(before, stack.init(size))
    total = sent.double()
    assert float(total.norm()) <= (facts.l2_bound or 0)
    rnd = Round(1, 1.0, 1, 1.0, facts, torch.Generator())
    average, _, _ = stack.decode(Sum(total, 1.0, 1, 1.0), stack.init(size), rnd, before)
    assert average is not None
    assert float((average - update).norm()) < 0.001 * 0.1
