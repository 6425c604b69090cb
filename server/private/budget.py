"""The guard of a private run: the budget is a gate, and the ledger is written first.

before a round      would it exceed the budget? then it does not run
before asking       who takes part is committed; local noise is charged here, because the
                    server sees it as it arrives
before the release  central noise is charged, then the sum is decoded

The last two ask again whether there is budget, inside the transaction that charges: another
coordinator on the same ledger may have been faster.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dp_accounting.privacy_accountant import UnsupportedEventError

from umbel.core.errors import ConfigError
from umbel.privacy.budget.accounting import COARSE, FINE, Accountant, Spent, spent
from umbel.privacy.budget.events import REPLACE, Charge
from umbel.server.private.ledger import Against, Ledger
from umbel.server.private.plan import PrivacyPlan, charges_of
from umbel.server.private.population import Scope
from umbel.server.roster import NodeRef
from umbel.strategies.transform import Claim, Facts


@dataclass
class Budget:
    """Watches one private run. See `umbel.server.privacy_gate.Guard`.

    Args:
        plan: of the run.
        ledger: of its population.
        run: the run's name in the ledger.
        scope: what the budget is of: all that was released about the population, or by this run.
    """

    plan: PrivacyPlan
    ledger: Ledger
    run: str
    scope: Scope = "population"
    _cleared: Counter[Charge] | None = None
    _repeated: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Rounds that an earlier process charged and that no checkpoint holds are paid again.
        self._repeated = self.ledger.charged_rounds(self.run)
        try:
            self._epsilon(self._spent(self._against) + self._next(1), COARSE)
        except ValueError as error:
            raise ConfigError(
                f"what was released about {self.ledger.population!r} before and what this run "
                f"would release cannot be added up: {error}"
            ) from error

    @property
    def seeded(self) -> bool:
        """Cohorts are drawn in secret, unless the run is not private anyway."""
        return bool(self.plan.privacy.seed is not None)

    def stop(self, number: int) -> str | None:
        """`budget` where round `number` would exceed it."""
        if self._unlimited:
            return None
        before = self._spent(self._against)
        now = before + self._next(number)
        if self._cleared is None or not now <= self._cleared:
            self._cleared = self._affordable(before, number)
        return None if now <= self._cleared else "budget"

    @property
    def _unlimited(self) -> bool:
        return math.isinf(self.plan.privacy.epsilon) or self.plan.insecure

    def _spent(self, against: Against) -> Counter[Charge]:
        """What counts against the budget so far."""
        return self.ledger.spent(against, self.run if self.scope == "run" else None)

    def _fits(self, charges: Iterable[Charge]) -> bool:
        """Whether these too are within the budget, with all that others have charged by now."""
        if self._unlimited:
            return True
        now = self._spent(self._against) + Counter(charges)
        if self._cleared is not None and now <= self._cleared:
            return True
        return self._epsilon(now, FINE) <= self.plan.privacy.epsilon

    def _affordable(self, before: Counter[Charge], number: int) -> Counter[Charge]:
        """As many of the coming rounds as the budget allows, by halving what is in doubt."""
        fits, last = number - 1, self.plan.options.rounds
        found = before
        tried = last
        while fits < last:
            charges = before + self._until(number, tried)
            if self._epsilon(charges, FINE) <= self.plan.privacy.epsilon:
                fits, found = tried, charges
            else:
                last = tried - 1
            tried = (fits + last + 1) // 2
        return found

    def eligible(self, number: int, nodes: Sequence[NodeRef]) -> Sequence[NodeRef]:
        """All nodes; with a minimum separation, those that have rested long enough."""
        separation = self._separation
        if separation <= 1:
            return nodes
        resting = self.ledger.resting(self.run, number, separation)
        return [node for node in nodes if node.name not in resting]

    def open(self, number: int, cohort: Sequence[NodeRef]) -> None:
        """Commit who takes part, and charge what the server will see."""
        local = [
            claim
            for claim in self.plan.claims(number)
            if claim.against == "server" and not claim.seen_in_sum_only
        ]
        names = [node.name for node in cohort]
        for claim in local:
            charge = self.plan.charge(claim, again=number in self._repeated)
            gate = self._gate([charge]) if self._against == "server" else None
            self.ledger.take_part(self.run, number, names, charge, fits=gate)
        if not local and self._separation > 1:
            self.ledger.take_part(self.run, number, names)

    def charge(self, number: int, facts: Facts, replies: int) -> None:  # noqa: ARG002
        """Commit what decoding this round's sum costs; an empty cohort costs the same."""
        central = self.plan.stack.claims(facts)
        against: tuple[Against, ...] = ("model-user", "server")
        for who in against:
            charges = [
                self.plan.charge(claim, again=number in self._repeated)
                for claim in central
                if claim.against == who and (who == "model-user" or claim.seen_in_sum_only)
            ]
            if charges:
                gate = self._gate(charges) if who == self._against else None
                what = f"round {number}"
                self.ledger.charge(self.run, what, who, charges, fits=gate, round=number)

    def _gate(self, charges: Sequence[Charge]) -> Callable[[], bool]:
        return lambda: self._fits(charges)

    def forfeit(self, number: int, facts: Facts) -> None:
        """Charge a round that an earlier process left in the middle, unless it has done so."""
        if number not in self._repeated:
            self.charge(number, facts, 0)

    def affords(self, claims: Sequence[Claim]) -> bool:
        """Whether a release outside of rounds fits what is left of the budget."""
        return self._fits([self.plan.charge(claim) for claim in claims])

    def release(self, name: str, claims: Sequence[Claim]) -> None:
        """Commit what a private mean costs, before it is made."""
        charges = [self.plan.charge(claim) for claim in claims]
        gate = self._gate(charges) if self._against == "model-user" else None
        self.ledger.charge(self.run, name, "model-user", charges, fits=gate)

    def epsilon(self) -> float:
        """Spent so far against model users, of what the budget is of, to a hair above."""
        return self.spent("model-user", COARSE).epsilon

    def spent(
        self, against: Against, interval: float = FINE, *, cross_check: bool = False
    ) -> Spent:
        """What has been spent against an adversary, of what the budget is of."""
        seen, central = self._spent("server"), self._spent("model-user")
        delta = self.plan.privacy.delta
        return combined(seen, central, against, delta, interval, cross_check=cross_check)

    def total(self, against: Against) -> Spent:
        """What the population has spent against an adversary, over all its runs."""
        seen, central = self.ledger.spent("server"), self.ledger.spent("model-user")
        return in_total(seen, central, against, self.plan.privacy.delta)

    @property
    def _against(self) -> Against:
        return "server" if self.plan.against == "server" else "model-user"

    @property
    def _separation(self) -> int:
        return max((claim.separation for claim in self.plan.claims(1)), default=1)

    def _next(self, number: int) -> Counter[Charge]:
        again = number in self._repeated
        return Counter(self.plan.charge(c, again=again) for c in self.plan.claims(number))

    def _until(self, number: int, last: int) -> Counter[Charge]:
        plan = self.plan
        later = charges_of(plan.stack, plan.cohort, plan.nodes, plan.facts, last, number + 1)
        return later + self._next(number)

    def _epsilon(self, charges: Counter[Charge], interval: float) -> float:
        return spent(charges, self.plan.privacy.delta, interval=interval).epsilon


