"""The work of the privacy benchmark, cut into jobs that run side by side."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from umbel.benchmarks.attack import audits, checks, scenes, training
from umbel.benchmarks.attack.audits import Audit, Make
from umbel.benchmarks.attack.defences import FAULTS, Defence, central
from umbel.benchmarks.attack.plans import Plan
from umbel.benchmarks.attack.scenes import Measured, Task
from umbel.core.errors import ConfigError, UmbelError

Job = Callable[[], Any]
"""Can be sent to another process, and its result can be sent back."""

State = Mapping[str, NDArray[np.float32]]
"""A reference model's parameters by name."""
References = Mapping[str, Sequence[State]]
"""By data set those of the offline attacks, and by `DATA/online` the others."""
ONLINE = "/online"


def jobs_of(make: Make, plan: Plan, references: References) -> dict[str, Job]:
    """By a key that says where the result belongs; the slowest first."""
    jobs: dict[str, Job] = {"check/attacks": partial(checks.attacks, make, plan.seed)}
    for scene in ("training", "pictures", "crowd", "hospitals", "implant"):
        for task in plan.tasks:
            known = [references.get(task.data + kind, []) for kind in ("", ONLINE)]
            for defence in plan.defences[task.data]:
                if _applies(scene, task, defence):
                    given = known if scene in ("training", "hospitals") else []
                    jobs[f"row/{task.data}/{defence.name}/{scene}"] = partial(
                        _scene, make, task, defence, scene, given
                    )
    first = plan.tasks[0]  # canaries have no data: one audit holds for all tasks
    for defence in plan.defences[first.data]:
        if defence.unit != "example":
            jobs[f"audit/{defence.name}"] = partial(_audit, make, plan, first, defence)
    for name in FAULTS:
        jobs[f"fault/{name}"] = partial(_fault, make, plan, name)
    jobs["alone/many runs"] = partial(_mechanism, make, plan)
    jobs["alone/one shot"] = partial(_one_shot, make, plan)
    jobs["check/values"] = checks.estimators
    return jobs


def _applies(scene: str, task: Task, defence: Defence) -> bool:
    """Whether a scene can show anything of a defence.

    Large nodes overfit: what protects nodes has nothing to show there, and what protects records
    has it there only.
    """
    if scene == "implant" and task.pool.pixels is None:
        return False  # the imprint layer sorts by brightness
    if scene == "hospitals":
        return defence.unit == "example" or defence.name == "none"
    return defence.unit != "example" or scene in ("pictures", "implant")


def _scene(
    make: Make,
    task: Task,
    defence: Defence,
    scene: str,
    references: Sequence[Sequence[State]],
) -> Measured | str:
    known = [[_module(task, state) for state in states] for states in references]
    try:
        if scene == "hospitals":
            return training.hospitals(make, task, defence, *known)
        if scene == "training":
            return training.training(make, task, defence, known[0])
        return getattr(scenes, scene)(make, task, defence)  # type: ignore[no-any-return]  # each scene returns rows
    except UmbelError as error:
        return f"{scene} could not run: {error}"


def _audit(
    make: Make,
    plan: Plan,
    task: Task,
    defence: Defence,
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
) -> list[Audit]:
    schedule = audits.alone(500, plan.delta)
    build = partial(central, 4.0)
    return audits.audit_mechanism(
        make, "Gaussian alone", build, schedule, runs=12 * plan.repetitions, seed=plan.seed
    )


def _one_shot(
    make: Make,
    plan: Plan,
) -> list[Audit]:
    schedule = audits.alone(400, plan.delta)
    build = partial(central, 4.0)
    size = 20_000
    one = audits.estimate_clients(
        make, "Gaussian alone", build, schedule, size=size, seed=plan.seed
    )
    return [one]


# ---- work


def train_references(plan: Plan, workers: int | None) -> tuple[References, float]:
    """Reference models that all scenes share, and the processor time that they took."""
    jobs: dict[str, Job] = {}
    for task in plan.tasks:
        for kind, count in (("", task.references), (ONLINE, task.online)):
            for number in range(count):
                key = f"{task.data}{kind}:{number}"
                jobs[key] = partial(_reference, task, number, kind == ONLINE)
    states: dict[str, State] = {}
    seconds = 0.0
    for key, state, spent in work(jobs, workers):
        states[key] = state
        seconds += spent
    found: dict[str, list[State]] = {}
    for key in jobs:
        found.setdefault(key.partition(":")[0], []).append(states[key])
    return found, seconds


def _reference(task: Task, number: int, online: bool) -> State:
    state = training.reference(task, number, online=online).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


def _module(task: Task, state: State) -> nn.Module:
    module = task.model(task.wide)()
    module.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    return module


def work(jobs: Mapping[str, Job], workers: int | None) -> Iterator[tuple[str, Any, float]]:
    """Keys, results and seconds of processor time, as they are ready."""
    count = processors() if workers is None else workers
    if count == 0 or len(jobs) < 2:
        for key, job in jobs.items():
            yield key, *_timed(job)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), _prepare) as pool:
        try:
            running = {pool.submit(_timed, job): key for key, job in jobs.items()}
            for ready in as_completed(running):
                yield running[ready], *ready.result()
        except BaseException:  # Ctrl-C must not wait for trainings that take minutes
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _timed(job: Job) -> tuple[Any, float]:
    began = time.process_time()
    result = job()
    return result, time.process_time() - began


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)


def processors() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
