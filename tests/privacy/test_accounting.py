"""Epsilon against the reference values, exact formulas and a second accountant."""

import itertools
import math

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from dp_accounting.pld import privacy_loss_distribution as pld

from umbel.privacy.budget.accounting import COARSE, compose, curve, epsilon, poisson, spent
from umbel.privacy.budget.banded import BandedSchedule
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, ZERO_OUT, Charge, from_json, to_json
from umbel.privacy.budget.trees import TreeSchedule, squared_sensitivity
from umbel.privacy.noise.gaussian import gaussian_delta, gaussian_epsilon, gaussian_noise

REFERENCE = [
    # noise multiplier, rate, rounds, delta, RDP, PLD
    (1.0, 0.01, 1000, 1e-5, 2.1014, 1.8282),
    (1.1, 0.01, 1000, 1e-5, 1.7118, 1.5154),
    (0.7, 0.01, 1000, 1e-5, 5.4233, 4.6183),
    (2.0, 0.01, 1000, 1e-5, 0.6862, 0.6220),
    (1.0, 0.05, 100, 1e-5, 4.0389, 3.5021),
    (1.0, 0.1, 100, 1e-5, 7.9039, 7.0466),
    (2.0, 0.1, 100, 1e-5, 2.5806, 2.3374),
    (1.0, 0.1, 50, 1e-3, 4.0206, 3.3139),
    (4.0, 0.1, 500, 1e-5, 2.5488, 2.3407),
    (1.0, 0.2, 30, 1e-3, 6.3774, 5.3390),
    (0.5, 0.02, 50, 1e-3, 6.1241, 4.4871),
    (1.1, 256 / 60000, 14040, 1e-5, 2.5944, 2.3796),
    (1.0, 0.01, 2000, 1e-6, 3.2465, 2.9553),
    (1.0, 1, 1, 1e-5, 4.7285, 4.3772),
    (1.0, 1, 10, 1e-5, 19.0536, 17.8566),
    (5.0, 1, 100, 1e-5, 10.7255, 9.9973),
    (10.0, 1, 100, 1e-6, 5.2215, 4.8866),
]


SLOW = (3, 4, 8, 10, 11, 12)
"""Rows that take a second or more each."""


@pytest.mark.parametrize(
    ("z", "q", "rounds", "delta", "rdp", "exact"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] if i in SLOW else [])
        for i, row in enumerate(REFERENCE)
    ],
)
def test_epsilon_of_poisson_rounds(
    z: float, q: float, rounds: int, delta: float, rdp: float, exact: float
) -> None:
    assert epsilon(z, q, rounds, delta) == pytest.approx(exact, rel=5e-3)
    assert epsilon(z, q, rounds, delta, accountant="rdp") == pytest.approx(rdp, rel=1e-3)


def test_progress_numbers_are_never_below_the_reported_ones() -> None:
    for z, q, rounds, delta, _, _ in REFERENCE[5:7]:
        fine, coarse = (epsilon(z, q, rounds, delta, interval=i) for i in (1e-4, COARSE))
        assert fine <= coarse <= fine * 1.002


def test_the_pessimistic_number_brackets_the_optimistic_one() -> None:
    low = pld.from_gaussian_mechanism(
        1.0, sampling_prob=0.01, pessimistic_estimate=False, value_discretization_interval=1e-4
    ).self_compose(1000)
    assert low.get_epsilon_for_delta(1e-5) <= epsilon(1.0, 0.01, 1000, 1e-5) <= 1.8283


def without_replacement(z: float) -> Charge:
    return Charge(SampledWithoutReplacementDpEvent(1000, 100, GaussianDpEvent(z)), REPLACE)


def test_fixed_size_sampling_is_charged_for_a_replaced_unit() -> None:
    assert spent({without_replacement(2.0): 100}, 1e-5).epsilon == pytest.approx(14.0538, rel=1e-3)
    assert spent({without_replacement(4.0): 100}, 1e-5).epsilon == pytest.approx(5.3790, rel=1e-3)


