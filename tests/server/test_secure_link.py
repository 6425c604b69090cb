"""A secure sum between real processes: enrolled identities, and the model of one machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from umbel.run import run
from umbel.server.progress import SilentProgress

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
    "server_app.py": "from task import federation\n\napp = federation.server_app()\n",
    "client_app.py": "from task import federation\n\napp = federation.client_app()\n",
}


@pytest.mark.slow
def test_three_enrolled_nodes_sum_in_secret_and_get_the_model_of_one_machine(
    processes: Any,
) -> None:
    processes.write_app(APP, "secure = true\nrounds = 3\nfederated-every = -1")
    names = ("clinic-a", "clinic-b", "clinic-c")
    processes.invite(*names)
    processes.server()
    for number, name in enumerate(names):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions=3")
    assert processes.wait("server", 180) == 0, processes.log("server")
    result = processes.result()
    text = (Path(result["run"]) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    secure = [line["secure"] for line in lines if line["round"]]
    assert [one["nodes"] for one in secure] == [3, 3, 3]
    assert {one["identities"] for one in secure} == {"authority"}
    over_link = load_file(Path(result["run"]) / "model.safetensors")
    out = processes.folder / "embedded"
    run(processes.app, nodes=3, workers=0, out=out, progress=SilentProgress())
    here = load_file(out / "model.safetensors")
    assert over_link["w"].tobytes() == here["w"].tobytes()
    for name in names:
        state = (processes.folder / name).rglob("memory*")
        assert not any(b"masking" in path.read_bytes() for path in state if path.is_file())
