"""Reference values that an installation must reproduce before its measurements mean anything."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from umbel.benchmarks.attack import scenes
from umbel.benchmarks.attack.audits import Make
from umbel.benchmarks.attack.defences import Defence, nothing, with_noise
from umbel.benchmarks.attack.findings import Finding
from umbel.benchmarks.attack.scenes import Measured, Task
from umbel.privacy.attacks.audit import one_run_audit, one_run_bound
from umbel.privacy.attacks.inversion import isolated
from umbel.privacy.noise.gaussian import gaussian_noise

ONE_RUN = (
    (1000, 1000, 500, 1e-5, 0.0),
    (1000, 1000, 600, 1e-5, 0.2972),
    (1000, 1000, 750, 1e-5, 0.9764),
    (1000, 100, 100, 1e-5, 3.4654),
    (1000, 100, 95, 1e-5, 2.1652),
    (1000, 100, 90, 0.0, 1.6308),
    (5000, 500, 450, 1e-5, 1.9414),
    (1000, 1000, 1000, 1e-5, 5.7823),
    (100, 100, 100, 0.0, 3.4930),
)
"""Canaries, guesses, right guesses, delta, epsilon (Steinke, Nasr, Jagielski 2023, theorem 5.2)."""

MEMBERSHIP = ("loss threshold", "LiRA", "RMIA")
"""How the names of membership attacks begin."""

KNOWN = 0.06
"""The widest interval of an AUC that is held against limits as far apart."""

SMALL_EPSILON = 8.01
"""Calibrated noise comes to a total of 8 or a rounding error more."""


@dataclass(frozen=True)
class Check:
    """A reference value and what was measured here.

    Attributes:
        name: what it is.
        measured: here.
        least: the smallest that passes.
        most: the largest that passes.
    """

    name: str
    measured: float
    least: float
    most: float

    @property
    def ok(self) -> bool:
        """Whether the value is reproduced."""
        return self.least <= self.measured <= self.most

    @property
    def sentence(self) -> str:
        """For people."""
        return (
            f"{self.name} is {self.measured:.4g}, but it must lie between {self.least:.4g} and "
            f"{self.most:.4g}"
        )


def estimators() -> list[Check]:
    """The nine one-run values; a correct Gaussian is never refuted; a broken one is."""
    found = [
        Check(
            f"one-run bound of {right} right of {guesses} guesses on {canaries}, delta {delta:g}",
            one_run_bound(canaries=canaries, guesses=guesses, right=right, delta=delta).epsilon,
            expected - 0.002,
            expected + 0.002,
        )
        for canaries, guesses, right, delta, expected in ONE_RUN
    ]
    highest = max(_dirac(4.0, 1.0, seed) for seed in range(100))
    found.append(Check("largest bound of 100 correct Gaussians of epsilon 4", highest, 0.0, 4.0))
    caught = sum(_dirac(1.0, 0.25, seed) > 1.0 for seed in range(20))
    found.append(Check("Gaussians of a quarter of the noise caught, of 20", caught, 19, 20))
    return found


def attacks(make: Make, seed: int) -> list[Check]:
    """Inversion works where nothing protects, and fails where noise does.

    Under noise a reconstruction is empty, and its PSNR is that of an empty image: black where
    models see pixels of [0, 1] (7.2 dB for the median image of Fashion-MNIST, 6.3 for digits), grey
    where they see standardised ones (9.3). The mean of all images, which needs no attack, has more.
    So the limit of 8 dB is for pixels as they are, and the images are the same for every seed.
    """
    none = Defence("none", "", nothing)
    noisy = Defence("noise 0.1", "", partial(with_noise, 0.1), cohort=1)
    found = []
    for task in (
        Task(data="digits", pictures=40, optimised=0, suspects=400),
        Task(raw=True, pictures=80, optimised=0),
    ):
        what = f"of {task.pictures} images of {task.data}"
        open_ = scenes.pictures(make, replace(task, pictures=40), none)
        closed = scenes.pictures(make, task, noisy)
        found += [
            Check(
                "closed form without defence: median PSNR in dB, of 40 images of " + task.data,
                _find(open_, "closed form").value,
                100.0,
                np.inf,
            ),
            Check(
                "closed form at noise multiplier 0.1 and clip 1: median PSNR in dB, " + what,
                _find(closed, "closed form", "other-node").value,
                0.0,
                8.0,
            ),
            Check(
                "iDLG without defence: labels found, of 40 images of " + task.data,
                _find(open_, "iDLG labels").value,
                1.0,
                1.0,
            ),
        ]
    images = Task(seed=seed)
    recovered = [
        _find(scenes.implant(make, replace(images, seed=seed + at), none), "imprint").value
        for at in range(5)
    ]
    expected = isolated(64, images.bins)
    found.append(
        Check(
            "imprint, images isolated of 64 in 1000 bins, mean of 5 batches",
            64 * float(np.mean(recovered)),
            expected - 4,
            expected + 4,
        )
    )
    return found


def memberships(rows: Iterable[tuple[float | None, Sequence[Finding]]]) -> list[Check]:
    """Membership attacks come to nothing at epsilon 8 and below.

    An AUC that few suspects leave uncertain by more than the limits is no evidence either way.

    Args:
        rows: for each defence and data set the epsilon that it claims against model users, and
            what was found.
    """
    found = [
        one.value
        for epsilon, findings in rows
        if epsilon is not None and epsilon <= SMALL_EPSILON
        for one in findings
        if one.measure == "AUC" and one.attack.startswith(MEMBERSHIP)
        if one.high - one.low <= KNOWN
    ]
    if not found:
        return []
    name = f"of {len(found)} membership AUCs at epsilon 8 or less"
    return [
        Check(f"smallest {name}", min(found), 0.47, 0.53),
        Check(f"largest {name}", max(found), 0.47, 0.53),
    ]


def overfitted(findings: Sequence[Finding]) -> list[Check]:
    """Membership attacks on a model that was trained until it knew 2,000 images by heart."""
    best = {one.attack: one.value for one in findings if one.measure == "AUC"}
    loss = best["loss threshold"]
    rmia = max(value for attack, value in best.items() if attack.startswith("RMIA"))
    return [
        Check("loss threshold on an overfitted model: AUC", loss, 0.6, 1.0),
        Check("RMIA on the same model: AUC", rmia, loss, 1.0),
    ]


def _find(measured: Measured, attack: str, adversary: str = "") -> Finding:
    """The first finding of an attack: of this adversary, or of the one that sees most."""
    return next(
        one
        for one in measured.findings
        if one.attack == attack and adversary in ("", one.adversary)
    )


def _dirac(epsilon: float, factor: float, seed: int, canaries: int = 1000) -> float:
    """The bound of one run of a Gaussian of `epsilon`, with `factor` times its noise."""
    rng = np.random.default_rng([seed, 17])
    coins = rng.random(canaries) < 0.5
    sigma = gaussian_noise(epsilon, 1e-5) * factor
    return one_run_audit(coins + sigma * rng.normal(size=canaries), coins, delta=1e-5).epsilon
