"""The scenes in which a defence is attacked: real runs of its stack, with the truth kept aside.

pictures     one image a node, one step: what an update shows of its example
implant      64 images, and a model that a malicious server chose
crowd        some of many nodes take part in one round: who, whose, and what kind

Whole runs are in `training`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from umbel.benchmarks.attack import nodes, reconstruct
from umbel.benchmarks.attack.audits import Make, claims_of
from umbel.benchmarks.attack.defences import Defence, Schedule
from umbel.benchmarks.attack.findings import Finding, Reconstruction, guaranteed
from umbel.benchmarks.attack.tasks import Chosen, Dealt, Perceptron, Pool, Rows, pool
from umbel.benchmarks.attack.views import Played, play
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.privacy.attacks.audit import Scores
from umbel.privacy.attacks.inversion import imprint
from umbel.privacy.attacks.roc import Roc

QUIET = {"client-eval-every": -1}


@dataclass(frozen=True)
class Task:
    """What is trained, and how large the scenes are.

    Attributes:
        data: name of the data set.
        raw: pixels as they are, and not standardised, are what models see.
        hidden: neurons of the trained perceptron.
        nodes: of the training scene.
        cohort: expected nodes of its rounds.
        rounds: of it.
        local_steps: of a node in a round, on all of its examples.
        learning_rate: of them.
        suspects: examples that may be members, each with probability one half.
        draws: whole runs, each with coins of its own; an eighth of it where nothing is claimed.
        norm: that private stacks clip to.
        delta: of all claims.
        pictures: images in the pictures scene.
        optimised: of these, images for the slow inversions; 0 leaves them out.
        iterations: of the slow inversions.
        bins: of the imprint layer.
        references: models that the attacker trains itself.
        online: models that it trains on half of the suspects each; an even number.
        hospitals: large nodes that overfit.
        wide: neurons of the hospitals' perceptron and of the references.
        wide_epochs: local epochs of a round there.
        wide_rounds: rounds there.
        seed: of everything that is not noise.
    """

    data: str = "fashion-mnist"
    raw: bool = False
    hidden: int = 32
    nodes: int = 400
    cohort: int = 100
    rounds: int = 30
    local_steps: int = 10
    learning_rate: float = 0.1
    suspects: int = 4000
    draws: int = 1
    norm: float = 1.0
    delta: float = 1e-5
    pictures: int = 40
    optimised: int = 2
    iterations: int = 200
    bins: int = 1000
    references: int = 4
    online: int = 2
    hospitals: int = 2
    wide: int = 256
    wide_epochs: int = 5
    wide_rounds: int = 10
    seed: int = 0

    @property
    def pool(self) -> Pool:
        """Suspects first, then what the attacker has of its own."""
        return pool(self.data, 3 * self.suspects, self.seed, self.raw)

    def schedule(self, defence: Defence) -> Schedule:
        """Of the training scene; the noise of all scenes is made for it."""
        cohort = float(defence.cohort or self.cohort)
        return Schedule(self.rounds, self.nodes, cohort, self.delta, self.norm)

    def draws_of(self, defence: Defence) -> int:
        """Whole runs of a row; what a claim is held against must be known best."""
        return self.draws if defence.unit != "none" else max(1, self.draws // 8)

    def model(self, hidden: int | None = None, *, smooth: bool = False) -> Perceptron:
        """A perceptron for the data."""
        features, classes = self.pool.features, self.pool.classes
        return Perceptron(features, hidden or self.hidden, classes, smooth)


@dataclass(frozen=True)
class Measured:
    """What one defence came to in the scenes.

    Attributes:
        findings: of all attacks.
        curves: ROC by attack.
        pictures: reconstructed images.
        accuracy: of the trained model, with the number of test examples; None where not trained.
        claimed: epsilon by adversary, over the training scene.
        bytes_up: of the training scene, a node and round.
        seconds: of a round of it.
        scores: of all suspects, by attack, for audits of examples.
        members: which suspects were members.
    """

    findings: list[Finding] = field(default_factory=list)
    curves: dict[str, Roc] = field(default_factory=dict)
    pictures: list[Reconstruction] = field(default_factory=list)
    accuracy: tuple[float, int] | None = None
    claimed: dict[str, float] = field(default_factory=dict)
    bytes_up: float = 0.0
    seconds: float = 0.0
    scores: dict[str, Scores] = field(default_factory=dict)
    members: np.ndarray[Any, np.dtype[np.bool_]] | None = None


def pictures(make: Make, task: Task, defence: Defence) -> Measured:
    """Inversion of updates made by one step on one image, by the server and by a model user."""
    images, clients = task.pool, defence.cohort or 8
    trainer = defence.trainer(
        TorchTrainer(task.model(128), batch_size=0, local_steps=1), task.delta
    )
    found: dict[tuple[str, str, str], list[Finding]] = {}
    shown: list[Reconstruction] = []
    for start in range(0, max(task.pictures, clients), clients):
        rows = np.arange(start, start + clients)
        played = _one_round(make, task, defence, trainer, [np.array([row]) for row in rows])
        own = {node: images.x[row] for node, row in enumerate(rows)}
        truth = {node: int(images.y[row]) for node, row in enumerate(rows)}
        for adversary in ("server", "other-node"):
            view = played.view(adversary)
            results, picture = reconstruct.closed_form(view, own, images)
            results += reconstruct.labels(view, truth, images.classes)
            for one in results:
                found.setdefault((one.attack, adversary, one.measure), []).append(one)
            if start == 0 and adversary == "server":
                shown.append(picture)
    findings = [reconstruct.pooled(group) for group in found.values()]
    slow = _slow_inversions(make, task, defence)
    return Measured(findings + slow.findings, pictures=shown + slow.pictures)


def _slow_inversions(make: Make, task: Task, defence: Defence) -> Measured:
    """DLG and the cosine attack on a smooth model, where a reply can be read."""
    if not task.optimised or task.pool.pixels is None:
        return Measured()
    images, clients = task.pool, defence.cohort or task.optimised
    model = task.model(32, smooth=True)
    trainer = defence.trainer(TorchTrainer(model, batch_size=0, local_steps=1), task.delta)
    rows = [np.array([row]) for row in range(clients)]
    # A rate of 1 makes the update minus the gradient, which the server could also divide out.
    played = _one_round(make, task, defence, trainer, rows, {"learning-rate": 1.0})
    own = {node: images.x[node] for node in range(min(clients, task.optimised))}
    findings, made = reconstruct.optimised(
        played.view("server"), own, model(), images, iterations=task.iterations, seed=task.seed
    )
    return Measured(findings, pictures=made)


def implant(make: Make, task: Task, defence: Defence) -> Measured:
    """A malicious server puts an imprint layer before the model; 64 images are trained on."""
    images = task.pool
    if images.pixels is None:
        return Measured()
    batch, clients = 64, min(defence.cohort or 1, 64)
    layer = imprint(images.x[task.suspects :], task.bins, scale=1e-3)
    head = torch.randn(images.classes, 1, generator=torch.Generator().manual_seed(task.seed))
    plain = TorchTrainer(task.model(task.bins), batch_size=0, local_steps=1)
    trainer = Chosen(
        defence.trainer(plain, task.delta),
        {
            "0.weight": layer.weight,
            "0.bias": layer.bias,
            "2.weight": head.expand(-1, task.bins).contiguous(),
        },
    )
    rows = np.array_split(np.arange(batch), clients)
    played = _one_round(make, task, defence, trainer, rows)
    view = played.view("malicious-server")
    return Measured(reconstruct.imprinted(view, images.x[:batch], layer, images))


def crowd(make: Make, task: Task, defence: Defence) -> Measured:
    """Of 100 nodes about half take part; half of all have mostly one class."""
    images, total, each = task.pool, 100, 10
    generator = np.random.default_rng([task.seed, 3])
    special = generator.random(3 * total) < 0.5
    rows = _with_property(images, special, each, generator)
    dealt = Dealt(images, rows)
    trainer = TorchTrainer(task.model(), batch_size=0, local_steps=task.local_steps)
    cohort = float(defence.cohort or total // 2)
    schedule = replace(task.schedule(defence), nodes=total, cohort=cohort, rounds=1)
    options = {**QUIET, "learning-rate": task.learning_rate}
    stack = defence.build(task.schedule(defence))
    federation = make(trainer=trainer, data=dealt, stack=stack, name="crowd", options=options)
    sampling = "fixed" if defence.cohort else "poisson"
    played = play(federation, total, {**schedule.options(sampling), "seed": task.seed})
    candidates = nodes.Candidates(dealt.of, trainer, federation.complete(options))
    inside = sorted(played.heard[0].wire)
    outside = [node for node in range(total) if node not in set(inside)]
    imitated = list(range(total, 3 * total))
    measured = Measured(claimed=claims_of(played, stack, schedule))
    found, curves = nodes.took_part(
        played.view("other-node"),
        candidates,
        inside,
        outside,
        imitated=imitated[:50],
        cohort=cohort,
    )
    more, extra = nodes.has_property(
        played.view("server"),
        candidates,
        {node: bool(special[node]) for node in inside},
        imitated,
        special[total:].tolist(),
        task.seed,
    )
    found = guaranteed(found, curves, measured.claimed.get("model-user"), task.delta)
    found += more + nodes.whose(played.view("server"), dealt, task.model()())
    return replace(measured, findings=found, curves=curves | extra)


def _one_round(
    make: Make,
    task: Task,
    defence: Defence,
    trainer: Any,
    rows: Sequence[Rows],
    options: dict[str, Any] | None = None,
) -> Played:
    """One round in which every node takes part."""
    federation = make(
        trainer=trainer,
        data=Dealt(task.pool, rows),
        stack=defence.build(task.schedule(defence)),
        name="round",
        options={**QUIET, "learning-rate": 0.1, **(options or {})},
    )
    everyone = Schedule(1, len(rows), float(len(rows)), task.delta, task.norm)
    return play(federation, len(rows), {**everyone.options(), "seed": task.seed})


def _with_property(
    images: Pool, special: np.ndarray[Any, np.dtype[np.bool_]], each: int, generator: Any
) -> list[Rows]:
    """Rows of nodes: `each` examples, seven tenths of class 0 where the node is special."""
    free = np.arange(len(images.x) // 3, len(images.x))
    zero = free[images.y[free].numpy() == 0]
    other = free[images.y[free].numpy() != 0]
    rows = []
    for has in special:
        few = each * 7 // 10 if has else each // 10
        rows.append(
            np.concatenate([generator.choice(zero, few), generator.choice(other, each - few)])
        )
    return rows
