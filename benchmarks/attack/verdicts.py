"""What was tested of a promise, and how it came out: it holds, it is broken, or nobody knows.

A promise that was not tested is not one that holds. Where a test cannot be made, the reason
stands in the report, and the command ends like one that found a fault.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from umbel.privacy.attacks.promises import FALSE_ALARM

Outcome = Literal["holds", "broken", "not tested", "refused", "leaks"]
"""The last two are of lies: what the app's nodes or coordinator did not go along with, or did."""


@dataclass(frozen=True)
class Verdict:
    """One test of one promise.

    Attributes:
        what: that was tested, such as `noise`.
        adversary: against whom it is promised.
        outcome: how it came out.
        words: what was claimed and found, or why nothing was.
        claimed: epsilon or rate; None where there is no number.
        measured: of the same.
        false_alarm: probability of `broken` for a correct mechanism; None where it is no chance.
    """

    what: str
    adversary: str
    outcome: Outcome
    words: str
    claimed: float | None = None
    measured: float | None = None
    false_alarm: float | None = FALSE_ALARM

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.what} (against {self.adversary}): {self.outcome}: {self.words}"

    @property
    def bad(self) -> bool:
        """Whether the promise is not kept, as far as anybody knows."""
        return self.outcome in ("broken", "leaks")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def not_tested(what: str, adversary: str, why: str, claimed: float | None = None) -> Verdict:
    """A test that could not be made."""
    return Verdict(what, adversary, "not tested", why, claimed, false_alarm=None)
