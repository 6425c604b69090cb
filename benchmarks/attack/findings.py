"""What an attack found, in one form for tables, plots and files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbel.privacy.attacks.audit import Scores, auc_ceiling
from umbel.privacy.attacks.roc import Interval, Roc, above_ceiling, attacked

Pixels = NDArray[np.float32]
"""Shape (images, pixels)."""


@dataclass(frozen=True)
class Finding:
    """One number that an attack measured.

    Attributes:
        attack: its name.
        adversary: whose view it had.
        measure: what the number is, with its unit.
        value: the number.
        low: lower end of the 95 % interval.
        high: upper end of it.
        chance: what an attacker without the view gets.
        ceiling: the most that the claimed guarantee allows; None without a guarantee.
        trials: examples, clients or images that it rests on.
        excess: standard errors by which a ROC curve lies above its ceiling; None for others.
    """

    attack: str
    adversary: str
    measure: str
    value: float
    low: float
    high: float
    chance: float
    trials: int
    ceiling: float | None = None
    excess: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def under(self, epsilon: float | None, delta: float) -> "Finding":
        """With the ceiling that (epsilon, delta) puts on an AUC."""
        if epsilon is None or not math.isfinite(epsilon) or self.measure != "AUC":
            return self
        return replace(self, ceiling=auc_ceiling(epsilon, delta))


@dataclass(frozen=True)
class Reconstruction:
    """Images beside what an attack made of them, as pixels of [0, 1]."""

    attack: str
    originals: Pixels
    guesses: Pixels


def guaranteed(
    findings: Sequence[Finding], curves: Mapping[str, Roc], epsilon: float | None, delta: float
) -> list[Finding]:
    """Findings with the ceilings of a guarantee, and by how much a curve breaks through one."""
    out = []
    for finding in findings:
        curve = curves.get(finding.attack)
        if epsilon is not None and curve is not None and finding.measure == "AUC":
            finding = replace(finding, excess=above_ceiling(curve, epsilon, delta))
        out.append(finding.under(epsilon, delta))
    return out


def roc_findings(
    name: str, adversary: str, with_: Scores, without: Scores
) -> tuple[list[Finding], Roc]:
    """An attack's AUC and, with enough non-members, its true positive rates; and its curve."""
    result = attacked(with_, without)
    trials = len(with_) + len(without)

    def finding(measure: str, interval: Interval, chance: float) -> Finding:
        ends = interval.value, interval.low, interval.high
        return Finding(name, adversary, measure, *ends, chance, trials)

    found = [finding("AUC", result.auc, 0.5)]
    if len(without) >= 1000:
        found.append(finding("TPR at 1 % FPR", result.tpr_at_1_percent, 0.01))
        found.append(finding("TPR at 0.1 % FPR", result.tpr_at_01_percent, 0.001))
    return found, result.roc
