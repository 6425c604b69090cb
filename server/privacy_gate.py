"""What stands between the sum of a round and its release."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from umbel.core.errors import UmbelError
from umbel.server.roster import NodeRef
from umbel.strategies.transform import Claim, Facts


class BudgetSpentError(UmbelError):
    """A release that was about to be made does not fit what is left; it must not be made."""


class PrivacyGate(Protocol):
    """Stands between a sum and its release: the budget and the ledger of a private run."""

    def stop(self, number: int) -> str | None:
        """Why round `number` must not run (`budget`), or None."""
        ...

    def eligible(self, number: int, nodes: Sequence[NodeRef]) -> Sequence[NodeRef]:
        """The nodes that may take part in round `number`."""
        ...

    def open(self, number: int, cohort: Sequence[NodeRef]) -> None:
        """Commit who is asked, and what asking them costs, before any request is sent.

        Raises:
            BudgetSpentError: another run was faster, and nothing may be asked any more.
        """
        ...

    def charge(self, number: int, facts: Facts, replies: int) -> None:
        """Commit what decoding this round's sum will cost, before it is decoded.

        Raises:
            BudgetSpentError: see `open`.
        """
        ...

    def forfeit(self, number: int, facts: Facts) -> None:
        """Commit what a round costs that is given up, and whose sum somebody may have seen."""
        ...

    def affords(self, claims: Sequence[Claim]) -> bool:
        """Whether a release outside of rounds fits the budget."""
        ...

    def release(self, name: str, claims: Sequence[Claim]) -> None:
        """Commit what a release outside of rounds costs, before it is made.

        Raises:
            BudgetSpentError: see `open`.
        """
        ...

    def epsilon(self) -> float | None:
        """Spent so far, against model users; None without privacy."""
        ...

    @property
    def seeded(self) -> bool:
        """Whether cohorts may be drawn from the run's seed."""
        ...


@dataclass(frozen=True)
class NoGuard:
    """A run that promises no privacy."""

    seeded: bool = True

    def stop(self, number: int) -> str | None:  # noqa: ARG002
        return None

    def eligible(self, number: int, nodes: Sequence[NodeRef]) -> Sequence[NodeRef]:  # noqa: ARG002
        return nodes

    def open(self, number: int, cohort: Sequence[NodeRef]) -> None:  # noqa: ARG002
        return None

    def charge(self, number: int, facts: Facts, replies: int) -> None:  # noqa: ARG002
        return None

    def forfeit(self, number: int, facts: Facts) -> None:  # noqa: ARG002
        return None

    def affords(self, claims: Sequence[Claim]) -> bool:  # noqa: ARG002
        return True

    def release(self, name: str, claims: Sequence[Claim]) -> None:  # noqa: ARG002
        return None

    def epsilon(self) -> float | None:
        return None
