"""What an accountant is charged, and how it is written down.

One convention, so that no call can get it wrong: a noise multiplier is always the standard
deviation of the noise over the norm bound of *one* unit's contribution. Whether a neighbour is
added, removed or replaced (which doubles the distance) is the accountant's business, not the
caller's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    ZCDpEvent,
)

from umbel.privacy.budget.selection import SelectionDpEvent
from umbel.privacy.noise.skellam import SkellamDpEvent
from umbel.privacy.validate import count, fraction, nonnegative, positive

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE
ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL

RELATIONS = {"add-or-remove-one": ADD_OR_REMOVE, "replace-one": REPLACE, "zero-out-one": ZERO_OUT}
"""Names of the neighbouring relations, as they are printed and stored."""


@dataclass(frozen=True)
class Charge:
    """One release, as the accountant sees it.

    Attributes:
        event: the mechanism, subsampling included.
        relation: which data sets are neighbours.
        slack: what this release adds to delta (total variation of its noise to the exact law).
    """

    event: DpEvent
    relation: NeighboringRelation = ADD_OR_REMOVE
    slack: float = 0.0

    def __post_init__(self) -> None:
        nonnegative(slack=self.slack)


def relation_name(relation: NeighboringRelation) -> str:
    """`add-or-remove-one`, `replace-one` or `zero-out-one`."""
    return next(name for name, value in RELATIONS.items() if value is relation)


def to_json(event: DpEvent) -> dict[str, Any]:
    """An event as a JSON object that `from_json` turns back into the same event.

    Raises:
        ValueError: a mechanism that Umbel does not account.
    """
    match event:
        case NoOpDpEvent():
            return {"mechanism": "nothing"}
        case NonPrivateDpEvent():
            return {"mechanism": "non-private"}
        case GaussianDpEvent():
            return {"mechanism": "gaussian", "noise_multiplier": event.noise_multiplier}
        case PoissonSampledDpEvent():
            return {
                "mechanism": "poisson-sampled",
                "sampling_rate": event.sampling_probability,
                "of": to_json(event.event),
            }
        case TruncatedSubsampledGaussianDpEvent():
            return {
                "mechanism": "truncated-poisson-gaussian",
                "population": event.dataset_size,
                "sampling_rate": event.sampling_probability,
                "cap": event.truncated_batch_size,
                "noise_multiplier": event.noise_multiplier,
            }
        case SampledWithoutReplacementDpEvent():
            return {
                "mechanism": "sampled-without-replacement",
                "population": event.source_dataset_size,
                "cohort": event.sample_size,
                "of": to_json(event.event),
            }
        case SingleEpochTreeAggregationDpEvent():
            return {
                "mechanism": "tree",
                "noise_multiplier": event.noise_multiplier,
                "steps": event.step_counts,
            }
        case SkellamDpEvent():
            return {
                "mechanism": "skellam",
                "variance": event.variance,
                "l2": event.l2,
                "l1": event.l1,
            }
        case ZCDpEvent() if event.xi == 0:
            return {"mechanism": "concentrated", "rho": event.rho}
        case SelectionDpEvent():
            return {
                "mechanism": "best-of-many",
                "distribution": event.distribution,
                "mean": event.mean,
                "of": [{"times": times, "event": to_json(one)} for one, times in event.run],
            }
        case SelfComposedDpEvent():
            return {"mechanism": "repeated", "times": event.count, "of": to_json(event.event)}
    raise ValueError(
        f"{type(event).__name__} is not accounted here; charge Gaussian noise, plain or sampled"
    )


def from_json(value: Mapping[str, Any]) -> DpEvent:
    """The event that `to_json` wrote, with every parameter checked.

    Raises:
        ValueError: it is no event, or a parameter is out of range.
    """
    try:
        return _read(value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{dict(value)!r} is not an event of a ledger: {error!r}") from error


def _read(value: Mapping[str, Any]) -> DpEvent:
    match value["mechanism"]:
        case "nothing":
            return NoOpDpEvent()
        case "non-private":
            return NonPrivateDpEvent()
        case "gaussian":
            return GaussianDpEvent(positive(noise_multiplier=value["noise_multiplier"]))
        case "poisson-sampled":
            return PoissonSampledDpEvent(
                fraction(sampling_rate=value["sampling_rate"]), _read(value["of"])
            )
        case "truncated-poisson-gaussian":
            return TruncatedSubsampledGaussianDpEvent(
                count(population=value["population"]),
                fraction(sampling_rate=value["sampling_rate"]),
                count(cap=value["cap"]),
                positive(noise_multiplier=value["noise_multiplier"]),
            )
        case "sampled-without-replacement":
            return SampledWithoutReplacementDpEvent(
                count(population=value["population"]),
                count(cohort=value["cohort"]),
                _read(value["of"]),
            )
        case "tree":
            return SingleEpochTreeAggregationDpEvent(
                positive(noise_multiplier=value["noise_multiplier"]), count(steps=value["steps"])
            )
        case "skellam":
            return SkellamDpEvent(
                positive(variance=value["variance"]),
                positive(l2=value["l2"]),
                positive(l1=value["l1"]),
            )
        case "concentrated":
            return ZCDpEvent(positive(rho=value["rho"]))
        case "best-of-many":
            run = tuple((_read(one["event"]), count(times=one["times"])) for one in value["of"])
            mean = positive(mean=value["mean"])
            return SelectionDpEvent(run, mean, str(value["distribution"]))
        case "repeated":
            return SelfComposedDpEvent(_read(value["of"]), count(times=value["times"]))
        case unknown:
            raise ValueError(f"{unknown!r} is not a mechanism that is accounted here")