def test_fixed_size_sampling_under_add_or_remove_is_refused() -> None:
    with pytest.raises(ValueError, match="replace-one"):
        spent([Charge(without_replacement(2.0).event, ADD_OR_REMOVE)], 1e-5)


def test_fixed_size_sampling_has_no_privacy_loss_distribution() -> None:
    with pytest.raises(ValueError, match="accountant=rdp"):
        compose({without_replacement(2.0).event: 1}, REPLACE)


def test_a_replaced_unit_is_twice_as_far_by_either_accountant() -> None:
    charges = {Charge(GaussianDpEvent(2.0), REPLACE): 1}
    assert spent(charges, 1e-5).epsilon == pytest.approx(gaussian_epsilon(1.0, 1e-5))
    assert spent(charges, 1e-5, accountant="rdp").epsilon == pytest.approx(4.7285, rel=1e-3)


@pytest.mark.parametrize(("cap", "value"), [(100, 7.0392), (130, 2.4023), (150, 2.3374)])
def test_a_capped_cohort_is_charged_as_truncated_poisson(cap: int, value: float) -> None:
    charge = Charge(TruncatedSubsampledGaussianDpEvent(1000, 0.1, cap, 2.0))
    assert spent({charge: 100}, 1e-5, interval=COARSE).epsilon == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("steps", "z", "rdp", "exact"),
    [
        (64, 5.0, 2.5738, 2.399),
        (64, 10.0, 1.2149, 1.1276),
        (1024, 5.0, 3.3003, 3.0804),
        (1024, 10.0, 1.5494, 1.4401),
        (1000, 10.0, 1.4717, 1.3676),
    ],
)
def test_tree_aggregation(steps: int, z: float, rdp: float, exact: float) -> None:
    event = Charge(SingleEpochTreeAggregationDpEvent(z, steps), ZERO_OUT)
    assert spent([event], 1e-6).epsilon == pytest.approx(rdp, rel=1e-3)
    tree = TreeSchedule(separation=steps)
    growths = [growth for t in range(1, steps + 1) if (growth := tree.growth(t)) > 0]
    charges = [Charge(GaussianDpEvent(z / growth**0.5), ZERO_OUT) for growth in growths]
    assert spent(charges, 1e-6).epsilon == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize(("bands", "value"), [(1, 3.5021), (2, 5.1483), (4, 7.2996), (8, 9.9287)])
def test_cyclic_poisson_under_bands(bands: int, value: float) -> None:
    rounds = math.ceil(100 / bands)
    assert epsilon(1.0, bands * 50 / 1000, rounds, 1e-5) == pytest.approx(value, rel=5e-3)


def test_banded_rounds_add_up_to_one_release_a_participation() -> None:
    schedule = BandedSchedule(bands=4, separation=10)
    growths = [schedule.growth(t) for t in range(1, 101)]
    charges = [Charge(GaussianDpEvent(8.0 / g**0.5)) for g in growths if g > 0]
    exact = gaussian_epsilon(8.0 / math.sqrt(10), 1e-5)
    assert spent(charges, 1e-5).epsilon == pytest.approx(exact)


def test_unlike_releases_compose() -> None:
    training = Charge(poisson(2.0, 0.1))
    mean, moments = Charge(GaussianDpEvent(30.0)), Charge(GaussianDpEvent(20.0))
    alone = spent({training: 50}, 1e-5).epsilon
    both = spent({training: 50, mean: 1, moments: 2}, 1e-5, cross_check=True)
    assert alone < both.epsilon < alone + gaussian_epsilon(1 / math.sqrt(1 / 900 + 2 / 400), 5e-6)
    assert both.cross_check is not None
    assert both.epsilon < both.cross_check


def test_releases_that_no_one_accountant_takes_share_delta_and_add_up() -> None:
    gaussian = Charge(GaussianDpEvent(30.0), REPLACE)
    both = spent({without_replacement(4.0): 10, gaussian: 1}, 1e-5)
    halves = [
        spent({without_replacement(4.0): 10}, 5e-6).epsilon,
        spent([gaussian], 5e-6).epsilon,
    ]
    assert both.epsilon == pytest.approx(math.fsum(halves))
    assert both.accountant in ("pld+rdp", "rdp+pld")


