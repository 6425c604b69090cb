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


WORDS: Mapping[str, str] = {
    "closed form": "If a model begins with a dense layer, its update is the product of an error "
    "and the input. Dividing one by the other gives the input back, exactly and in no time. Only "
    "noise, or enough other nodes in the same sum, stand in its way.",
    "iDLG labels": "The last layer's bias moves down for the class that an example has, and up "
    "for all others. Whoever sees one example's update knows its label.",
    "DLG": "Deep leakage from gradients: start from a random picture and change it until it would "
    "cause the update that was seen. It works on any smooth model.",
    "cosine + TV": "The same with the update's direction only, and with a preference for smooth "
    "pictures. Clipping does not hinder it, because clipping keeps the direction.",
    "imprint": "A malicious server puts a layer before the model that sorts pictures by "
    "brightness into bins. A bin with one picture gives it away, even out of a batch or a sum.",
    "participation": "The attacker guesses which nodes took part in a round: it computes what a "
    "candidate would have sent, and compares that with how the model moved.",
    "property": "The attacker trains many imitated nodes, half of which have a property, and "
    "learns to tell from an update whether its sender has it. The property here is having mostly "
    "one kind of example.",
    "source inference": "The attacker knows an example and wants to know whose it is: it asks "
    "each node's model, and takes the one that knows the example best.",
    "loss threshold": "Members have smaller losses than others, because the model was fitted to "
    "them. Guess that examples with small losses are members.",
    "LiRA offline": "The same, but each example is compared with how models behave that never saw "
    "it: some examples are easy for everybody.",
    "LiRA online": "The same with models of which half were trained on the example: how they "
    "behave with it and without it is known from both sides.",
    "RMIA online": "RMIA with reference models of which half were trained on the example.",
    "RMIA offline": "Each example is compared with many others: is it unusually well known to "
    "this model, given how well other models know it?",
}
"""One paragraph an attack, for somebody who has never heard of it."""
