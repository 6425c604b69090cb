"""Laws of the private layers: bounds, noise, metrics, shared noise, and orders that are refused.

False alarms of the statistics: below 1e-7 each.
"""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, NoOpDpEvent
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umbel.core.errors import ConfigError, StackError
from umbel.privacy.bounds.clipping import l2_norm
from umbel.privacy.noise.lattice import grid_step, on_grid
from umbel.strategies.collect import PlainSum, Sum
from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.banded_gaussian import BandedGaussian
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import MARGIN, Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.tree_gaussian import TreeGaussian
from umbel.strategies.recipe import compose
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, NodeContext, Round

SIZE = 6
FIXED = PlainSum(weighting="fixed")


def private_stack(app: Stack, options: PrivacyOptions) -> Stack:
    return compose(app, RunOptions(rounds=5), options, SecureOptions())


updates = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=SIZE, max_size=SIZE
).map(lambda values: torch.tensor(values, dtype=torch.float32))


class Run:
    """The server's half of a stack over several rounds, without messages."""

    def __init__(self, stack: Stack, cohort: float = 4.0, size: int = SIZE) -> None:
        self.stack, self.cohort, self.size = stack, cohort, size
        self.states = stack.init(size)
        self.number = 0

    @property
    def before(self) -> Facts:
        return Facts(size=self.size, round=self.number + 1)

    def config(self) -> Mapping[str, Any]:
        return self.stack.publish(self.states, self.before)

    def encode(self, update: Tensor, measured: Mapping[str, float] | None = None) -> Tensor:
        return self.stack.encode(update, self.config(), RecordDict(), measured)[0]

    def round(
        self, *sent: Tensor, denominator: float | None = None
    ) -> tuple[Tensor, Mapping[str, float]]:
        facts = self.stack.check(self.before, self.states)
        total = torch.zeros(facts.size, dtype=torch.float64)
        for update in sent:
            total += update
        sum_ = Sum(total, len(sent), len(sent), denominator or self.cohort)
        rnd = Round(self.number + 1, self.cohort, len(sent), len(sent), facts, torch.Generator())
        average, self.states, metrics = self.stack.decode(sum_, self.states, rnd, self.before)
        self.number += 1
        assert average is not None
        return average, metrics


