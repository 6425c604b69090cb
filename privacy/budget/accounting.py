"""From what was released to epsilon.

The number that is reported is the pessimistic privacy-loss distribution (PLD) of dp-accounting;
Renyi DP (RDP) is the cross-check, 7 to 37 % higher where federated learning lives. Central-limit
accounting (GDP) is refused: it under-states.

What makes numbers wrong, and what happens here:

    a replaced neighbour doubles the distance; RDP takes the multiplier as it is given    the
        multiplier is halved here, once, for every event under `replace-one`
    fixed-size sampling accounted as Poisson                                    has its own
        event, its own relation (replace-one), RDP only; PLD for it is an error
    unlike releases that no one accountant takes                                each gets a part
        of delta and the epsilons add up (basic composition), never an average or a guess
    a table's error                                                 is taken off delta first
    a table that would not fit, or a delta below its tails          is answered by the smaller
        of two upper bounds, and says which (`umbel.privacy.budget.beyond`)
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from umbel.privacy.budget.beyond import (
    LEAST_FOR_RDP,
    gaussian_bound,
    is_beyond,
    smallest_multiplier,
    without_sampling,
)
from umbel.privacy.budget.events import ADD_OR_REMOVE, REPLACE, ZERO_OUT, Charge
from umbel.privacy.budget.renyi import has_curve, renyi_epsilon
from umbel.privacy.budget.selection import SelectionDpEvent, selection_epsilon
from umbel.privacy.validate import count, fraction, inside_unit, positive

FINE = 1e-4
"""Discretisation of the privacy loss for numbers that are reported."""
COARSE = 1e-3
"""For progress while a run goes on: ten times faster, and still never below the truth."""

ORDERS = (*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 128, 256, 512, 1024)
"""Renyi orders. Those below 1.6 are left out: their series does not converge for much noise-poor
sampling, and they matter only where epsilon is far beyond use."""

Accountant = Literal["pld", "rdp"]
Part = Literal["pld", "rdp-replace", "rdp-tree", "renyi", "rdp-selection"]


@dataclass(frozen=True)
class Spent:
    """What a list of releases has cost.

    Attributes:
        epsilon: at `delta`; infinity where something was not private.
        delta: as asked for; the slack of the releases is inside it.
        relation: the neighbouring relation of epsilon.
        accountant: what computed epsilon: `pld`, `rdp`, `renyi`, or `gaussian` for the closed form;
            several are joined by `+`.
        cross_check: epsilon by RDP, where RDP knows every event; None elsewhere.
    """

    epsilon: float
    delta: float
    relation: NeighboringRelation
    accountant: str
    cross_check: float | None


def poisson(noise_multiplier: float, sampling_rate: float) -> DpEvent:
    """Gaussian noise on the sum of a Poisson sample."""
    event = GaussianDpEvent(positive(noise_multiplier=noise_multiplier))
    rate = fraction(sampling_rate=sampling_rate)
    return event if rate == 1 else PoissonSampledDpEvent(rate, event)


def spent(
    charges: Iterable[Charge] | Mapping[Charge, int],
    delta: float,
    *,
    accountant: Accountant = "pld",
    interval: float = FINE,
    cross_check: bool = False,
) -> Spent:
    """Epsilon of many releases at `delta`.

    Args:
        charges: the releases; a mapping says how often each happened.
        delta: strictly between 0 and 1.
        accountant: `pld`, or `rdp` for the looser number.
        interval: discretisation of the PLD.
        cross_check: compute epsilon by RDP too.

    Raises:
        ValueError: delta is out of range, an event is not accounted, a combination has no proof,
            or the two accountants contradict each other.
    """
    inside_unit(delta=delta)
    if accountant not in ("pld", "rdp"):
        raise ValueError(
            f"accountant is {accountant!r}; it can be pld or rdp (central-limit accounting "
            "under-states epsilon and is not offered)"
        )
    counts = _flat(charges)
    relation = _common_relation(counts)
    slack = math.fsum(charge.slack * times for charge, times in counts.items())
    left = delta - slack
    parts = _parts(counts, relation, accountant)
    value, names = math.inf, [part.partition("-")[0] for part in parts]
    if left > 0 and not _is_open(counts):
        share = left / max(1, len(parts))
        found = [_part(part, parts[part], relation, share, interval) for part in parts]
        value, names = math.fsum(epsilon for epsilon, _ in found), [name for _, name in found]
    check = _rdp_or_none(counts, relation, left) if cross_check and accountant == "pld" else None
    if check is not None and names == ["pld"] and value > check * 1.02 + 0.01:
        raise ValueError(
            f"the accountants disagree: PLD says epsilon {value:.4f} and RDP, which bounds it from "
            f"above, {check:.4f}; report this as a defect with the list of releases"
        )
    name = "+".join(dict.fromkeys(names)) or accountant
    return Spent(value, delta, relation, name, check)


def epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    *,
    accountant: Accountant = "pld",
    interval: float = FINE,
) -> float:
    """Epsilon of `rounds` rounds of Gaussian noise over Poisson samples, add or remove one unit.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> round(epsilon(1.0, 0.01, 1000, 1e-5), 2)
        1.83
    """
    charge = Charge(poisson(noise_multiplier, sampling_rate))
    rounds = count(rounds=rounds)
    return spent({charge: rounds}, delta, accountant=accountant, interval=interval).epsilon


def _flat(charges: Iterable[Charge] | Mapping[Charge, int]) -> Counter[Charge]:
    """Equal releases counted, repetitions unfolded, empty ones kept for their slack only."""
    given = Counter(charges)
    counts: Counter[Charge] = Counter()
    for charge, times in given.items():
        event, slack = charge.event, charge.slack
        while isinstance(event, SelfComposedDpEvent):
            times *= event.count
            slack /= event.count
            event = event.event
        counts[Charge(event, charge.relation, slack)] += times
    return counts


def _common_relation(counts: Counter[Charge]) -> NeighboringRelation:
    """Replace-one bounds the others' pairs too, so one such release makes it everyone's."""
    relations = {charge.relation for charge in counts}
    for charge in counts:
        sampled = isinstance(charge.event, SampledWithoutReplacementDpEvent)
        if sampled and charge.relation is not REPLACE:
            raise ValueError(
                "sampling a fixed number without replacement protects against replacing one unit; "
                "charge it as replace-one, or sample by Poisson"
            )
        tree = isinstance(charge.event, SingleEpochTreeAggregationDpEvent)
        if tree and (charge.relation is REPLACE or REPLACE in relations):
            raise ValueError(
                "the tree event hides whether a unit's data are replaced by zero and cannot be "
                "added to releases under replace-one; charge its rounds as Gaussian releases"
            )
    if any(has_curve(charge.event) for charge in counts):
        if REPLACE in relations:
            raise ValueError(
                "noise that nodes add together hides whether a unit's data are replaced by nothing "
                "and cannot be added to releases under replace-one; keep them in two populations"
            )
        return ZERO_OUT
    if REPLACE in relations:
        return REPLACE
    # A unit whose part of a sum is replaced by zero moves it as far as one that is taken out, so
    # add-or-remove releases hold under zero-out as well; the other way round nothing is proven.
    return ZERO_OUT if ZERO_OUT in relations else ADD_OR_REMOVE


def _is_open(counts: Counter[Charge]) -> bool:
    return any(isinstance(charge.event, NonPrivateDpEvent) for charge in counts)


def _parts(
    counts: Counter[Charge], relation: NeighboringRelation, accountant: Accountant
) -> dict[Part, Counter[DpEvent]]:
    """The events by the accountant that takes them."""
    parts: dict[Part, Counter[DpEvent]] = {}
    for charge, times in counts.items():
        part: Part = "pld"
        match charge.event:
            case NoOpDpEvent() | NonPrivateDpEvent():
                continue
            case SampledWithoutReplacementDpEvent():
                part = "rdp-replace"
            case SingleEpochTreeAggregationDpEvent():
                part = "rdp-tree"
            case SelectionDpEvent():
                part = "rdp-selection"
            case event if has_curve(event):
                part = "renyi"
            case _ if accountant == "rdp":
                part = "rdp-replace" if relation is REPLACE else "rdp-tree"
        parts.setdefault(part, Counter())[charge.event] += times
    return parts


def _part(
    part: Part,
    events: Counter[DpEvent],
    relation: NeighboringRelation,
    delta: float,
    interval: float,
) -> tuple[float, str]:
    """Epsilon of the events that one accountant takes, and what computed it."""
    if part == "renyi":
        return renyi_epsilon(events, delta), part
    if part == "rdp-selection":
        if relation is REPLACE:
            raise ValueError(
                "the best of a random number of runs is accounted under add-or-remove only, and "
                "cannot be added to releases under replace-one; keep them in two populations"
            )
        return selection_epsilon(events, relation, delta), "rdp"
    if part == "pld":
        return _by_table(events, relation, delta, interval)
    under = REPLACE if part == "rdp-replace" else ZERO_OUT
    return _by_rdp(events, under, delta), "rdp"


def _by_rdp(events: Mapping[DpEvent, int], relation: NeighboringRelation, delta: float) -> float:
    accountant = RdpAccountant(ORDERS, relation)
    try:
        with _orders_may_fail():
            for event, times in events.items():
                accountant.compose(_for_rdp(event, relation), times)
            return float(accountant.get_epsilon(delta))
    except (OverflowError, ZeroDivisionError):  # so little noise that its square is no number
        return math.inf


def _by_table(
    events: Mapping[DpEvent, int], relation: NeighboringRelation, delta: float, interval: float
) -> tuple[float, str]:
    """By a table of the privacy loss, unless it is out of reach or a closed form is exact."""
    distance = 2 if relation is REPLACE else 1
    one = without_sampling(events, distance)
    if one is None:
        return _composed(tuple(events.items()), relation, delta, interval), "pld"
    bound, name = gaussian_bound(one, delta), "gaussian"
    if all(isinstance(event, GaussianDpEvent) for event in events):
        return bound, "pld"  # many Gaussians are one, whose curve is known: nothing is lost
    if not is_beyond(events, distance, delta, bound):
        return _composed(tuple(events.items()), relation, delta, interval), "pld"
    if relation is not REPLACE and smallest_multiplier(events) >= LEAST_FOR_RDP:
        bound, name = min((bound, name), (_by_rdp(events, ZERO_OUT, delta), "rdp"))
    if is_beyond(events, distance, delta, bound):
        return bound, name
    return _composed(tuple(events.items()), relation, delta, interval), "pld"


@functools.lru_cache(maxsize=1024)
def _composed(
    events: tuple[tuple[DpEvent, int], ...],
    relation: NeighboringRelation,
    delta: float,
    interval: float,
) -> float:
    """Kept, because a round's sum is asked for again by the budget, the ledger and the card."""
    total = compose(dict(events), relation, interval)
    return float(total.get_epsilon_for_delta(delta))


