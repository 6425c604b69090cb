"""The guard of a private run: the budget is a gate, and the ledger is written first.

before a round      would it exceed the budget? then it does not run
before asking       who takes part is committed; local noise is charged here, because the
                    server sees it as it arrives
before the release  central noise is charged, then the sum is decoded
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from umbel.privacy.budget.accounting import COARSE, FINE, Spent, spent
from umbel.privacy.budget.events import Charge
from umbel.server.private.ledger import Against, Ledger
from umbel.server.private.plan import Plan, charges_of
from umbel.server.roster import NodeRef
from umbel.strategies.layer import Claim, Facts


@dataclass
class Budget:
    """Watches one private run. See `umbel.server.guard.Guard`.

    Args:
        plan: of the run.
        ledger: of its population.
        run: the run's name in the ledger.
    """

    plan: Plan
    ledger: Ledger
    run: str
    _cleared: Counter[Charge] | None = None
    _repeated: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Rounds that an earlier process charged and that no checkpoint holds are paid again.
        self._repeated = self.ledger.charged_rounds(self.run)

    @property
    def seeded(self) -> bool:
        """Cohorts are drawn in secret, unless the run is not private anyway."""
        return bool(self.plan.privacy.seed is not None)

    def stop(self, number: int) -> str | None:
        """`budget` where round `number` would exceed it."""
        target = self.plan.privacy.epsilon
        if math.isinf(target) or self.plan.description()["insecure"]:
            return None
        before = self.ledger.spent(self._against)
        now = before + self._next(number)
        if self._cleared is None or not now <= self._cleared:
            self._cleared = self._affordable(before, number)
        return None if now <= self._cleared else "budget"

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
            if claim.against == "server" and not claim.summed
        ]
        names = [node.name for node in cohort]
        for claim in local:
            charge = self.plan.charge(claim, again=number in self._repeated)
            self.ledger.take_part(self.run, number, names, charge)
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
                if claim.against == who and (who == "model-user" or claim.summed)
            ]
            if charges:
                self.ledger.charge(self.run, f"round {number}", who, charges, round=number)

    def forfeit(self, number: int, facts: Facts) -> None:
        """Charge a round that an earlier process left in the middle, unless it has done so."""
        if number not in self._repeated:
            self.charge(number, facts, 0)

    def affords(self, claims: Sequence[Claim]) -> bool:
        """Whether a release outside of rounds fits what is left of the budget."""
        target = self.plan.privacy.epsilon
        if math.isinf(target) or self.plan.description()["insecure"]:
            return True
        charges = Counter(self.plan.charge(claim) for claim in claims)
        return self._epsilon(self.ledger.spent(self._against) + charges, FINE) <= target

    def release(self, name: str, claims: Sequence[Claim]) -> None:
        """Commit what a private mean costs, before it is made."""
        charges = [self.plan.charge(claim) for claim in claims]
        self.ledger.charge(self.run, name, "model-user", charges)

    def epsilon(self) -> float:
        """Spent so far against model users, by the population, to a hair above."""
        return self.spent("model-user", COARSE).epsilon

    def spent(
        self, against: Against, interval: float = FINE, *, cross_check: bool = False
    ) -> Spent:
        """What the population has spent against an adversary."""
        seen, central = self.ledger.spent("server"), self.ledger.spent("model-user")
        delta = self.plan.privacy.delta
        return combined(seen, central, against, delta, interval, cross_check=cross_check)

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


def combined(
    seen: Counter[Charge],
    central: Counter[Charge],
    against: Against,
    delta: float,
    interval: float = FINE,
    *,
    cross_check: bool = False,
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
        interval: see `umbel.privacy.budget.accounting.spent`; cross_check likewise.
    """
    if against == "model-user":
        return spent(seen + central, delta, interval=interval, cross_check=cross_check)
    result = spent(seen, delta, interval=interval, cross_check=cross_check)
    if central:
        return Spent(math.inf, delta, result.relation, result.accountant, None)
    return result
