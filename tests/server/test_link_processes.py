"""The link with real processes: trains, survives kills, says what is wrong."""

import json
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

UMBEL = (sys.executable, "-c", "from umbel.commands.cli import main; main()")
FOREIGN = {
    # A Flower app that knows nothing of Umbel, with Flower's own strategy.
    "task.py": "import numpy as np\n\n\ndef first():\n    return [np.zeros((2, 3), np.float32)]\n",
    "server_app.py": """
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import first

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(min_available_nodes=2).start(
        grid=grid, initial_arrays=ArrayRecord(first()), num_rounds=context.run_config["rounds"]
    )
    print("sum is", result.arrays.to_numpy_ndarrays()[0].sum())
""",
    "client_app.py": """
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    before = context.state.get("seen", MetricRecord({"n": 0}))
    context.state["seen"] = MetricRecord({"n": before["n"] + 1})
    arrays = message.content["arrays"].to_numpy_ndarrays()
    part = context.node_config["partition-id"]
    content = RecordDict({
        "arrays": ArrayRecord([arrays[0] + part]),
        "metrics": MetricRecord({"num-examples": 1, "seen": before["n"] + 1}),
    })
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
""",
}


def test_an_unmodified_flower_app_runs_under_watch_and_shuts_down(processes: Any) -> None:
    processes.write_app(FOREIGN, "rounds = 3")
    processes.invite("n1", "n2")
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        health, metrics = (f"127.0.0.1:{each.getsockname()[1]}" for each in (a, b))
    processes.server("--health", health, "--metrics", metrics, "--serve")
    for number, name in enumerate(("n1", "n2")):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    wait_for(processes, processes.result)
    result = processes.result()
    assert result["rounds"] == 3 and result["metrics"]["loss"] == 0.5
    rounds = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train"]["seen"] for line in rounds] == [1, 2, 3]
    assert "sum is 9.0" in processes.log("server")

    with grpc.insecure_channel(health) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    assert "umbel_nodes_connected 2.0" in text and "umbel_replies_total 12.0" in text

    shown = json.loads(processes.umbel("status", "--state", "state", "--json").stdout)
    assert shown["phase"] == "finished" and shown["epsilon"] is None
    assert {(node["name"], node["state"]) for node in shown["nodes"]} == {
        ("n1", "connected"),
        ("n2", "connected"),
    }
    text = processes.umbel("status", "--state", "state").stdout
    assert "round     3 of" in text and "s each" in text and "  n1    connected  now" in text

    # A second run by submission; then SIGTERM: both kinds of process end by themselves.
    processes.umbel("submit", "--state", "state", "-c", "rounds=1")
    wait_for(processes, lambda: processes.result()["rounds"] == 1)
    for name in ("n1", "server"):
        processes.running[name].terminate()
        assert processes.wait(name) == 0
    shown = json.loads(processes.umbel("status", "--state", "state", "--json").stdout)
    assert shown["phase"] == "stopped"
    states = {node["name"]: node["state"] for node in shown["nodes"]}
    assert states == {"n1": "away", "n2": "waiting"}, "one had left before the server did"
    modes = {path.stat().st_mode & 0o077 for path in processes.folder.rglob("*.pem")}
    assert modes == {0}


@pytest.mark.slow
def test_a_killed_server_says_that_an_app_with_its_own_rounds_begins_again(processes: Any) -> None:
    processes.write_app(FOREIGN, "rounds = 400")
    processes.invite("n1", "n2")
    words = ("--health", "127.0.0.1:0")
    processes.server(*words)
    for number, name in enumerate(("n1", "n2")):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    status = ("status", "--state", "state", "--json")
    wait_for(processes, lambda: json.loads(processes.umbel(*status).stdout)["round"] > 3)
    processes.kill("server")
    processes.server(*words)
    assert processes.wait("server") == 0, processes.log("server")
    assert "started again, it begins at round 1" in processes.log("server")
    rounds = (Path(processes.result()["run"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train"]["seen"] for line in rounds] == [*range(1, 401)]


def wait_for(processes: Any, what: Any) -> None:
    """Until it is so, or a process has died."""
    until = time.monotonic() + 150
    while not what():
        for name, process in processes.running.items():
            assert process.poll() in (None, 0), processes.log(name)
        assert time.monotonic() < until, processes.log("server")
        time.sleep(0.02)


def test_the_server_refuses_what_it_cannot_use(processes: Any, tmp_path: Path) -> None:
    processes.write_app(FOREIGN, "rounds = 1")
    processes.invite("n1")

    def refused(*words: str) -> str:
        done = processes.umbel(*words, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return str(done.stderr.splitlines()[-1])

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused("server", "app", "--state", "state", "--listen", address)
    assert "port is in use" in said
    assert "is no address" in refused("server", "app", "--state", "state", "--listen", "nowhere")
    (processes.state / "server.pem").chmod(0o644)
    listen = ("--listen", "127.0.0.1:0")
    assert "chmod 600" in refused("server", "app", "--state", "state", *listen)
    (processes.state / "server.pem").chmod(0o600)
    assert "--join" in refused("client", "app", "--state", "new")
    shutil.copy(processes.folder / "n1.join", tmp_path / "open.join")
    (tmp_path / "open.join").chmod(0o644)
    join = ("--join", str(tmp_path / "open.join"))
    assert "chmod 600" in refused("client", "app", "--state", "new", *join)
    database = processes.state / "umbel.sqlite"
    database.write_bytes(b"x" * 9000)
    assert "is damaged" in refused("server", "app", "--state", "state", *listen)


def test_two_processes_on_one_state_folder_are_told_apart(processes: Any) -> None:
    processes.write_app(FOREIGN, "rounds = 1")
    processes.invite("n1")
    processes.server()
    wait_for(processes, lambda: processes.status())
    second = processes.umbel(
        "server", "app", "--state", "state", "--listen", "127.0.0.1:0", check=False
    )
    assert second.returncode == 2 and "another server runs on state" in second.stderr
    processes.node("n1", "--node-config", "partition-id=0")
    wait_for(processes, lambda: (processes.folder / "n1" / "identity.pem").exists())
    twin = processes.umbel("client", "--state", "n1", check=False)
    assert twin.returncode == 2 and "another process uses n1" in twin.stderr


def test_an_app_that_differs_is_refused_by_the_node(processes: Any) -> None:
    processes.write_app(FOREIGN, "rounds = 1")
    processes.invite("n1")
    processes.server()
    shutil.copytree(processes.app, processes.folder / "changed")
    with (processes.folder / "changed" / "client_app.py").open("a") as file:
        file.write("# one line more\n")
    done = processes.umbel("client", "changed", "--join", "n1.join", "--state", "n1", check=False)
    assert done.returncode == 2 and "differs from this node's" in done.stderr
    processes.start("n1", "client", "--state", "n1", "--any-app")
    wait_for(processes, lambda: "connected to" in processes.log("n1"))


def test_a_full_disk_gives_one_sentence(processes: Any) -> None:
    """The limit on file sizes stands for the full disk: writes fail in the same places."""
    processes.write_app(FOREIGN, "rounds = 1")
    processes.invite("n1")

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = subprocess.run(
        [*UMBEL, "nodes", "add", "n2", "--state", "state"],
        capture_output=True,
        text=True,
        cwd=processes.folder,
        preexec_fn=small,
        timeout=60,
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "cannot be" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
