"""Canary nodes in the place of an app's nodes, under its own stack and options."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbel.benchmarks.attack import audits
from umbel.benchmarks.attack.audits import CanaryRun
from umbel.benchmarks.attack.tasks import LENGTH, CanaryTrainer, Coins
from umbel.benchmarks.attack.views import Attackable, as_it_is, play
from umbel.clients.given import understood
from umbel.clients.trainers.base import Options
from umbel.privacy.budget.calibrate import noise_multiplier
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts

Fault = Callable[[Stack], Stack]
"""Breaks a stack on purpose."""


def canary_run(
    federation: Attackable,
    options: Options,
    *,
    canaries: int,
    spare: int = 0,
    together: bool = False,
    seed: int = 0,
    fault: Fault | None = None,
) -> CanaryRun:
    """One round in which canary nodes are the nodes of a federation.

    Args:
        federation: whose stack and options they are under.
        options: changes to its options.
        canaries: nodes, each in or out by a coin.
        spare: coordinates that no canary has of its own.
        together: all canaries are in, and have the last coordinate in common.
        seed: of the coins.
        fault: breaks the stack on purpose.

    Raises:
        ConfigError: the options cannot be used.
    """
    coins = np.random.default_rng([seed, 7]).random(canaries) < 0.5
    coins |= together
    changed, given = canary_federation(
        federation, options, coins, spare=spare, together=together, seed=seed, fault=fault
    )
    played = play(changed, canaries, given)
    delta = delta_of({**federation.complete({}), **options}, federation)
    return CanaryRun(played, coins, audits.alone(canaries, delta), changed.trainer)


def canary_federation(
    federation: Attackable,
    options: Options,
    coins: NDArray[np.bool_],
    *,
    spare: int = 0,
    together: bool = False,
    seed: int = 0,
    fault: Fault | None = None,
    weight: int = audits.WEIGHT,
    metrics: tuple[str, ...] = (),
    option: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The federation with canaries for nodes, and the options of their round.

    Args:
        federation: whose stack and options they are under.
        options: changes to its options.
        coins: which canaries are in.
        spare: coordinates that no canary has of its own.
        together: all have the last coordinate in common.
        seed: of the run.
        fault: breaks the stack on purpose.
        weight: examples that a canary says it has.
        metrics: names of what canaries report.
        option: whether the length of a canary is an option.
    """
    length = norm_of(federation, options) * audits.LONGER
    known = dict(understood(federation.trainer_for(federation.complete(options))))
    trainer = CanaryTrainer(
        len(coins) + spare,
        length,
        weight,
        shared=together,
        metrics=metrics,
        OPTIONS={**known, LENGTH: length} if option else known,
    )

    def stack(given: Options) -> Stack:
        made = federation.stack_for(given)
        return made if fault is None else fault(_noisy(made, given))

    changes = {"trainer": trainer, "data": Coins(coins), "stack": stack}
    made = as_it_is(federation, aside(federation) | changes)
    return made, one_round(federation, options, seed)


def one_round(federation: Attackable, options: Options, seed: int) -> dict[str, Any]:
    """Options for one round of everybody, whose result is the plain average."""
    known = federation.complete({})
    plain = {
        "rounds": 1,
        "cohort": "all",
        "sampling": "all",
        "client-eval-every": -1,
        "seed": seed,
        "optimizer": "fedavg",
        "server-learning-rate": 0.0,
        "separation": min(1, int(options.get("separation", known.get("separation", 0)))),
        "bands": 0,
    }
    return {
        **{k: v for k, v in options.items() if k not in ("cohort-size", "cohort-cap")},
        **{name: value for name, value in plain.items() if name in known},
    }


def claims(federation: Attackable, run: CanaryRun, options: Options) -> dict[str, float]:
    """Epsilon by adversary that a canary run promises."""
    return audits.claims_of(run.played, honest_stack(federation, options), run.schedule)


def honest_stack(federation: Attackable, options: Options) -> Stack:
    """The stack of a round of canaries, as the app makes it, with its noise."""
    complete = federation.complete(one_round(federation, options, 0))
    return _noisy(federation.stack_for(complete), complete)


def aside(federation: Attackable) -> dict[str, Any]:
    """Changes that leave out what an app does beside training, which may need its own data."""
    aside = {"test": None, "summary": None, "questions": ()}
    known = {field.name for field in fields(federation)}
    return {name: value for name, value in aside.items() if name in known}


def _noisy(stack: Stack, options: Mapping[str, Any]) -> Stack:
    """The stack with the noise that a plan gives it for one round in which everybody takes part.

    A fault may hide from the run that its stack is private, and then nobody plans.
    """
    epsilon = float(options.get("epsilon", math.inf))
    layers = [
        layer.with_noise(noise_multiplier(epsilon, float(options["delta"]), 1.0, 1))
        if isinstance(layer, Gaussian) and layer.noise_multiplier is None and math.isfinite(epsilon)
        else layer
        for layer in stack.layers
    ]
    return Stack(layers, stack.collect)


def delta_of(options: Mapping[str, Any], federation: Attackable) -> float:
    known = {**federation.complete({}), **options}
    return float(known.get("delta", 1e-5))


def norm_of(federation: Attackable, options: Options) -> float:
    """The bound of an update under the stack, so that canaries are longer than it."""
    stack = federation.stack_for(federation.complete(options))
    facts = Facts(size=1000)
    for layer, state in zip(stack.layers, stack.init(1000), strict=True):
        facts = layer.check(facts, state)
        if facts.l2_bound is not None:
            return facts.l2_bound
    return 1.0
