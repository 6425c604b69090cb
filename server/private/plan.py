"""Before the first round of a private run: how much noise, which cohorts, what it will cost.

    options, population, ledger -> layers with their noise, the cohort, and a budget that watches

What is decided here is said aloud before anything runs, and written into the ledger.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)

from umbel.core.errors import ConfigError, StackError
from umbel.core.registry import is_built_in
from umbel.privacy.budget.accounting import spent
from umbel.privacy.budget.calibrate import calibrate
from umbel.privacy.budget.events import REPLACE, Charge, relation_name
from umbel.server.private.ledger import Ledger
from umbel.server.private.population import Scope
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.private_mean import PrivateMean
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import (
    Sampler,
    Sampling,
    check_bounds,
    is_own,
    make_sampler,
)
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts

SAFETY = 1 - 1e-7
"""The noise is chosen for a hair less than the budget, so that the last round is not refused for
the last bit of a sum."""
APP = "app: "
"""How a sampler of an app's own is called in a ledger: no name of Umbel's begins so."""
LEFT = 0.01
"""With less than this part of the budget left, noise would drown whatever is learned."""


@dataclass(frozen=True)
class PrivacyPlan:
    """A private run that has been thought through.

    Attributes:
        stack: with all noise decided.
        options: the run's, with the cohort that the accounting assumes.
        privacy: the privacy options.
        cohort: of every round.
        nodes: size of the population.
        facts: of an update before the stack.
        noise_multiplier: of the central noise; None where nodes make their own.
        against: the adversary that the budget is about.
        questions: private means that are asked beside training.
    """

    stack: Stack
    options: RunOptions
    privacy: PrivacyOptions
    cohort: Sampler
    nodes: int
    facts: Facts
    noise_multiplier: float | None
    against: str
    questions: tuple[PrivateMean, ...] = ()
    _claims: dict[int, list[Claim]] = field(default_factory=dict, repr=False, compare=False)

    def claims(self, number: int) -> list[Claim]:
        """What round `number` costs, before sampling; worked out once.

        Rounds cost alike, unless they share noise: see `charges_of`.
        """
        if 1 not in self._claims:
            self._claims[1] = claims_of(self.stack, self.facts, 1)
        if all(claim.repeat_event is None for claim in self._claims[1]):
            return self._claims[1]
        if number not in self._claims:
            self._claims[number] = claims_of(self.stack, self.facts, number)
        return self._claims[number]

    def charge(self, claim: Claim, *, again: bool = False) -> Charge:
        """What a claim costs under this plan's cohorts."""
        return charge_for(claim, self.cohort, self.nodes, again=again)

    @property
    def drawn(self) -> str:
        """How cohorts are drawn: `poisson`, `fixed`, `all`, or `app: ` and the app's sampler.

        No other name than the first two stands for a choice that hides who was chosen.
        """
        if self.cohort.sampling is not None:
            return self.cohort.sampling.kind
        return self.cohort.name if is_own(self.cohort) else f"{APP}{self.cohort.name}"

    @property
    def insecure(self) -> bool:
        """The noise can be repeated by whoever knows the seed."""
        return self.privacy.seed is not None or self.stack.insecure

    def description(self) -> dict[str, Any]:
        """The mechanism's parameters, for the ledger and the certificate."""
        claim = self.claims(1)[0]
        return {
            "stack": str(self.stack),
            "layers": [_parameters(layer) for layer in self.stack.layers],
            "noise_multiplier": self.noise_multiplier,
            "questions": [_question(question) for question in self.questions],
            "rounds": self.options.rounds,
            "nodes": self.nodes,
            "cohort": self.drawn,
            "expected_cohort": self.cohort.bounds(self.nodes)[0],
            "cohort_cap": None if self.cohort.sampling is None else self.cohort.sampling.cap,
            "separation": claim.separation,
            "unit": claim.unit,
            "relation": relation_name(self.charge(claim).relation),
            "target_epsilon": self.privacy.epsilon,
            "delta": self.privacy.delta,
            "against": self.against,
            "insecure": self.insecure,
        }


