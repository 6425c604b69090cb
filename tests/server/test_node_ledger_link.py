"""Ledgers of real node processes: they outlast runs, coordinators and kill -9."""

import json
from typing import Any

import pytest

from tests.written import HALVES

APP = {
    "task.py": """
import numpy as np
from torch import nn

from umbel import Federation, PrivateSgd, TorchTrainer
from umbel.clients.data.examples import Examples


def linear():
    return nn.Linear(4, 2)


def data(node, options):
    x = np.random.default_rng(node.partition).normal(size=(40, 4)).astype(np.float32)
    return Examples(x, (x[:, 0] > 0).astype(np.int64))


trainer = PrivateSgd(trainer=TorchTrainer(linear), example_epsilon=0.5)
federation = Federation(trainer, data)
""",
    **HALVES,
}


@pytest.mark.slow
def test_a_second_run_finds_what_the_first_has_left_of_the_nodes_budgets(processes: Any) -> None:
    processes.write_app(APP, "rounds = 3\nbatch-size = 10\nexample-epsilon = 0.5")
    processes.invite("ada", "bob")
    words = {name: f"partition-id={at} num-partitions=2" for at, name in enumerate(("ada", "bob"))}
    processes.server("--nodes", "2")
    for name in words:
        processes.node(name, "--node-config", words[name])
    assert processes.wait("server") == 0, processes.log("server")

    def budget(name: str) -> dict[str, Any]:
        said = processes.umbel("client", "budget", "--state", name, "--json").stdout
        rows = json.loads(said.splitlines()[-1])["budget"]
        found: dict[str, Any] = next(row for row in rows if row["scope"] == "data")
        return found

    first = {name: budget(name) for name in words}
    for row in first.values():
        assert (row["unit"], row["participations"], row["epsilon_limit"]) == ("record", 3, 0.5)
        assert 0.45 < row["epsilon"] <= 0.5
        assert row["last_coordinator"] == f"127.0.0.1:{processes.port}"
    # The coordinator asks for more, in a run of its own, after the nodes were killed.
    processes.kill("ada")
    processes.node("ada")
    processes.server("--fresh", "--nodes", "2", "-c", "example-epsilon=8 rounds=1")
    processes.wait("server")
    assert "takes no further part" in processes.log("server")
    assert {name: budget(name) for name in words} == first