def test_a_mixture_has_the_relation_that_all_of_it_has() -> None:
    """What holds for adding or removing a unit holds for zeroing it; not the other way round."""
    zero = Charge(GaussianDpEvent(4.0), ZERO_OUT)
    sampled, plain = Charge(poisson(4.0, 0.1)), Charge(GaussianDpEvent(8.0))
    assert spent([plain, sampled], 1e-5).relation is ADD_OR_REMOVE
    mixed = spent([zero, plain, sampled], 1e-5)
    assert mixed.relation is ZERO_OUT
    one = [Charge(charge.event) for charge in (zero, plain, sampled)]
    assert mixed.epsilon == pytest.approx(spent(one, 1e-5).epsilon)
    assert spent([zero, Charge(GaussianDpEvent(4.0), REPLACE)], 1e-5).relation is REPLACE


def test_one_release_under_replace_one_makes_it_everyones_relation() -> None:
    charges = [Charge(GaussianDpEvent(10.0)), Charge(GaussianDpEvent(10.0), REPLACE)]
    result = spent(charges, 1e-5)
    assert result.relation is REPLACE
    assert result.epsilon == pytest.approx(gaussian_epsilon(10 / 2 / math.sqrt(2), 1e-5))


def test_slack_is_taken_off_delta() -> None:
    charge = Charge(GaussianDpEvent(5.0), slack=4e-6)
    assert spent({charge: 2}, 1e-5).epsilon == pytest.approx(
        gaussian_epsilon(5.0 / math.sqrt(2), 2e-6)
    )
    assert spent({charge: 3}, 1e-5).epsilon == math.inf


def test_what_is_not_private_costs_everything() -> None:
    charges = [Charge(GaussianDpEvent(5.0)), Charge(NonPrivateDpEvent())]
    assert spent(charges, 1e-5).epsilon == math.inf
    assert spent([], 1e-5).epsilon == 0


def test_repetitions_are_unfolded() -> None:
    once = Charge(poisson(2.0, 0.1))
    repeated = Charge(SelfComposedDpEvent(once.event, 20))
    assert spent([repeated], 1e-5) == spent({once: 20}, 1e-5)


def test_central_limit_accounting_is_refused() -> None:
    with pytest.raises(ValueError, match="under-states"):
        epsilon(1.0, 0.01, 1000, 1e-5, accountant="gdp")  # type: ignore[arg-type]


def test_a_tree_cannot_be_added_to_replaced_units() -> None:
    tree = Charge(SingleEpochTreeAggregationDpEvent(5.0, 64), ZERO_OUT)
    with pytest.raises(ValueError, match="charge its rounds as Gaussian"):
        spent([tree, without_replacement(2.0)], 1e-5)