FEW = 24
"""Unlike releases that are composed by their exact loss distributions; more are added up by RDP,
which is a little looser and takes no time."""


def in_total(
    seen: Counter[Charge], central: Counter[Charge], against: Against, delta: float
) -> Spent:
    """`combined` for a population's whole history, which may be long and of unlike kinds.

    Kinds that no proof adds up come to infinity: that is what is known of them together.
    """
    unlike = len(seen + central)
    ways: tuple[Accountant, ...] = ("pld",) if unlike <= FEW else ("rdp", "pld")
    for accountant in ways:
        with contextlib.suppress(ValueError, UnsupportedEventError):
            return combined(seen, central, against, delta, COARSE, accountant=accountant)
    return Spent(math.inf, delta, REPLACE, "none", None)


def combined(
    seen: Counter[Charge],
    central: Counter[Charge],
    against: Against,
    delta: float,
    interval: float = FINE,
    *,
    cross_check: bool = False,
    accountant: Accountant = "pld",
) -> Spent:
    """What charges against the server and against model users mean for one of them.

    The server sees what nodes send. Where they add no noise of their own, it sees everything:
    infinity. Model users see less than the server does, so what was charged against the server
    alone bounds them as well.

    Args:
        seen: charged against the server.
        central: charged against model users only.
        against: whom the result is about.
        delta: of the result.
        interval: see `umbel.privacy.budget.accounting.spent`; cross_check, accountant likewise.
    """

    def cost(charges: Counter[Charge]) -> Spent:
        return spent(
            charges, delta, interval=interval, cross_check=cross_check, accountant=accountant
        )

    if against == "model-user":
        return cost(seen + central)
    result = cost(seen)
    if central:
        return Spent(math.inf, delta, result.relation, result.accountant, None)
    return result
