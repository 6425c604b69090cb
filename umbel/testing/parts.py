"""`check_optimizer` and `check_sampler`: the laws of parts that `Federation` takes as values."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from umbel.core.errors import UmbelError
from umbel.strategies.optimizers import ServerOptimizer, Slots, advance
from umbel.strategies.parts import check_given
from umbel.strategies.samplers import (
    NodeHistory,
    Sampler,
    SamplingContext,
    check_bounds,
    choose,
    remember,
)
from umbel.testing.laws import hold


def check_optimizer(optimizer: ServerOptimizer, size: int = 64) -> None:
    """Fail unless a server optimiser keeps its laws on models of `size` parameters.

    The same model, update and state give the same bits, whatever was stepped in between; the
    inputs are left alone; a model comes out as it went in, in shape and type; the state is tensors
    only, so that a run that is resumed from its checkpoint goes on as if it had not stopped.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    name = type(optimizer).__name__
    _is_part(name, "optimizer", optimizer)
    generator = torch.Generator().manual_seed(1)
    model = torch.randn(size, generator=generator)
    updates = [torch.randn(size, generator=generator) for _ in range(3)]
    slots = optimizer.init(model)
    before = (model.clone(), updates[0].clone(), _copy(slots))
    try:
        first = advance(optimizer, model, updates[0], slots)
        advance(optimizer, torch.zeros(size), updates[2], optimizer.init(torch.zeros(size)))
        again = advance(optimizer, model, updates[0], slots)
        straight = advance(optimizer, first[0], updates[1], first[1])
        resumed = advance(optimizer, first[0].clone(), updates[1], _copy(first[1]))
    except UmbelError as error:
        raise AssertionError(f"{name}: {error}") from error
    untouched = torch.equal(model, before[0]) and torch.equal(updates[0], before[1])
    hold(
        untouched and _same(slots, before[2]),
        f"{name}: `step` leaves the model, the update and the state alone",
        "one of them was changed",
        "make new tensors (`a + b` in place of `a.add_(b)`)",
    )
    for what, one, other in (("again", first, again), ("resumed", straight, resumed)):
        hold(
            torch.equal(one[0], other[0]) and _same(one[1], other[1]),
            f"{name}: the same model, update and state give the same bits",
            f"a step done {what} gave others",
            "keep everything in the state that `step` returns, and nothing on self",
        )


@dataclass(frozen=True)
class _Node:
    """A node to choose."""

    name: str
    partition: int


def check_sampler(sampler: Sampler, population: int = 20, rounds: int = 6) -> None:
    """Fail unless a sampler keeps its laws on so many nodes.

    It selects some of the nodes that it is given, each once, and no more than `bounds` says; the
    same round, seed and history give the same nodes; it leaves the history alone.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    name = type(sampler).__name__
    _is_part(name, "sampler", sampler)
    nodes = [_Node(f"node-{i}", i) for i in range(population)]
    history: Mapping[str, NodeHistory] = {}
    try:
        check_bounds(sampler, population)
        for number in range(1, rounds + 1):
            before = dict(history)
            ctx = SamplingContext(number, [5, number, 1], history)
            chosen, again = choose(sampler, nodes, ctx), choose(sampler, nodes, ctx)
            choose(sampler, nodes, SamplingContext(number, None, history))
            hold(
                chosen == again,
                f"{name}: the same round, seed and history give the same nodes",
                f"round {number} gave {len(chosen)} nodes and then {len(again)} others",
                "draw with `ctx.generator()`, and keep nothing on self",
            )
            hold(
                dict(history) == before,
                f"{name}: `select` leaves the history alone",
                f"it was changed in round {number}",
                "read `ctx.of(node)` only",
            )
            measured = {node.name: {"loss": 1.0 + node.partition} for node in chosen}
            history = remember(history, number, chosen, measured)
    except UmbelError as error:
        raise AssertionError(f"{name}: {error}") from error


def _is_part(name: str, kind: str, part: object) -> None:
    try:
        check_given(kind, part)
    except UmbelError as error:
        raise AssertionError(f"{name}: {error}") from error


def _copy(slots: Slots) -> Slots:
    return {name: slot.clone() for name, slot in slots.items()}


def _same(one: Slots, other: Slots) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
