"""The work of the privacy benchmark, cut into jobs that run side by side."""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from umbel.benchmarks import audits, checks, scenes
from umbel.benchmarks.audits import Audit, Make
from umbel.benchmarks.checks import Check
from umbel.benchmarks.defences import FAULTS, Defence, central
from umbel.benchmarks.plans import Plan
from umbel.benchmarks.scenes import Measured, Task
from umbel.strategies.errors import ConfigError, UmbelError

Job = Callable[[Mapping[str, Sequence[nn.Module]]], Any]
"""Given each data set's reference models, gives something that can be pickled."""


def jobs_of(make: Make, plan: Plan) -> dict[str, Job]:
    """By a key that says where the result belongs; the slowest first."""
    jobs: dict[str, Job] = {}
    for scene in ("training", "pictures", "crowd", "hospitals", "implant"):
        for task in plan.tasks:
            for defence in plan.defences[task.data]:
                if scene in ("crowd", "implant") and task.pool.pixels is None:
                    continue
                # Large nodes overfit; what protects nodes has nothing to show there, and what
                # protects records has it there only.
                if (scene == "hospitals") != (defence.unit == "example") and (
                    scene in ("hospitals", "crowd", "training")
                    and (scene, defence.name) != ("hospitals", "none")
                ):
                    continue
                jobs[f"row/{task.data}/{defence.name}/{scene}"] = partial(
                    _scene, make, task, defence, scene
                )
    for task in plan.tasks:
        for defence in plan.defences[task.data]:
            if (
                task is plan.tasks[0] and defence.unit != "example"
            ):  # canaries have no data: one audit holds for all tasks
                jobs[f"audit/{defence.name}"] = partial(_audit, make, plan, task, defence)
    for name in FAULTS:
        jobs[f"fault/{name}"] = partial(_fault, make, plan, name)
    jobs["alone/many runs"] = partial(_mechanism, make, plan)
    jobs["alone/one shot"] = partial(_one_shot, make, plan)
    jobs["check/values"] = _values
    jobs["check/attacks"] = partial(_attacks, make, plan.seed)
    return jobs


def _values(references: Mapping[str, Sequence[nn.Module]]) -> list[Check]:  # noqa: ARG001
    return checks.estimators()


def _attacks(
    make: Make,
    seed: int,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> list[Check]:
    return checks.attacks(make, seed)


def _scene(
    make: Make,
    task: Task,
    defence: Defence,
    scene: str,
    references: Mapping[str, Sequence[nn.Module]],
) -> Measured | str:
    try:
        own = references.get(task.data, [])
        if scene == "hospitals":
            online = references.get(f"{task.data}/online", [])
            return scenes.hospitals(make, task, defence, own, online)
        if scene == "training":
            return scenes.training(make, task, defence, own)
        return getattr(scenes, scene)(make, task, defence)  # type: ignore[no-any-return]
    except UmbelError as error:
        return f"{scene} could not run: {error}"


def _audit(
    make: Make,
    plan: Plan,
    task: Task,
    defence: Defence,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> list[Audit] | str:
    """Canary nodes through the rounds and the sampling that the training scene has.

    Where nodes make the noise, or mask it, every node counts: one round of all of them.
    """
    planned = task.schedule(defence)
    schedule = audits.alone(plan.canaries, planned.delta)
    if defence.secure:
        schedule = replace(schedule, nodes=plan.secure_canaries, cohort=float(plan.secure_canaries))
    elif defence.noise == "server":
        cohort = planned.rate * plan.canaries
        schedule = replace(planned, nodes=plan.canaries, cohort=cohort)
    found: list[Audit] = []
    try:
        for at in range(plan.repetitions):
            found += audits.audit_clients(
                make, defence.name, defence.build, schedule, seed=plan.seed + at
            )
    except UmbelError as error:
        return f"the audit could not run: {error}"
    return found


def _fault(
    make: Make,
    plan: Plan,
    name: str,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> list[Audit]:
    """A stack that was broken on purpose, under the claim of the whole one."""
    return audit_fault(make, name, epsilon=plan.fault_epsilon, canaries=plan.canaries,
                       delta=plan.delta, seed=plan.seed)  # fmt: skip


def audit_fault(
    make: Make, name: str, *, epsilon: float, canaries: int, delta: float, seed: int
) -> list[Audit]:
    """Audit a central Gaussian stack with one of `FAULTS` in it, against model users."""
    if name not in FAULTS:
        raise ConfigError(f"there is no fault {name!r}; known are {', '.join(FAULTS)}")
    found = audits.audit_clients(
        make,
        name,
        lambda schedule: FAULTS[name](central(epsilon, schedule)),
        audits.alone(canaries, delta),
        seed=seed,
    )
    return [audit for audit in found if audit.adversary == "model-user"]


def _mechanism(
    make: Make,
    plan: Plan,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> list[Audit]:
    schedule = audits.alone(500, plan.delta)
    build = partial(central, 4.0)
    return audits.audit_mechanism(
        make, "Gaussian alone", build, schedule, runs=12 * plan.repetitions, seed=plan.seed
    )


def _one_shot(
    make: Make,
    plan: Plan,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> list[Audit]:
    schedule = audits.alone(400, plan.delta)
    build = partial(central, 4.0)
    size = 20_000
    one = audits.estimate_clients(
        make, "Gaussian alone", build, schedule, size=size, seed=plan.seed
    )
    return [one]


# ---- work


def train_references(plan: Plan, workers: int | None) -> dict[str, list[nn.Module]]:
    """Reference models that all scenes share: by data set, and by `DATA/online`."""
    jobs: dict[str, Job] = {}
    for task in plan.tasks:
        for number in range(task.references):
            jobs[f"{task.data}:{number}"] = partial(_reference, task, number, False)
        for number in range(task.online):
            jobs[f"{task.data}/online:{number}"] = partial(_reference, task, number, True)
    states = dict(work(jobs, {}, workers))
    models = {task.data: task.model(task.wide) for task in plan.tasks}
    found: dict[str, list[nn.Module]] = {}
    for key in jobs:
        name = key.partition(":")[0]
        module = models[name.partition("/")[0]]()
        module.load_state_dict({k: torch.from_numpy(a) for k, a in states[key].items()})
        found.setdefault(name, []).append(module)
    return found


def _reference(
    task: Task,
    number: int,
    online: bool,
    references: Mapping[str, Sequence[nn.Module]],  # noqa: ARG001
) -> dict[str, Any]:
    state = scenes.reference(task, number, online=online).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


def work(
    jobs: Mapping[str, Job],
    references: Mapping[str, Sequence[nn.Module]],
    workers: int | None,
) -> Iterator[tuple[str, Any]]:
    """Results by key, as they are ready."""
    count = processors() if workers is None else workers
    if count == 0 or len(jobs) < 2:
        for key, job in jobs.items():
            yield key, job(references)
        return
    pickled = pickle.dumps(dict(references))
    with ProcessPoolExecutor(count, get_context("spawn"), _prepare, (pickled,)) as pool:
        running = {pool.submit(_do, job): key for key, job in jobs.items()}
        for ready in as_completed(running):
            yield running[ready], ready.result()


_SHARED: dict[str, list[nn.Module]] = {}
"""Reference models of this worker process; sent once, not with every job."""


def _prepare(pickled: bytes) -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    _SHARED.update(pickle.loads(pickled))


def _do(job: Job) -> Any:
    return job(_SHARED)


def processors() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