@pytest.mark.parametrize(
    "event",
    [
        GaussianDpEvent(2.0),
        poisson(1.1, 0.01),
        TruncatedSubsampledGaussianDpEvent(1000, 0.1, 130, 2.0),
        SampledWithoutReplacementDpEvent(1000, 100, GaussianDpEvent(2.0)),
        SingleEpochTreeAggregationDpEvent(5.0, 64),
        NonPrivateDpEvent(),
        SelfComposedDpEvent(PoissonSampledDpEvent(0.5, GaussianDpEvent(1.0)), 3),
    ],
)
def test_events_survive_being_written_down(event: object) -> None:
    assert from_json(to_json(event)) == event  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"mechanism": "laplace"},
        {"mechanism": "gaussian", "noise_multiplier": -1.0},
        {"mechanism": "gaussian", "noise_multiplier": math.inf},
        {"mechanism": "poisson-sampled", "sampling_rate": 0.0, "of": {}},
        {"mechanism": "poisson-sampled", "sampling_rate": 0.1, "of": "gaussian"},
    ],
)
def test_events_that_cannot_be_read_are_refused(written: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        from_json(written)


@pytest.mark.parametrize(
    ("eps", "delta", "sigma"),
    [
        (1, 1e-5, 3.7306),
        (0.5, 1e-5, 7.0318),
        (3, 1e-5, 1.3906),
        (8, 1e-5, 0.6002),
        (1, 1e-6, 4.2247),
        (10, 1e-6, 0.5411),
    ],
)
def test_analytic_gaussian(eps: float, delta: float, sigma: float) -> None:
    found = gaussian_noise(eps, delta)
    assert found == pytest.approx(sigma, rel=1e-3)
    assert gaussian_delta(eps, found) <= delta
    assert gaussian_delta(eps, found * (1 - 1e-4)) > delta
    assert gaussian_noise(eps, delta, sensitivity=3.0) == pytest.approx(3 * sigma, rel=1e-3)
    assert gaussian_epsilon(found, delta) == pytest.approx(eps, rel=1e-5)


def test_the_curve_grows_to_the_reported_number() -> None:
    points = curve(Charge(poisson(2.0, 0.1)), 100, 1e-5)
    assert [n for n, _ in points] == sorted({n for n, _ in points})
    assert all(a[1] < b[1] for a, b in itertools.pairwise(points))
    assert points[-1] == (100, pytest.approx(2.3374, rel=5e-3))


@pytest.mark.parametrize("separation", [1, 2, 3, 5, 8])
def test_tree_sensitivity_bounds_every_pattern(separation: int) -> None:
    """Against all patterns of participation over ten rounds."""
    for steps in range(1, 11):
        worst = max(
            sum(sum(t - (t & -t) < p <= t for p in pattern) ** 2 for t in range(1, steps + 1))
            for pattern in patterns(steps, separation)
        )
        assert worst <= squared_sensitivity(steps, separation)
        assert TreeSchedule(separation).growth(steps) >= 0


def patterns(steps: int, separation: int, start: int = 1) -> list[list[int]]:
    """All ways to take part that keep the separation."""
    found: list[list[int]] = [[]]
    for first in range(start, steps + 1):
        found += [[first, *rest] for rest in patterns(steps, separation, first + separation)]
    return found


@pytest.mark.parametrize("bands", [1, 2, 4, 8])
def test_banded_columns_are_short_and_apart(bands: int) -> None:
    schedule = BandedSchedule(bands, separation=bands)
    assert math.hypot(*schedule.diagonals) <= 1
    assert len(schedule.diagonals) == bands


def test_more_bands_help_prefix_sums() -> None:
    errors = [BandedSchedule(b, 32).error(100) for b in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(math.sqrt(50.5))
    assert errors[-1] < errors[0] / 2.9


def test_more_bands_than_separation_are_refused() -> None:
    with pytest.raises(ValueError, match="lower bands"):
        BandedSchedule(bands=5, separation=4)


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta"),
    [
        (1e-3, 0.1, 100, 1e-5),
        (0.05, 0.5, 1000, 1e-5),
        (4.0, 0.1, 100, 1e-30),
        (1.0, 0.1, 10_000_000, 1e-5),
    ],
)
def test_beyond_a_table_two_upper_bounds_answer(
    noise: float, rate: float, rounds: int, delta: float
) -> None:
    """Neither can be below the truth, and more noise, fewer rounds or a larger delta cost less."""
    found = spent({Charge(poisson(noise, rate)): rounds}, delta, cross_check=True)
    assert found.accountant in ("rdp", "gaussian")
    assert found.cross_check is not None
    assert 0 < found.epsilon <= found.cross_check * (1 + 1e-9)
    for other in (
        spent({Charge(poisson(noise * 1.5, rate)): rounds}, delta),
        spent({Charge(poisson(noise, rate)): rounds // 2}, delta),
        spent({Charge(poisson(noise, rate)): rounds}, min(0.5, delta * 100)),
    ):
        assert other.epsilon <= found.epsilon


def test_without_sampling_epsilon_is_never_below() -> None:
    from umbel.privacy.budget.beyond import gaussian_bound, without_sampling

    for noise, rate, rounds in ((1.0, 0.1, 10), (2.0, 0.5, 5), (0.7, 0.9, 3)):
        one = without_sampling({poisson(noise, rate): rounds}, 1)
        assert one is not None
        assert epsilon(noise, rate, rounds, 1e-5) <= gaussian_bound(one, 1e-5)