@contextmanager
def _orders_may_fail() -> Iterator[None]:
    """dp-accounting warns of orders whose series fails or rounds below 0; others bound as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _for_rdp(event: DpEvent, relation: NeighboringRelation) -> DpEvent:
    """RDP takes multipliers relative to the distance of neighbours; ours are to one norm."""
    if relation is not REPLACE:
        return event
    match event:
        case GaussianDpEvent():
            return GaussianDpEvent(event.noise_multiplier / 2)
        case SampledWithoutReplacementDpEvent():
            return SampledWithoutReplacementDpEvent(
                event.source_dataset_size, event.sample_size, _for_rdp(event.event, relation)
            )
    raise ValueError(
        f"RDP has no bound for {type(event).__name__} under replace-one; use accountant=pld"
    )


def _rdp_or_none(
    counts: Counter[Charge], relation: NeighboringRelation, delta: float
) -> float | None:
    if delta <= 0 or _is_open(counts):
        return None
    parts = _parts(counts, relation, "rdp")
    try:
        share = delta / max(1, len(parts))
        return math.fsum(_part(part, parts[part], relation, share, COARSE)[0] for part in parts)
    except Exception as error:
        if isinstance(error, ValueError) or type(error).__name__ == "UnsupportedEventError":
            return None
        raise


def compose(
    events: Mapping[DpEvent, int], relation: NeighboringRelation, interval: float = FINE
) -> Any:
    """The privacy-loss distribution of all events together (dp-accounting's own object).

    Raises:
        ValueError: an event has no privacy-loss distribution.
    """
    total = pld.identity(value_discretization_interval=interval)
    if any(isinstance(event, GaussianDpEvent) for event in events):
        plain = GaussianDpEvent(_round_down(_one_gaussian(events)))
        total = total.compose(_single(plain, relation, interval))
    for event, times in events.items():
        if not isinstance(event, GaussianDpEvent):
            one = _single(event, relation, interval)
            total = total.compose(one.self_compose(times) if times > 1 else one)
    return total


def _one_gaussian(events: Mapping[DpEvent, int]) -> float:
    """The multiplier of the one Gaussian release that all the plain ones compose to."""
    precision = math.fsum(
        times / event.noise_multiplier**2
        for event, times in events.items()
        if isinstance(event, GaussianDpEvent)
    )
    return 1 / math.sqrt(precision)


def _round_down(multiplier: float) -> float:
    """Twelve digits, so that equal schedules meet in the cache; never up."""
    scale = 10.0 ** (11 - math.floor(math.log10(multiplier)))
    return math.floor(multiplier * scale) / scale


@functools.lru_cache(maxsize=64)
def _single(event: DpEvent, relation: NeighboringRelation, interval: float) -> Any:
    match event:
        case GaussianDpEvent():
            return pld.from_gaussian_mechanism(
                event.noise_multiplier,
                value_discretization_interval=interval,
                neighboring_relation=relation,
            )
        case PoissonSampledDpEvent() if isinstance(event.event, GaussianDpEvent):
            return pld.from_gaussian_mechanism(
                event.event.noise_multiplier,
                value_discretization_interval=interval,
                sampling_prob=event.sampling_probability,
                neighboring_relation=relation,
            )
        case TruncatedSubsampledGaussianDpEvent():
            return pld.from_truncated_subsampled_gaussian_mechanism(
                dataset_size=event.dataset_size,
                sampling_probability=event.sampling_probability,
                truncated_batch_size=event.truncated_batch_size,
                noise_multiplier=event.noise_multiplier,
                value_discretization_interval=interval,
                neighboring_relation=relation,
            )
    raise ValueError(
        f"{type(event).__name__} has no privacy-loss distribution here; use accountant=rdp, "
        "or sample by Poisson"
    )


def curve(
    charge: Charge, rounds: int, delta: float, *, before: Mapping[Charge, int] | None = None
) -> list[tuple[int, float]]:
    """Epsilon against rounds, at up to 48 places: pairs (rounds, epsilon).

    Args:
        charge: what one round costs.
        rounds: up to here.
        delta: of every epsilon.
        before: what was spent before round 1.
    """
    rounds = count(rounds=rounds)
    places = sorted({max(1, math.ceil(rounds * i / 48)) for i in range(1, 49)})
    start = Counter(before or {})
    return [
        (n, spent(start + Counter({charge: n}), delta, interval=COARSE).epsilon) for n in places
    ]