@given(updates, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_no_update_is_longer_than_the_facts_say(update: Tensor, norm: float) -> None:
    for layers in (
        (Clip(norm),),
        (AdaptiveClip(norm),),
        (Clip(norm), PrivateMetrics({"loss": 2.0, "num-examples": 10.0})),
        (AdaptiveClip(norm), PrivateMetrics({"loss": 2.0})),
    ):
        run = Run(Stack(layers, FIXED))
        facts = run.stack.check(run.before, run.states)
        sent = run.encode(update, {"loss": 1e30, "num-examples": math.inf})
        assert sent.shape == (facts.size,)
        assert facts.l2_bound is not None
        assert facts.grid is not None
        assert l2_norm(sent) <= facts.l2_bound
        assert on_grid(sent, facts.grid)


def test_without_noise_clipping_is_federated_averaging_of_clipped_updates() -> None:
    run = Run(Stack((Clip(1.0),), FIXED), cohort=2)
    short, long = torch.full((SIZE,), 0.1), torch.full((SIZE,), 5.0)
    average, _ = run.round(run.encode(short), run.encode(long))
    expected = (short + long / l2_norm(long)) / 2
    torch.testing.assert_close(average.float(), expected, atol=grid_step(1.0), rtol=0)


@pytest.mark.parametrize("norm", [0.1, 3.0])
@pytest.mark.parametrize("noise_multiplier", [0.5, 4.0])
def test_noise_has_the_deviation_that_was_charged(norm: float, noise_multiplier: float) -> None:
    size = 200_000
    run = Run(Stack((Clip(norm), Gaussian(noise_multiplier)), FIXED), cohort=1, size=size)
    average, metrics = run.round(run.encode(torch.zeros(size)))
    deviation = noise_multiplier * norm
    assert float(average.std()) == pytest.approx(deviation, rel=5.5 / math.sqrt(2 * size))
    assert abs(float(average.mean())) < 5.5 * deviation / math.sqrt(size)
    assert metrics["gaussian.noise"] == pytest.approx(deviation * MARGIN)


def test_an_empty_cohort_releases_noise() -> None:
    run = Run(Stack((Clip(1.0), Gaussian(1.0)), FIXED))
    average, _ = run.round()
    assert float(average.abs().sum()) > 0


def test_noise_is_on_the_lattice_whatever_the_sum() -> None:
    run = Run(Stack((Clip(1.0), Gaussian(1.0)), FIXED), cohort=1)
    step = 1.0 * MARGIN / 128
    for value in (0.0, 0.3):
        average, _ = run.round(run.encode(torch.full((SIZE,), value)))
        places = average.numpy() / step
        assert abs(places - places.round()).max() < 1e-9


def test_adaptive_clipping_costs_its_bit_in_the_bound() -> None:
    layer = AdaptiveClip(2.0, share=0.1)
    facts = layer.check(Facts(size=5), layer.init(5))
    assert facts.l2_bound == pytest.approx(2.0 * math.sqrt(1.01))
    assert facts.size == 6


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_adaptive_clipping_finds_the_quantile(start: float) -> None:
    """Median length 0.95, from far below and from far above, with noise."""
    generator = torch.Generator().manual_seed(0)
    stack = Stack((AdaptiveClip(start), Gaussian(1.0)), FIXED)
    run = Run(stack, cohort=100)
    norms = []
    for _ in range(60):
        lengths = 0.95 * torch.exp(0.3 * torch.randn(100, generator=generator))
        updates = torch.randn(100, SIZE, generator=generator)
        updates *= (lengths / updates.norm(dim=1))[:, None]
        config = run.config()
        sent = [stack.encode(update, config, RecordDict())[0] for update in updates]
        _, metrics = run.round(*sent)
        norms.append(metrics["adaptive-clip.norm"])
    assert sum(norms[-20:]) / 20 == pytest.approx(0.95, rel=0.15)


def test_local_noise_is_for_a_replaced_update() -> None:
    size = 200_000
    layer = LocalGaussian(1.0, 1e-5)
    run = Run(Stack((Clip(0.5), layer), FIXED), cohort=1, size=size)
    average, _ = run.round(run.encode(torch.zeros(size)))
    expected = 3.7306 * 2 * 0.5
    assert float(average.std()) == pytest.approx(expected, rel=2e-3 + 5.5 / math.sqrt(2 * size))
    claim = run.stack.claims(run.stack.check(run.before, run.states))[0]
    assert claim.against == "server"
    assert claim.event == GaussianDpEvent(layer.noise_multiplier)
    assert not claim.sampled


def test_local_noise_does_not_trust_the_servers_bound() -> None:
    """A server that says another bound than it clips to gains nothing."""
    layer = LocalGaussian(1.0, 1e-5)
    sent = layer.encode(torch.full((1000,), 100.0), NodeContext({"bound": 1e-3}))
    assert l2_norm(sent) < 1e-3 * layer.noise_multiplier * math.sqrt(1000) * 2


def test_metrics_come_back_as_means_over_the_expected_cohort() -> None:
    layers = (Clip(1.0), PrivateMetrics({"loss": 4.0, "clipped": 1.0}), Gaussian(1e-3))
    run = Run(Stack(layers, FIXED), cohort=4)
    sent = [run.encode(torch.zeros(SIZE), {"loss": loss}) for loss in (1.0, 2.0, 3.0, 99.0)]
    average, metrics = run.round(*sent)
    assert average.shape == (SIZE,)
    assert metrics["private-metrics.loss"] == pytest.approx((1 + 2 + 3 + 4) / 4, abs=0.1)
    assert metrics["private-metrics.clipped"] == pytest.approx(0.0, abs=0.1)


def test_nothing_leaves_a_private_node_beside_the_update() -> None:
    measured = {"loss": 0.1, "num-examples": 37.0}
    update = torch.ones(SIZE)
    private = Stack((Clip(1.0), Gaussian(1.0)), FIXED)
    config = private.publish(private.init(SIZE), Facts(size=SIZE))
    assert private.encode(update, config, RecordDict(), measured)[1] == {}
    plain = Stack((Clip(1.0),), FIXED)
    assert plain.encode(update, config, RecordDict(), measured)[1].items() >= measured.items()


@pytest.mark.parametrize(
    "layer",
    [TreeGaussian(1, 1e-6), BandedGaussian(3, 3, 1e-6), BandedGaussian(1, 1, 1e-6)],
    ids=lambda layer: layer.name,
)
def test_with_little_noise_shared_noise_layers_change_nothing(layer: Any) -> None:
    run = Run(Stack((Clip(10.0), layer), FIXED), cohort=1)
    for t in range(1, 12):
        update = torch.full((SIZE,), t / 8)
        average, _ = run.round(run.encode(update))
        torch.testing.assert_close(average.float(), update, atol=1e-3, rtol=0)


def prefix_noise(layer: Any, rounds: int, size: int = 20_000) -> float:
    run = Run(Stack((Clip(1.0), layer), FIXED), cohort=1, size=size)
    model = torch.zeros(size, dtype=torch.float64)
    for _ in range(rounds):
        model += run.round(run.encode(torch.zeros(size)))[0]
    return float(model.std())


def test_tree_noise_is_that_of_the_set_bits() -> None:
    for rounds in (1, 7, 8, 12):
        expected = math.sqrt(rounds.bit_count())
        tolerance = 5.5 / math.sqrt(2 * 20_000)
        assert prefix_noise(TreeGaussian(1, 1.0), rounds) == pytest.approx(expected, rel=tolerance)


def test_banded_noise_is_what_the_factor_says() -> None:
    layer = BandedGaussian(4, 4, 1.0)
    errors = [layer.schedule.error(t) ** 2 * t for t in (15, 16)]
    expected = math.sqrt(errors[1] - errors[0])  # of the sixteenth prefix alone
    assert prefix_noise(layer, 16) == pytest.approx(expected, rel=5.5 / math.sqrt(40_000))
    assert expected < 4 * 0.65


def test_noise_of_the_best_factor_is_what_it_says() -> None:
    layer = BandedGaussian(4, 4, 1.0, rounds=16)
    errors = [layer.schedule.error(t) ** 2 * t for t in (15, 16)]
    expected = math.sqrt(errors[1] - errors[0])
    assert prefix_noise(layer, 16) == pytest.approx(expected, rel=5.5 / math.sqrt(40_000))


def test_a_resumed_run_keeps_the_factor_that_it_began_with() -> None:
    first, longer = (BandedGaussian(4, 4, 1e-6, rounds=rounds) for rounds in (8, 200))
    assert first.schedule.diagonals != longer.schedule.diagonals
    run = Run(Stack((Clip(10.0), first), FIXED), cohort=1)
    for t in range(1, 9):
        if t == 4:  # the same state under another plan
            run.stack = Stack((Clip(10.0), longer), FIXED)
        update = torch.full((SIZE,), t / 8)
        average, _ = run.round(run.encode(update))
        torch.testing.assert_close(average.float(), update, atol=1e-3, rtol=0)
    assert run.states[1]["diagonals"].tolist() == list(first.schedule.diagonals)


def claims(layer: Any, step: int) -> Any:
    stack = Stack((Clip(1.0), layer), FIXED)
    states = tuple(
        {**state, "step": step - 1} if state is not None else None for state in stack.init(SIZE)
    )
    (claim,) = stack.claims(stack.check(Facts(size=SIZE), states))
    return claim


def test_shared_noise_is_charged_as_it_grows() -> None:
    banded = BandedGaussian(2, 5, 3.0)
    events = [claims(banded, t).event for t in range(1, 12)]
    assert [i for i, e in enumerate(events, 1) if e != NoOpDpEvent()] == [1, 6, 11]
    tree = TreeGaussian(100, 3.0)
    events = [claims(tree, t).event for t in range(1, 20)]
    assert [i for i, e in enumerate(events, 1) if e != NoOpDpEvent()] == [1, 2, 4, 8, 16]
    claim = claims(banded, 3)
    assert not claim.sampled
    assert claim.separation == 5
    assert claim.repeat_event == GaussianDpEvent(3.0)


def test_seeded_noise_claims_nothing() -> None:
    for layer in (Gaussian(1.0, 7), TreeGaussian(3, 1.0, 7), BandedGaussian(2, 3, 1.0, 7)):
        assert claims(layer, 1).event == NonPrivateDpEvent()
    assert claims(LocalGaussian(1.0, 1e-5, 1, 7), 1).event == NonPrivateDpEvent()


@pytest.mark.parametrize(
    ("layers", "collect", "cure"),
    [
        ((Gaussian(1.0),), FIXED, "put Clip before it"),
        ((Gaussian(1.0), Clip(1.0)), FIXED, "put Clip before it"),
        ((LocalGaussian(1.0, 1e-5),), FIXED, "put Clip before it"),
        ((PrivateMetrics({"loss": 1.0}), Clip(1.0)), FIXED, "put Clip before it"),
        ((Clip(1.0), LocalGaussian(1.0, 1e-5), Gaussian(1.0)), FIXED, "put Clip before it"),
        ((Clip(1.0), Gaussian(1.0)), PlainSum(), "weighting='fixed'"),
        ((Clip(1.0), Gaussian(1.0)), PlainSum(weighting="equal"), "weighting='fixed'"),
        ((Clip(1.0), Gaussian()), FIXED, "noise-multiplier"),
    ],
)
def test_orders_that_promise_nothing_are_refused(
    layers: tuple[Any, ...], collect: PlainSum, cure: str
) -> None:
    stack = Stack(layers, collect)
    with pytest.raises(StackError, match=cure):
        stack.claims(stack.check(Facts(size=SIZE), stack.init(SIZE)))


def test_a_moving_norm_under_shared_noise_is_refused() -> None:
    run = Run(Stack((AdaptiveClip(1.0), BandedGaussian(2, 2, 1.0)), FIXED))
    run.round()
    with pytest.raises(StackError, match="in place of AdaptiveClip"):
        run.round()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clip(0.0),
        lambda: Clip(math.nan),
        lambda: AdaptiveClip(-1.0),
        lambda: AdaptiveClip(1.0, quantile=1.0),
        lambda: Gaussian(0.0),
        lambda: Gaussian(math.inf),
        lambda: LocalGaussian(0.0, 1e-5),
        lambda: LocalGaussian(1.0, 0.0),
        lambda: LocalGaussian(1.0, 1.0),
        lambda: PrivateMetrics({}),
        lambda: PrivateMetrics({"loss": 0.0}),
        lambda: TreeGaussian(0, 1.0),
        lambda: BandedGaussian(5, 4, 1.0),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(StackError):
        make()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epsilon": 3.0}, "clip -> gaussian -> plain-sum"),
        ({"epsilon": 3.0, "clipping": "adaptive"}, "adaptive-clip -> gaussian -> plain-sum"),
        ({"epsilon": 3.0, "mechanism": "local"}, "clip -> local-gaussian -> plain-sum"),
        (
            {"epsilon": 3.0, "mechanism": "tree", "separation": 4},
            "clip -> tree-gaussian -> plain-sum",
        ),
        (
            {"noise-multiplier": 2.0, "mechanism": "banded", "separation": 4},
            "clip -> banded-gaussian -> plain-sum",
        ),
        (
            {"epsilon": 3.0, "release-metrics": "loss:5, accuracy:1"},
            "clip -> private-metrics -> gaussian -> plain-sum",
        ),
        ({}, "plain-sum"),
    ],
)
def test_options_make_the_stack(options: dict[str, Any], text: str) -> None:
    stack = private_stack(Stack(), PrivacyOptions.read(options))
    assert str(stack) == text
    if options:
        assert isinstance(stack.collect, PlainSum)
        assert stack.collect.weighting == "fixed"


