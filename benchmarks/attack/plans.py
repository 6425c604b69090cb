"""How much is measured: `quick` for every day, `full` for a release."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from umbel.benchmarks.attack.defences import Defence, example_rows, rows, secure_rows
from umbel.benchmarks.attack.scenes import Task


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tasks: data sets and sizes.
        defences: the rows, for each task by its data set's name.
        canaries: of an audit; fewer under a secure sum, whose cost grows with their square.
        secure_canaries: there.
        delta: of the audits of mechanisms alone.
        fault_epsilon: that a faulty stack claims.
        repetitions: of every audit.
        overfits: the first task's large nodes are trained far enough for what is expected there.
        seed: of everything that is not noise.
    """

    tasks: Sequence[Task]
    defences: Mapping[str, Sequence[Defence]]
    canaries: int = 1000
    secure_canaries: int = 60
    delta: float = 1e-5
    fault_epsilon: float = 1.0
    repetitions: int = 1
    overfits: bool = False
    seed: int = 0


def quick(seed: int = 0) -> Plan:
    """At most five minutes on two cores."""
    images = Task(draws=2, seed=seed)
    medical = replace(_medical(seed), draws=16)
    every = [*rows([1, 3, 8], 8), *secure_rows([5, 20, 50], [8], 20), *example_rows([8])]
    return Plan(
        tasks=(images, medical), defences={images.data: every, medical.data: every}, seed=seed
    )


def full(seed: int = 0) -> Plan:
    """All rows, larger models, more images and references; an hour on two cores."""
    images = Task(
        draws=2, pictures=100, optimised=4, iterations=1000, references=4, online=4, rounds=40,
        hospitals=1, wide=1024, wide_epochs=10, wide_rounds=15, seed=seed,
    )  # fmt: skip
    medical = replace(
        _medical(seed), draws=32, pictures=100, references=4, online=8, wide_rounds=20
    )
    every = [
        *rows([0.5, 1, 2, 4, 8], 8),
        *secure_rows([5, 20, 50], [2, 8], 50),
        *example_rows([2, 8]),
    ]
    return Plan(
        tasks=(images, medical),
        defences={images.data: every, medical.data: every},
        canaries=5000,
        secure_canaries=100,
        repetitions=3,
        overfits=True,
        seed=seed,
    )


def _medical(seed: int) -> Task:
    """The measurements of 569 patients: 300 suspects, half of whom are dealt to 75 practices."""
    return Task(
        data="breast-cancer", hidden=16, nodes=75, cohort=25, rounds=10, suspects=300,
        delta=1e-3, pictures=20, optimised=0, references=2, wide=64, seed=seed,
    )  # fmt: skip
