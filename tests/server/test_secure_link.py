"""A secure sum between real processes and on Flower's own engine: the model of one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.written import HALVES
from umbel.running import run
from umbel.server.output.progress import SilentProgress

APP = {
    "task.py": """
import numpy as np

from umbel import Federation, FunctionTrainer


def train(arrays, examples, job):
    step = np.random.default_rng([examples, job.round]).normal(0, 1, 10)
    return {"w": arrays["w"] + step}, int(examples), {"loss": 0.5}


def initial(options):
    return {"w": np.zeros(10)}


federation = Federation(FunctionTrainer(initial, train), lambda node, _: node.partition + 1)
""",
    **HALVES,
}


def model_of_one_machine(processes: Any) -> bytes:
    out = processes.folder / "embedded"
    run(processes.app, nodes=3, workers=0, out=out, progress=SilentProgress())
    return bytes(load_file(out / "model.safetensors")["w"].tobytes())


def secure_lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run"]) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["secure"] for line in lines if line["round"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["link", "flower"])
def test_three_enrolled_nodes_sum_in_secret_and_get_the_model_of_one_machine(
    processes: Any, engine: str
) -> None:
    """The model of the embedded engine, bit for bit, which is that of a plain sum in integers.

    Flower gives each message of a SuperNode a process of its own; there a node's keys are those
    that it makes itself, and nobody but the first meeting vouches for them.
    """
    processes.write_app(APP, "secure = true\nrounds = 3\nclient-eval-every = -1")
    names = ("clinic-a", "clinic-b", "clinic-c")
    processes.invite(*names)
    processes.server("--engine", engine)
    for number, name in enumerate(names):
        words = f"partition-id={number} num-partitions=3"
        processes.node(name, "--engine", engine, "--node-config", words)
    assert processes.wait("server", 1500) == 0, processes.log("server")
    result = processes.result()
    secure = secure_lines(result)
    assert [one["nodes"] for one in secure] == [3, 3, 3]
    vouched = "authority" if engine == "link" else "first-use"
    assert {one["identities"] for one in secure} == {vouched}
    over_network = load_file(Path(result["run"]) / "model.safetensors")
    assert over_network["w"].tobytes() == model_of_one_machine(processes)
    for name in names:
        state = (processes.folder / name).rglob("memory*")
        assert not any(b"masking" in path.read_bytes() for path in state if path.is_file())


FLOWER = """
import functools
import sys
from pathlib import Path

from flwr.simulation import run_simulation

import umbel.federation as module
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.rounds import Rounds
from umbel.server.output.rundir import RunDirectory
from task import federation

module.roster = functools.partial(module.roster, timeout=240)  # Ray may start slowly
resources = {"client_resources": {"num_cpus": 2, "num_gpus": 0.0}}
run_simulation(federation.server_app(), federation.client_app(), 3, backend_config=resources)
options = federation.complete({})
grid = EmbeddedGrid(federation.client_app(), 3, run_config=options)
run = RunDirectory.create(None, "here", {}, out=Path("here"))
Rounds(federation.job(options), grid, grid.roster(), run, SilentProgress()).fit()
"""


@pytest.mark.slow
def test_flowers_own_simulation_gives_the_same_model(tmp_path: Path) -> None:
    """S11: Flower's SecAgg+ does not run under its Message API; this does, bit for bit."""
    task = APP["task.py"].replace(
        "node.partition + 1)",
        'node.partition + 1,\n    options={"secure": True, "rounds": 2, "client-eval-every": -1})',
    )
    (tmp_path / "task.py").write_text(task)
    (tmp_path / "both.py").write_text(FLOWER)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),  # for the actors of Ray
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "both.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (there,) = (tmp_path / "runs").glob("*/model.safetensors")
    here = tmp_path / "here" / "model.safetensors"
    assert load_file(there)["w"].tobytes() == load_file(here)["w"].tobytes()
    lines = (there.parent / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["secure"]["nodes"] == 3