def test_layers_of_the_app_stay() -> None:
    app = Stack((Clip(7.0),), PlainSum(longest=5.0))
    stack = private_stack(app, PrivacyOptions(epsilon=1.0))
    assert str(stack) == "clip -> gaussian -> plain-sum"
    assert stack.layers[0] == Clip(7.0)
    ready = Stack((Clip(7.0), Gaussian(3.0)), FIXED)
    assert private_stack(ready, PrivacyOptions(epsilon=1.0)) is ready


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"epsilon": 1.0, "clipping-norm": 0.0}, "clipping-norm"),
        ({"noise-multiplier": -1.0}, "noise-multiplier"),
        ({"epsilon": 1.0, "mechanism": "magic"}, "mechanism"),
        ({"epsilon": 1.0, "mechanism": "tree"}, "separation"),
        (
            {"epsilon": 1.0, "mechanism": "banded", "separation": 3, "clipping": "adaptive"},
            "clipping=fixed",
        ),
        ({"epsilon": 1.0, "mechanism": "local", "noise-multiplier": 1.0}, "noise-multiplier"),
        ({"epsilon": 1.0, "release-metrics": "loss"}, "release-metrics"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        private_stack(Stack(), PrivacyOptions.read(options))


def test_a_budget_that_bounds_nothing_is_refused_where_it_is_written_down() -> None:
    with pytest.raises(ConfigError, match="finite"):
        PrivacyOptions.check_given({"epsilon": math.inf})
    PrivacyOptions.check_given({"epsilon": 3.0})
    PrivacyOptions.check_given({})
