"""A method whose nodes remember something, on real processes: kills, and every engine.

SCAFFOLD's control variates are on the server and on every node, so a round that is lost, or done
twice, changes the model.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.server.small_federation import lines, start_nodes, wait_for
from tests.written import HALVES

APP = {
    "task.py": """
import torch
from umbel import Examples, Federation, TorchTrainer


def data(node, options):
    generator = torch.Generator().manual_seed(node.partition)
    x = torch.randn(30, 4, generator=generator) * (1 + node.partition)
    return Examples(x, x.sum(1, keepdim=True) * node.partition)


federation = Federation(
    name="drift",
    trainer=TorchTrainer(lambda: torch.nn.Linear(4, 1), loss="mse", batch_size=10),
    data=data,
)
""",
    **HALVES,
}
OPTIONS = 'rounds = 40\nmethod = "scaffold"\nlearning-rate = 0.02\nround-timeout = 60.0\nseed = 3'


def model(folder: Path) -> dict[str, Any]:
    return {name: t.numpy().tobytes() for name, t in load_file(folder).items()}


def expected(processes: Any, options: str = "") -> dict[str, Any]:
    """The embedded engine's model."""
    config = ["-c", options] if options else []
    words = ("--nodes", "2", "--workers", "0", "--out", "embedded")
    processes.umbel("run", "app", *words, *config)
    return model(processes.folder / "embedded" / "model.safetensors")


def test_a_killed_server_and_a_killed_node_lose_no_control_variate(processes: Any) -> None:
    processes.write_app(APP, OPTIONS)
    wanted = expected(processes)
    start_nodes(processes, "n1", "n2")
    processes.server()
    state = processes.folder / "state"

    def written() -> int:
        return max(
            (len(p.read_text().splitlines()) for p in state.rglob("metrics.jsonl")), default=0
        )

    wait_for(processes, lambda: written() > 4)
    processes.kill("n2")
    processes.node("n2")
    wait_for(processes, lambda: written() > 10)
    processes.kill("server")
    assert not processes.result(), "it was killed on the way"
    processes.server()
    assert processes.wait("server") == 0, processes.log("server")
    result = processes.result()
    assert model(Path(result["run"]) / "model.safetensors") == wanted
    assert [line["round"] for line in lines(result) if line["round"]] == [*range(1, 41)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_on_flowers_engine_remember_as_well(processes: Any) -> None:
    processes.write_app(APP, OPTIONS)
    rounds = "rounds=3 min-replies=2 round-timeout=1200"
    wanted = expected(processes, rounds)
    processes.invite("n1", "n2")
    processes.server("--engine", "flower", "-c", rounds)
    for number, name in enumerate(("n1", "n2")):
        words = ("--node-config", f"partition-id={number} num-partitions=2")
        processes.node(name, "--engine", "flower", *words)
    assert processes.wait("server", seconds=1500) == 0, processes.log("server")
    assert model(Path(processes.result()["run"]) / "model.safetensors") == wanted