def make_plan(
    stack: Stack,
    options: RunOptions,
    privacy: PrivacyOptions,
    *,
    nodes: int,
    size: int,
    ledger: Ledger,
    run: str,
    scope: Scope = "population",
    questions: Sequence[PrivateMean] = (),
    sampler: Sampler | None = None,
) -> PrivacyPlan:
    """Decide noise and cohorts of a private run.

    Args:
        stack: private, perhaps without its central noise.
        options: of the run.
        privacy: of the run.
        nodes: the population.
        size: coordinates of an update.
        ledger: of the population.
        run: the run's name; a run that goes on keeps the noise that it began with.
        scope: what the budget is of.
        questions: private means that the same budget pays for.
        sampler: the app's own; None or one of Umbel's by name leaves the cohort to the options.

    Raises:
        ConfigError: no noise meets the budget, or the cohort does not fit the population.
        StackError: layers that do not fit together.
    """
    options = _without_leaks(options)
    if sampler is None or is_built_in("sampler", options.cohort):
        options = cohort_options(options, privacy, nodes, stack.separation)
        cohort = make_sampler(options.cohort, options.cohort_size, options.cohort_cap)
    else:
        cohort = sampler
        check_sampler(cohort, privacy, nodes, stack.separation)
    expected, most = check_bounds(cohort, nodes)
    facts = Facts(size=size, expected_replies=expected, max_replies=most)
    multiplier: float | None = None
    if stack.waiting:
        multiplier = _noise_of(ledger, run)
        if multiplier is None:
            before = ledger.spent("model-user", run if scope == "run" else None)
            multiplier = _calibrated(
                stack, options, privacy, cohort, nodes, facts, before, questions
            )
        stack = stack.with_noise(multiplier)
    else:
        multiplier = stack.noise_multiplier
    claims = claims_of(stack, facts, 1)
    if not claims:
        raise StackError("the stack makes no privacy claim; put Gaussian or LocalGaussian into it")
    against = "model-user" if any(c.against == "model-user" for c in claims) else "server"
    return PrivacyPlan(
        stack, options, privacy, cohort, nodes, facts, multiplier, against, tuple(questions)
    )


def claims_of(stack: Stack, facts: Facts, number: int) -> list[Claim]:
    """The claims of round `number`, on the facts at the bottom of the stack."""
    states = [
        {**state, "step": number - 1} if isinstance(state, dict) and "step" in state else state
        for state in stack.init(facts.size)
    ]
    return stack.claims(stack.check(facts.replace(round=number), tuple(states)))


def charges_of(
    stack: Stack, cohort: Sampler, nodes: int, facts: Facts, rounds: int, first: int = 1
) -> Counter[Charge]:
    """Everything that rounds `first` to `rounds` will be charged."""
    charges: Counter[Charge] = Counter()
    for number in range(first, rounds + 1):
        claims = claims_of(stack, facts, number)
        alike = all(claim.repeat_event is None for claim in claims)
        for claim in claims:
            charges[charge_for(claim, cohort, nodes)] += rounds + 1 - number if alike else 1
        if alike:  # only noise that is shared between rounds costs unlike amounts
            break
    return charges


def charge_for(claim: Claim, cohort: Sampler, nodes: int, *, again: bool = False) -> Charge:
    """A claim as the accountant is charged for it: with the sampling that really happens."""
    event = claim.repeat_event if again and claim.repeat_event is not None else claim.event
    if not claim.sampled or isinstance(event, NonPrivateDpEvent | NoOpDpEvent):
        return Charge(event, claim.relation, claim.extra_delta)
    if not isinstance(event, GaussianDpEvent):
        raise StackError(f"{type(event).__name__} has no accounting under a sampled cohort")
    sampling = cohort.sampling
    if sampling is not None and sampling.kind == "poisson":
        return Charge(_poisson(event, sampling, nodes), claim.relation, claim.extra_delta)
    if sampling is not None and sampling.size < nodes:
        sampled = SampledWithoutReplacementDpEvent(nodes, math.ceil(sampling.size), event)
        return Charge(sampled, REPLACE, claim.extra_delta)
    return Charge(event, claim.relation, claim.extra_delta)


def _poisson(event: GaussianDpEvent, sampling: Sampling, nodes: int) -> DpEvent:
    rate = min(float(sampling.size), float(nodes)) / nodes
    cap = sampling.cap
    if cap is not None and cap < nodes:
        return TruncatedSubsampledGaussianDpEvent(nodes, rate, cap, event.noise_multiplier)
    return event if rate >= 1 else PoissonSampledDpEvent(rate, event)


