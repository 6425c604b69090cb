"""`check_pool`: the laws of `umbel.server.pools.base.Pool`."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from umbel.core.flower import take_identity
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.pools.base import Pool
from umbel.server.pools.here import Here
from umbel.testing.laws import hold

NODES = 7
ROUNDS = 3

_PROJECT = """
[project]
name = "checked"
version = "0.1.0"
[tool.flwr.app]
publisher = "umbel"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
"""

_CLIENT = """
import random

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    asked = dict(message.content["asked"])
    if asked["fail"] == context.node_config["partition-id"]:
        raise ValueError("this node was told to fail")
    visits = context.state.get("visits", ConfigRecord({"count": 0}))
    visits["count"] = visits["count"] + 1
    context.state["visits"] = visits
    drawn = [random.random(), float(np.random.normal()), float(torch.rand(()))]
    values = np.full(50_000, context.node_config["partition-id"], "f4")
    seed = context.run_config["seed"]
    said = ConfigRecord({"drawn": drawn, "visits": visits["count"], "seed": seed})
    return Message(
        RecordDict({"said": said, "big": ArrayRecord({"a": Array(values)})}), reply_to=message
    )
"""


def check_pool(make: Callable[[int], Pool]) -> None:
    """Fail unless a pool keeps its laws.

    Every node answers each message once, with what the app says and nobody else's; states come back
    and go out again; the random numbers that nodes draw are those that they draw without a pool,
    whatever the number of workers; a node that fails costs its own reply; closing twice is
    closing once.

        check_pool(lambda workers: MyPool(workers))

    Args:
        make: gives a new pool with that many workers.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    take_identity(1)
    with tempfile.TemporaryDirectory(prefix="umbel-pool-") as folder:
        app = Path(folder)
        (app / "pyproject.toml").write_text(_PROJECT)
        (app / "client_app.py").write_text(_CLIENT)
        expected = _played(app, Here())
        for workers in (1, 2):
            pool = make(workers)
            name = type(pool).__name__
            hold(
                isinstance(pool, Pool),
                f"{name}: a pool is an `umbel.server.pools.base.Pool`",
                f"it is a {name}",
                "inherit from Pool, or give the executor itself",
            )
            hold(
                pool.slots >= 1,
                f"{name}: a pool takes at least one group",
                f"`slots` is {pool.slots}",
                "leave `slots` as it is in Pool",
            )
            _compare(name, workers, _played(app, pool), expected)
            pool.close()


def _compare(
    name: str,
    workers: int,
    found: Sequence[Mapping[int, Any]],
    expected: Sequence[Mapping[int, Any]],
) -> None:
    for number, (mine, right) in enumerate(zip(found, expected, strict=True), 1):
        hold(
            mine.keys() == right.keys(),
            f"{name}: every node answers each message once",
            f"in round {number} with {workers} workers nodes {sorted(mine)} answered",
            "let the future of a group have one result a task, in their order",
        )
        for node, said in right.items():
            hold(
                mine[node] == said,
                f"{name}: a node says the same on every pool",
                f"in round {number}, {workers} workers, node {node} said {mine[node]}, not {said}",
                "give groups to `run_group` as they are, one at a time in a process",
            )


def _played(app: Path, pool: Pool) -> list[dict[int, Any]]:
    """What each node said, round by round; in the second, node 2 fails."""
    rounds: list[dict[int, Any]] = []
    with EmbeddedGrid(app, NODES, pool=pool, run_config={"seed": 3}) as grid:
        for number in range(1, ROUNDS + 1):
            asked = ConfigRecord({"fail": 2 if number == 2 else -1})
            content = RecordDict({"asked": asked})
            messages = [
                Message(content, node, "train", group_id=str(number))
                for node in grid.get_node_ids()
            ]
            rounds.append({})
            for reply in grid.stream(messages, 300.0):
                node = reply.metadata.src_node_id - FIRST_NODE
                rounds[-1][node] = _said(reply)
        hold(
            len(grid.states.by_node) == NODES,
            f"{type(pool).__name__}: what a node keeps comes back",
            f"{len(grid.states.by_node)} of {NODES} nodes have a state after {ROUNDS} rounds",
            "return what `run_group` returned",
        )
    return rounds


def _said(reply: Message) -> Any:
    if reply.has_error():
        return reply.error.reason
    said: Any = reply.content["said"]
    big: Any = reply.content["big"]
    return {**dict(said), "big": hashlib.sha256(big["a"].numpy().tobytes()).hexdigest()}
