"""What a run would cost before it is one: the charges of its rounds, for every mechanism there is.

The stack is composed from the options as for a run, and its rounds are charged as the
coordinator's ledger would charge them, so that a plan and a run cannot disagree.
"""

import math
from collections import Counter
from dataclasses import dataclass

from dp_accounting import GaussianDpEvent

from umbel.core.errors import ConfigError
from umbel.core.options import Options, checked
from umbel.privacy.budget.events import Charge
from umbel.server.private.plan import charges_of, claims_of, cohort_options
from umbel.strategies.composition import compose
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import Sampler, make_sampler
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts

DROWNED = 10.0
"""Noise that is longer than this many clipping norms in the average leaves little to learn from."""


@dataclass(frozen=True)
class Schedule:
    """Rounds that could be run.

    Attributes:
        stack: perhaps without its noise.
        cohort: of every round.
        nodes: size of the population.
        rounds: how many.
        facts: of an update before the stack.
    """

    stack: Stack
    cohort: Sampler
    nodes: int
    rounds: int
    facts: Facts

    def charges(self, multiplier: float) -> Counter[Charge]:
        """Everything that the rounds are charged with this noise multiplier."""
        return charges_of(self._noisy(multiplier), self.cohort, self.nodes, self.facts, self.rounds)

    def claim(self, multiplier: float) -> Claim:
        """What the first round promises."""
        return claims_of(self._noisy(multiplier), self.facts, 1)[0]

    def _noisy(self, multiplier: float) -> Stack:
        return self.stack.with_noise(multiplier) if self.stack.waiting else self.stack

    @property
    def own_noise(self) -> float | None:
        """The noise that each node adds to its update, in norms; None where it is in the sum."""
        claim = self.claim(1.0)
        if self.stack.waiting or not isinstance(claim.event, GaussianDpEvent):
            return None
        return float(claim.event.noise_multiplier)

    def noise_over_norm(self, multiplier: float) -> float:
        """Length of the noise in the average update, in clipping norms.

        A coordinate of it has a deviation of multiplier * norm / cohort, and there are
        `facts.size` of them; noise that every node adds by itself is sqrt(cohort) times as much.
        """
        cohort = self.cohort.bounds(self.nodes)[0]
        summed = multiplier * (1.0 if self.own_noise is None else math.sqrt(cohort))
        return summed * math.sqrt(self.facts.size) / cohort


def schedule(
    given: Options, *, rounds: int, sampling_rate: float, nodes: int, parameters: int
) -> Schedule:
    """The schedule that options describe.

    Args:
        given: privacy and secure options, such as {"mechanism": "tree", "separation": 10}.
        rounds: planned.
        sampling_rate: the expected share of the nodes in a round.
        nodes: the population.
        parameters: of the model.

    Raises:
        ConfigError: an unknown option, or options that do not go together.
        StackError: layers that do not fit together.
    """
    if not 0 < sampling_rate <= 1:
        raise ConfigError(f"sampling-rate is {sampling_rate:g}; it must be above 0 and at most 1")
    known = RunOptions.defaults() | PrivacyOptions.defaults() | SecureOptions.defaults()
    for name in given:
        if name not in known:
            raise ConfigError(
                f"there is no option {name!r} of privacy, secure sums or rounds; "
                "umbel options lists them"
            )
    options = known | {name: checked(name, value, known[name]) for name, value in given.items()}
    options |= {"rounds": rounds, "cohort-size": sampling_rate * nodes}
    if "epsilon" not in given and "noise-multiplier" not in given:
        options["epsilon"] = 1.0  # asks for a private stack; how much noise is the question
    stack = compose(Stack(), options, lambda: parameters)
    run = cohort_options(
        RunOptions.read(options), PrivacyOptions.read(options), nodes, stack.separation
    )
    cohort = make_sampler(run.cohort, run.cohort_size, run.cohort_cap)
    facts = Facts(
        size=parameters,
        expected_replies=cohort.bounds(nodes)[0],
        max_replies=cohort.bounds(nodes)[1],
    )
    return Schedule(stack, cohort, nodes, rounds, facts)