def _calibrated(
    stack: Stack,
    options: RunOptions,
    privacy: PrivacyOptions,
    cohort: Sampler,
    nodes: int,
    facts: Facts,
    before: Counter[Charge],
    questions: Sequence[PrivateMean],
) -> float:
    # A seeded run gets the noise that it would have if it were private.
    sound = stack.without_seeds()
    asked = Counter(
        charge_for(c, cohort, nodes) for q in questions for c in q.without_seed().claims()
    )

    def planned(multiplier: float) -> Counter[Charge]:
        noisy = sound.with_noise(multiplier)
        return charges_of(noisy, cohort, nodes, facts, options.rounds) + asked

    gone = spent(before, privacy.delta).epsilon
    if gone > privacy.epsilon * (1 - LEFT):
        raise ConfigError(
            f"the budget is spent: releases about this population have cost epsilon {gone:.4g} of "
            f"{privacy.epsilon:g}; raise epsilon, or name another population for other people"
        )
    try:
        return calibrate(planned, privacy.epsilon * SAFETY, privacy.delta, before=before)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _noise_of(ledger: Ledger, run: str) -> float | None:
    """The noise that a run which goes on began with."""
    for body in ledger.runs(run):
        value = body.get("noise_multiplier")
        if value is not None:
            return float(value)
    return None


def cohort_options(
    options: RunOptions, privacy: PrivacyOptions, nodes: int, separation: int
) -> RunOptions:
    """The cohort that `sampling` and the mechanism ask for."""
    expected = options.cohort_size or float(nodes)
    if not expected <= nodes:
        raise ConfigError(
            f"cohort-size is {expected:g}, but the population has {nodes} nodes; lower it to "
            f"{nodes} or less"
        )
    if separation > 1:
        most = nodes // separation
        if most < 1:
            raise ConfigError(
                f"separation is {separation}, but there are only {nodes} nodes; a round needs "
                "one that has rested so long, so lower separation"
            )
        size = min(math.ceil(expected), most)
        return replace(options, cohort="fixed", cohort_size=float(size), cohort_cap=0)
    if privacy.sampling == "poisson":
        return replace(options, cohort="poisson", cohort_size=expected)
    if privacy.sampling == "all":
        return replace(options, cohort="all", cohort_size=0.0, cohort_cap=0)
    return replace(options, cohort="fixed", cohort_size=expected, cohort_cap=0)


def check_sampler(sampler: Sampler, privacy: PrivacyOptions, nodes: int, separation: int) -> None:
    """Refuse an app's own sampler under which the accounting would not be right.

    Its choice may depend on what was released and on who took part, so it is counted as known to
    everyone: no amplification. Only Umbel's own samplers are known to draw as they say.

    Raises:
        ConfigError: it claims amplification itself, or does not go with the options.
    """
    if sampler.sampling is not None and not is_own(sampler):
        raise ConfigError(
            f"the app's sampler {sampler.name} says that it draws {sampler.sampling.kind} cohorts, "
            "which nobody can check, and epsilon would hang on it; let sampling be None, or take "
            "umbel.Poisson or umbel.FixedSize"
        )
    if privacy.sampling != PrivacyOptions.sampling:
        raise ConfigError(
            f"sampling is {privacy.sampling}, but cohorts are chosen by the app's own sampler "
            f"{sampler.name}; leave sampling out, or give cohort=all"
        )
    most = check_bounds(sampler, nodes)[1]
    if separation > 1 and most > nodes // separation:
        raise ConfigError(
            f"the sampler {sampler.name} takes up to {most} of {nodes} nodes a round, and each "
            f"must rest {separation} rounds; let it take {nodes // separation} at most"
        )


def _without_leaks(options: RunOptions) -> RunOptions:
    """Options under which nothing of the nodes' data leaves beside the noised sum."""
    if options.buffers == "mean":
        raise ConfigError(
            f"buffers={options.buffers} would send running statistics without noise; use "
            "buffers=local, or a model with group normalisation"
        )
    return replace(options, client_eval_every=-1)


def _parameters(layer: Any) -> dict[str, Any]:
    fields = getattr(layer, "__dataclass_fields__", {})
    values = {name: getattr(layer, name) for name in fields if name != "name"}
    plain = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if isinstance(value, bool | int | float | str | dict | None)
    }
    return {"layer": layer.name, **plain}


def _question(question: PrivateMean) -> dict[str, Any]:
    return {
        "name": question.name,
        "after": question.after,
        "coordinates": question.size,
        "norm": question.norm,
        "noise_multiplier": question.noise_multiplier,
    }
