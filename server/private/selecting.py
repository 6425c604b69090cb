"""A private search for better options: what one trial may cost, so that the search keeps a budget.

The search is one release, the best of a random number of alike runs
(`umbel.privacy.budget.selection`): it is charged to the population's ledger before the first trial
begins, and nothing of the other trials is kept.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from umbel.core.errors import ConfigError
from umbel.privacy.budget.accounting import spent
from umbel.privacy.budget.calibrate import calibrate
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge
from umbel.privacy.budget.selection import SelectionDpEvent
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.ledger import Ledger
from umbel.server.private.plan import charges_of, cohort_options
from umbel.server.private.population import Register, place_of
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import check_bounds, make_sampler
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts

SHAPING = (
    *PrivacyOptions.defaults(),
    *("rounds", "cohort", "cohort-size", "cohort-cap", "buffers", "secure", "mode"),
    *("method", "aggregator", "compression", "selection"),
)
"""Options that what a trial costs depends on: a private search cannot vary them."""


@dataclass(frozen=True)
class Trials:
    """How the trials of a private search are run.

    Attributes:
        noise_multiplier: of every one.
        charge: what the search costs as a whole.
        epsilon: of that, at `delta`, with all that was charged before where the budget is one of
            the population.
        delta: as asked for.
        run_epsilon: of one trial alone, for comparison.
    """

    noise_multiplier: float
    charge: Charge
    epsilon: float
    delta: float
    run_epsilon: float


def plan_trials(
    stack: Stack,
    options: RunOptions,
    privacy: PrivacyOptions,
    *,
    nodes: int,
    size: int,
    mean: float,
    distribution: str,
    before: Mapping[Charge, int] | None = None,
) -> Trials:
    """The noise of every trial under which the search keeps the budget.

    Args:
        stack: of the app; central noise that the budget decides, or that an option says.
        options: of every trial.
        privacy: the budget of the search.
        nodes: the population.
        size: coordinates of an update.
        mean: expected number of trials.
        distribution: of that number; a key of `umbel.privacy.budget.selection.SHAPES`.
        before: what was charged already and counts against the budget.

    Raises:
        ConfigError: no noise meets the budget, or the mechanism has no such analysis.
    """
    options = cohort_options(options, privacy, nodes, stack.separation)
    sampler = make_sampler(options.cohort, options.cohort_size, options.cohort_cap)
    expected, most = check_bounds(sampler, nodes)
    facts = Facts(size=size, expected_replies=expected, max_replies=most)

    def one(multiplier: float) -> Counter[Charge]:
        noisy = stack.with_noise(multiplier) if stack.waiting else stack
        return charges_of(noisy, sampler, nodes, facts, options.rounds)

    def whole(multiplier: float) -> Charge:
        """The search: what noise misses of its exact law, each of `mean` trials may miss."""
        run = one(multiplier)
        event = SelectionDpEvent(
            tuple((charge.event, times) for charge, times in run.items()), mean, distribution
        )
        missed = math.fsum(charge.slack * times for charge, times in run.items())
        return Charge(event, slack=mean * missed)

    fixed = stack.noise_multiplier if not stack.waiting else privacy.noise_multiplier
    for charge in one(fixed or 1.0):
        known = isinstance(charge.event, GaussianDpEvent | PoissonSampledDpEvent)
        if charge.relation is not ADD_OR_REMOVE or not known:
            raise ConfigError(
                "a private search is accounted for Poisson cohorts with Gaussian noise alone; use "
                "sampling=poisson and mechanism=gaussian, or tune on public data: --public FILE"
            )
    try:
        multiplier = fixed or calibrate(
            lambda m: {whole(m): 1}, privacy.epsilon, privacy.delta, before=before
        )
        charge = whole(multiplier)
        epsilon = spent(Counter(before or {}) + Counter({charge: 1}), privacy.delta).epsilon
        alone = spent(one(multiplier), privacy.delta).epsilon
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Trials(float(multiplier), charge, epsilon, privacy.delta, alone)


def charge_search(
    run: RunDirectory,
    data: object,
    stack: Stack,
    options: RunOptions,
    privacy: PrivacyOptions,
    *,
    names: Sequence[str],
    size: int,
    mean: float,
    distribution: str,
) -> tuple[Trials, dict[str, Any]]:
    """Plan a private search and charge it to the ledger of its population.

    Args:
        run: the directory of the search, with the app's name in its configuration.
        data: the federation's data function, which names the population.
        stack: see `plan_trials`, as the others.
        names: of the nodes.

    Returns:
        The plan, and what the report says: population, scope, what it has spent in total.

    Raises:
        ConfigError: no noise meets the budget.
        BudgetSpentError: others have spent the budget meanwhile.
    """
    place = place_of(privacy, run, data)
    key = coordinator_key()
    with Ledger(place.path, place.population, key, Register(place.register)) as ledger:
        name = f"{run.path.resolve().name}@search"
        before = ledger.spent("model-user") if place.scope == "population" else None
        trials = plan_trials(
            stack,
            options,
            privacy,
            nodes=len(names),
            size=size,
            mean=mean,
            distribution=distribution,
            before=before,
        )
        ledger.admit(name, place.labels(names))
        charge = trials.charge

        def fits() -> bool:
            now = ledger.spent("model-user") if place.scope == "population" else Counter[Charge]()
            return (
                spent(now + Counter({charge: 1}), privacy.delta).epsilon
                <= max(privacy.epsilon, trials.epsilon) + 1e-9
            )

        ledger.charge(name, "search for options", "model-user", [charge], fits=fits)
        total = spent(ledger.spent("model-user"), privacy.delta).epsilon
    return trials, {"population": place.population, "epsilon_in_total": total}
