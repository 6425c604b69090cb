"""A small federation of real processes, seeded, which remembers something everywhere.

It keeps momentum on the server and a count on the nodes, so that a round that is lost, or done
twice, changes the model; and each node leaves a mark when it begins a round.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.written import HALVES

APP = {
    "task.py": """
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import MetricRecord
from umbel import Federation, FunctionTrainer
from umbel.clients.data.examples import Examples

OPTIONS = {"pause": 0.0, "hang": False, "size": 4}


def data(node, options):
    x = np.random.default_rng(node.partition).normal(size=(20, 4))
    return Examples(x, x @ np.arange(4.0) + node.partition)


def initial(options):
    return {"w": np.zeros(int(options["size"]), np.float32)}


def train(arrays, examples, job):
    options, partition = job.options, job.node["partition-id"]
    (Path(os.environ.get("MARKS", "/nowhere")) / f"{partition}-{job.round}").exists() or mark(
        partition, job.round
    )
    if options["hang"] and partition == 1 and job.round == 2:
        time.sleep(10_000)
    time.sleep(float(options["pause"]))
    before = job.memory.get("steps", MetricRecord({"n": 0}))["n"]
    job.memory["steps"] = MetricRecord({"n": before + 1})
    w = arrays["w"].astype(np.float64)
    for _ in range(5):
        error = examples.x @ w[:4] - examples.y
        w[:4] -= (0.05 + 0.01 * before) * examples.x.T @ error / len(examples.y)
    return {"w": w.astype(np.float32)}, len(examples.y), {"steps": float(before + 1)}


def mark(partition, number):
    folder = os.environ.get("MARKS")
    if folder:
        (Path(folder) / f"{partition}-{number}").touch()


def evaluate(arrays, examples):
    return {"loss": float(np.mean((examples.x @ arrays["w"][:4] - examples.y) ** 2))}


federation = Federation(
    name="small",
    trainer=FunctionTrainer(initial, train, evaluate, OPTIONS),
    data=data,
)
""",
    **HALVES,
}
OPTIONS = (
    'rounds = 10\noptimizer = "fedavgm"\nserver-momentum = 0.5\nround-timeout = 60.0\nseed = 3'
)


def weights(result: dict[str, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = load_file(Path(result["run"]) / "model.safetensors")["w"]
    return found


def lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def wait_for(processes: Any, what: Callable[[], Any], seconds: float = 200) -> Any:
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, {n: processes.log(n)[-3000:] for n in processes.running}
        time.sleep(0.01)
    return value


def start_nodes(processes: Any, *names: str, port: int = 0) -> None:
    processes.invite(*names, port=port)
    for number, name in enumerate(names):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions={len(names)}")


def expected(processes: Any, nodes: int = 2, options: str = "") -> np.ndarray[Any, Any]:
    """The model that the embedded engine ends with."""
    config = ["-c", options] if options else []
    done = processes.umbel(
        "run",
        "app",
        "--nodes",
        str(nodes),
        "--workers",
        "0",
        "--json",
        "--out",
        "embedded",
        *config,
    )
    return weights(
        json.loads(done.stdout.splitlines()[-1]) | {"run": processes.folder / "embedded"}
    )
