"""Whole runs: what a model is worth, what it cost, and what it says of those it was trained on.

training     a federation of many small nodes
hospitals    few large nodes that train until they know their examples by heart

Each is played `Task.draws_of` times. Every draw throws the suspects' coins anew and trains anew,
so that a small data set, too, measures an attack and not the luck of one split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from umbel.benchmarks.attack.audits import Make, claims_of
from umbel.benchmarks.attack.defences import Defence, Schedule
from umbel.benchmarks.attack.findings import guaranteed
from umbel.benchmarks.attack.members import Suspects, guesses, judged
from umbel.benchmarks.attack.scenes import QUIET, Measured, Task
from umbel.benchmarks.attack.tasks import Dealt, Rows
from umbel.benchmarks.attack.views import Played, play
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job
from umbel.privacy.attacks.audit import Scores


def training(make: Make, task: Task, defence: Defence, references: Sequence[nn.Module]) -> Measured:
    """A whole run of a federation of many small nodes.

    Args:
        make: makes a federation.
        task: what is trained.
        defence: its stack.
        references: trained on none of the suspects, for the offline attacks.
    """
    schedule = task.schedule(defence)
    trainer = TorchTrainer(task.model(), batch_size=0, local_steps=task.local_steps)
    options = {**QUIET, "learning-rate": task.learning_rate}
    stack = defence.build(schedule)
    sampling = "fixed" if defence.cohort else "poisson"
    given = {**schedule.options(sampling), "evaluate-every": task.rounds}
    runs, found = [], []
    for draw in range(task.draws_of(defence)):
        suspects = members_of(task, draw)
        data = _dealt(task, suspects, task.nodes, [task.seed, 5, draw])
        federation = make(trainer=trainer, data=data, stack=stack, name="training", options=options)
        played = play(
            federation, task.nodes, {**given, "seed": task.seed + draw}, listen=lambda _: False
        )
        runs.append(played)
        model = task.model()()
        found.append(guesses(played.view("model-user"), model, suspects, references))
    claimed = claims_of(runs[0], stack, schedule)
    return _measured(task, runs, found, claimed)


def hospitals(
    make: Make,
    task: Task,
    defence: Defence,
    references: Sequence[nn.Module],
    online: Sequence[nn.Module] = (),
) -> Measured:
    """Few large nodes train until they know their examples by heart: what overfitting tells.

    Args:
        make: makes a federation.
        task: what is trained.
        defence: of the nodes.
        references: trained on none of the suspects, for the offline attacks.
        online: trained on the halves of `halves(task)`, for the online attacks.
    """
    # Noise is drawn once a step, so private steps are few and large.
    batch = 32 if defence.example_epsilon is None else 250
    plain = TorchTrainer(task.model(task.wide), batch_size=batch, local_epochs=task.wide_epochs)
    trainer = defence.trainer(plain, task.delta)
    options = {**QUIET, "learning-rate": task.learning_rate}
    count = task.hospitals
    schedule = Schedule(task.wide_rounds, count, float(count), task.delta, task.norm)
    stack = defence.build(schedule)
    given = {**schedule.options(), "evaluate-every": task.wide_rounds}
    known = halves(task)[: len(online)]
    runs, found = [], []
    for draw in range(task.draws_of(defence)):
        suspects = members_of(task, draw)
        data = _dealt(task, suspects, count, [task.seed, 6, draw])
        federation = make(
            trainer=trainer, data=data, stack=stack, name="hospitals", options=options
        )
        played = play(
            federation, count, {**given, "seed": task.seed + draw}, listen=lambda _: False
        )
        runs.append(played)
        view, model = played.view("model-user"), task.model(task.wide)()
        scores = guesses(view, model, suspects, references)
        if online:
            scores = {**guesses(view, model, suspects, online, known), **scores}
        found.append(scores)
    claimed = {}
    if defence.example_epsilon is not None:
        claimed = {"model-user": defence.example_epsilon, "server": defence.example_epsilon}
    return _measured(task, runs, found, claimed)


def _measured(
    task: Task,
    runs: Sequence[Played],
    found: Sequence[Mapping[str, Scores]],
    claimed: dict[str, float],
) -> Measured:
    """The draws together, under what each of them claims."""
    members = [members_of(task, draw).members for draw in range(len(runs))]
    findings, curves, scores = judged(found, members)
    replies = max(1, sum(heard.count for played in runs for heard in played.heard))
    accuracy = float(np.mean([played.result["metrics"]["accuracy"] for played in runs]))
    return Measured(
        findings=guaranteed(findings, curves, claimed.get("model-user"), task.delta),
        curves=curves,
        accuracy=(accuracy, len(task.pool.test)),
        claimed=claimed,
        bytes_up=sum(played.bytes_up for played in runs) / replies,
        seconds=float(np.median([second for played in runs for second in played.seconds])),
        scores=scores,
        members=np.concatenate(members),
    )


def _dealt(task: Task, suspects: Suspects, nodes: int, seed: Sequence[int]) -> Dealt:
    """The members among the suspects, shuffled and dealt evenly."""
    shuffled = np.random.default_rng(seed).permutation(suspects.rows[suspects.members])
    return Dealt(task.pool, np.array_split(shuffled, nodes))


def members_of(task: Task, draw: int = 0) -> Suspects:
    """Suspects, each a member by its own fair coin, and a population that nobody trains on."""
    rows = np.arange(task.suspects)
    coins = np.random.default_rng([task.seed, 11, draw]).random(task.suspects) < 0.5
    return Suspects(task.pool, rows, coins, _others(task)[0])


def _others(task: Task) -> tuple[Rows, Rows]:
    """Examples that no node has: a population to compare with, and the attacker's own."""
    rest = np.arange(task.suspects, len(task.pool.x))
    return rest[: len(rest) // 2], rest[len(rest) // 2 :]


# ---- the attacker's own models


def halves(task: Task) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which suspects each online reference was trained on, shape (online, suspects).

    Every second model has what the one before it has not, so every suspect is in half of them.
    """
    generator = np.random.default_rng([task.seed, 19])
    coins = generator.random((task.online // 2, task.suspects)) < 0.5
    return np.stack([coins, ~coins], axis=1).reshape(-1, task.suspects)


def reference(task: Task, number: int, *, online: bool = False) -> nn.Module:
    """A model that the attacker trained, on its own examples or on half of the suspects."""
    images = task.pool
    if online:
        rows = np.flatnonzero(halves(task)[number])
    else:
        _, own = _others(task)
        size = task.suspects // 2
        generator = np.random.default_rng([task.seed, 13, number])
        rows = generator.choice(own, size, replace=len(own) < size)
    epochs = task.wide_epochs * task.wide_rounds
    model = task.model(task.wide)
    trainer = TorchTrainer(model, batch_size=32, local_epochs=epochs)
    options = {**trainer.OPTIONS, "learning-rate": task.learning_rate}
    first = trainer.initial(options, 1000 + task.seed + number)
    job = Job(round=1, seed=1000 + number, options=options)
    trained = trainer.train(first, images.take(rows), job)
    module = model()
    module.load_state_dict(trained.weights.parameters)
    return module
