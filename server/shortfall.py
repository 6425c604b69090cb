"""What of a run came to nothing: rounds that changed no model, nodes that failed again and again.

A run whose rounds were all passed over has not trained, whatever its last line says; one in which
many nodes failed has trained on the others. Both are said where a run is summed up.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shortfall:
    """What the lines of a run's rounds say of what was missing.

    Attributes:
        rounds: that were begun.
        unused: rounds that left the model as it was.
        failing: rounds in which nodes failed, of those that were used.
        worst: the largest number of nodes that failed in one of these.
        asked: how many nodes that round had.
        reason: the most common reason of failures; empty where there were none.
        troubled: some node failed, or a sum was given up; without, nobody was drawn.
    """

    rounds: int
    unused: int
    failing: int
    worst: int
    asked: int
    reason: str
    troubled: bool

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "Shortfall":
        """Count over the lines of `metrics.jsonl`."""
        rounds = [line for line in lines if int(line.get("round", 0)) > 0]
        used = [line for line in rounds if line.get("used", True)]
        failing = [line for line in used if line.get("failed")]
        worst = max(failing, key=lambda line: len(line["failed"]), default=None)
        reasons = Counter(f["reason"] for line in rounds for f in line.get("failed") or ())
        lost = 0 if worst is None else len(worst["failed"])
        return cls(
            rounds=len(rounds),
            unused=len(rounds) - len(used),
            failing=len(failing),
            worst=lost,
            asked=0 if worst is None else lost + int(worst.get("clients", 0)),
            troubled=any(line.get("failed") or line.get("aborted") for line in rounds),
            reason=reasons.most_common(1)[0][0] if reasons else "",
        )

    @property
    def nothing(self) -> bool:
        """Whether no round has changed the model, and not because nobody was drawn."""
        return self.rounds > 0 and self.unused == self.rounds and self.troubled

    def sentences(self) -> list[str]:
        """What a reader of the result must know; nothing where all went well."""
        said = []
        why = f"; most often: {self.reason}" if self.reason else ""
        if self.unused:
            said.append(
                f"{self.unused} of {self.rounds} rounds could not be used and left the model as "
                f"it was{why}"
            )
        if self.failing and 2 * self.failing >= self.rounds:
            said.append(
                f"nodes failed in {self.failing} of {self.rounds} rounds, up to {self.worst} of "
                f"{self.asked}, and the model was trained without them{why}"
            )
        return said
