"""Where a run stands, and how that survives a kill.

    checkpoint/position.safetensors   the coordinator: model, optimiser, layers, counters
    checkpoint/nodes.sqlite           states of virtual nodes, by node and round
    checkpoint/begun                  the round that was begun last, where nodes answer it once

The position is replaced in one step and decides which round the checkpoint is of. Node states
are kept in two versions, so that those of the decided round are there whenever a kill comes.
"""

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from umbel.core.errors import ConfigError, RunError
from umbel.strategies.optimizers import Slots
from umbel.strategies.samplers import NodeHistory
from umbel.strategies.stack import States

_FILE = "position.safetensors"
_NODES = "nodes.sqlite"
_BEGUN = "begun"


@dataclass(frozen=True)
class Best:
    """The best model so far: the metric's value, its round, and the model."""

    value: float
    round: int
    parameters: Tensor
    buffers: Tensor


@dataclass(frozen=True)
class Position:
    """Everything that the next round depends on.

    Attributes:
        round: the last finished one; 0 before the first.
        parameters: the model, flat.
        buffers: the averaged buffers, flat; empty where they stay on the nodes.
        slots: of the server optimiser.
        layers: one state a layer of the stack.
        best: the best model, where the run keeps track of it.
        evaluations_since_best: how many there were.
        average: mean of the models since `average-from`; `averaged` says of how many.
        failed_rounds: rounds in a row without enough replies.
        public: what private means have released, by name; `answered` says which were asked.
        history: what nodes did, by name, where the sampler looks at that.
    """

    round: int
    parameters: Tensor
    buffers: Tensor
    slots: Slots = field(default_factory=dict)
    layers: States = ()
    best: Best | None = None
    evaluations_since_best: int = 0
    average: Tensor | None = None
    averaged: int = 0
    failed_rounds: int = 0
    public: Mapping[str, Tensor] = field(default_factory=dict)
    answered: tuple[str, ...] = ()
    history: Mapping[str, NodeHistory] = field(default_factory=dict)

    @property
    def delivered(self) -> Tensor:
        """The model that the run would end with now, flat."""
        return self.parameters if self.average is None else self.average

    def replace(self, **changes: Any) -> "Position":
        """This position with some of it replaced."""
        return replace(self, **changes)


def save(directory: Path, position: Position, nodes: Mapping[int, bytes]) -> None:
    """Save a position, and the node states that changed since the last one.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    tensors = {"parameters": position.parameters, "buffers": position.buffers}
    tensors |= {f"slot.{name}": tensor for name, tensor in position.slots.items()}
    if position.best is not None:
        tensors["best.parameters"] = position.best.parameters
        tensors["best.buffers"] = position.best.buffers
    if position.average is not None:
        tensors["average"] = position.average
    tensors |= {f"public.{name}": tensor for name, tensor in position.public.items()}
    numbers: dict[str, Any] = {
        "round": position.round,
        "stale": position.evaluations_since_best,
        "averaged": position.averaged,
        "abandoned": position.failed_rounds,
        "answered": position.answered,
        "best": None if position.best is None else [position.best.value, position.best.round],
        "layers": [],
    }
    if position.history:
        numbers["history"] = {
            name: [node.asked, node.last, node.metrics] for name, node in position.history.items()
        }
    for i, state in enumerate(position.layers):
        numbers["layers"].append(_without_tensors(state, f"layer.{i}.", tensors))
    file = directory / _FILE
    fresh = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if nodes or (directory / _NODES).exists():
            _save_nodes(directory / _NODES, position.round, nodes)
        save_file(_apart(tensors), fresh, metadata={"umbel": json.dumps(numbers)})
        fresh.replace(file)
    except (OSError, SafetensorError, sqlite3.Error) as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise RunError(
            f"the checkpoint in {directory} cannot be written ({error}); make room and continue "
            "the run: `umbel run` with --resume, `umbel server` by the same command again"
        ) from error


def load(directory: Path) -> Position | None:
    """The saved position, or None where there is none.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    file = directory / _FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            numbers = json.loads(opened.metadata()["umbel"])
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the checkpoint {file} is damaged ({error}); start a new run") from error
    best = None
    if numbers["best"] is not None:
        value, at_round = numbers["best"]
        best = Best(value, at_round, tensors["best.parameters"], tensors["best.buffers"])
    return Position(
        round=numbers["round"],
        parameters=tensors["parameters"],
        buffers=tensors["buffers"],
        slots={k.removeprefix("slot."): v for k, v in tensors.items() if k.startswith("slot.")},
        layers=tuple(
            _with_tensors(state, f"layer.{i}.", tensors)
            for i, state in enumerate(numbers["layers"])
        ),
        best=best,
        evaluations_since_best=numbers["stale"],
        average=tensors.get("average"),
        averaged=numbers["averaged"],
        failed_rounds=numbers["abandoned"],
        public={
            name.removeprefix("public."): tensor
            for name, tensor in tensors.items()
            if name.startswith("public.")
        },
        answered=tuple(numbers["answered"]),
        history={name: NodeHistory(*said) for name, said in numbers.get("history", {}).items()},
    )


def begin(directory: Path, number: int) -> None:
    """Write down that a round is about to begin, which nodes will not begin again.

    In place and without waiting for the disk: what a killed process wrote is there, and should a
    machine that lost its power have forgotten it, nodes refuse the round and the next one is begun.

    Raises:
        RunError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / _BEGUN, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(handle, f"{number:020d}\n".encode(), 0)
        finally:
            os.close(handle)
    except OSError as error:
        raise RunError(f"the checkpoint in {directory} cannot be written ({error})") from error


def begun(directory: Path) -> int:
    """The round that was begun last, as `begin` wrote it down; 0 where it never did.

    Raises:
        ConfigError: the file is damaged.
    """
    file = directory / _BEGUN
    if not file.exists():
        return 0
    try:
        return int(file.read_text() or 0)  # empty: made, and not yet written
    except (OSError, ValueError) as error:
        raise ConfigError(f"the checkpoint {file} is damaged ({error}); start a new run") from error


def load_nodes(directory: Path, number: int) -> dict[int, bytes]:
    """The states of virtual nodes as they were at the end of round `number`.

    Later ones, of a round that did not finish, are removed.
    """
    file = directory / _NODES
    if not file.exists():
        return {}
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM state WHERE round > ?", (number,))
        rows = database.execute(
            "SELECT node, record FROM state AS s WHERE round = "
            "(SELECT MAX(round) FROM state WHERE node = s.node)"
        ).fetchall()
    return dict(rows)


def _save_nodes(file: Path, number: int, nodes: Mapping[int, bytes]) -> None:
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS state"
                " (node INTEGER, round INTEGER, record BLOB, PRIMARY KEY (node, round))"
            )
            # what this round replaces is needed until the position of this round is in place;
            # what the round before replaced no longer is
            database.execute(
                "DELETE FROM state WHERE EXISTS (SELECT 1 FROM state AS later"
                " WHERE later.node = state.node AND later.round > state.round"
                " AND later.round < ?)",
                (number,),
            )
            database.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?)",
                [(node, number, record) for node, record in nodes.items()],
            )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own: the latest model may be the best one too.

    The file format refuses two names for one memory.
    """
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in taken else tensor.contiguous()
        taken.add(memory)
    return apart


def _without_tensors(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A layer's state as JSON, its tensors put aside by name."""
    if state is None:
        return None
    plain = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        else:
            plain[name] = value
    return plain


def _with_tensors(state: Any, prefix: str, tensors: Mapping[str, Tensor]) -> Any:
    if state is None:
        return None
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {**state, **own}


def no_buffers() -> Tensor:
    """The buffers of a run that averages none."""
    return torch.zeros(0)
