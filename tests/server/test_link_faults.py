"""Faults that a run on the link survives, with real processes and real kills.

Every run here is seeded, keeps momentum on the server and a count on the nodes, and is compared
with the same run on the embedded engine: nothing may be lost and nothing done twice.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

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
    "server_app.py": "from task import federation\n\napp = federation.server_app()\n",
    "client_app.py": "from task import federation\n\napp = federation.client_app()\n",
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


def wait_for(processes: Any, what: Callable[[], Any], seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, {n: processes.log(n)[-3000:] for n in processes.running}
        time.sleep(0.01)
    return value


@pytest.fixture
def federation(processes: Any) -> Any:
    """Two nodes that are enrolled, and an app that leaves a mark when a node begins a round."""
    processes.write_app(APP, OPTIONS)
    processes.marks = processes.folder / "marks"
    processes.marks.mkdir()
    processes._environment["MARKS"] = str(processes.marks)
    return processes


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


def test_the_same_model_as_on_the_embedded_engine_with_half_the_nodes_killed(
    federation: Any,
) -> None:
    start_nodes(federation, "n1", "n2")
    federation.server("-c", "pause=0.2")
    for number in (2, 5):
        wait_for(federation, (federation.marks / f"1-{number}").exists)
        federation.kill("n2")  # in the middle of training, with its app's process
        federation.node("n2")
    assert federation.wait("server") == 0
    result = federation.result()
    assert np.array_equal(weights(result), expected(federation))
    assert [line["clients"] for line in lines(result) if line["round"]] == [2] * 10
    assert [line["train"]["steps"] for line in lines(result) if line["round"]] == [*range(1, 11)]


def kill_and_continue(federation: Any, at: Callable[[], Any], *words: str) -> dict[str, Any]:
    """A run whose server is killed at an instant, and started again."""
    (federation.folder / "server.log").write_text("")
    federation.server("-c", "pause=0.02", "--fresh", *words)
    at()
    federation.kill("server")
    if not federation.result():
        federation.server("-c", "pause=0.02")
        assert federation.wait("server") == 0, federation.log("server")
    return dict(federation.result())


def test_a_killed_server_continues_its_run(federation: Any) -> None:
    start_nodes(federation, "n1", "n2")
    model = expected(federation)

    def in_round_six() -> None:
        wait_for(federation, (federation.marks / "0-6").exists)

    result = kill_and_continue(federation, in_round_six)
    assert np.array_equal(weights(result), model)
    assert [line["round"] for line in lines(result) if line["round"]] == [*range(1, 11)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_killed_at_twenty_random_instants_ends_with_the_same_model(
    federation: Any,
) -> None:
    start_nodes(federation, "n1", "n2")
    model = expected(federation)
    draw = random.Random(20)
    began = time.monotonic()
    kill_and_continue(federation, lambda: federation.wait("server"))
    whole = time.monotonic() - began
    for _ in range(20):
        instant = draw.uniform(0.0, whole * 1.1)

        def later(instant: float = instant) -> None:
            try:
                federation.running["server"].wait(instant)
            except subprocess.TimeoutExpired:
                return

        assert np.array_equal(weights(kill_and_continue(federation, later)), model), instant


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_federation_moves_to_flowers_engine_and_back(federation: Any) -> None:
    """No node enrols twice, and both engines end with the model of the embedded one."""
    model = expected(federation, options="rounds=2")
    start_nodes(federation, "n1", "n2")
    for engine in ("link", "flower", "link"):
        federation.server(
            "-c", "rounds=2 min-replies=2", "--engine", engine
        )  # one is not the app's
        assert federation.wait("server", seconds=900) == 0, federation.log("server")
        result = federation.result()
        assert result["stopped"] == "rounds" and ("flower_run" in result) == (engine == "flower")
        assert np.array_equal(weights(result), model), engine
        for name in ("n1", "n2"):
            federation.running[name].terminate()
            assert federation.wait(name) == 0
            federation.node(name, *(["--engine", "flower"] if engine == "link" else []))


def test_a_trainer_that_hangs_is_stopped_and_its_node_stays(federation: Any) -> None:
    start_nodes(federation, "n1", "n2")
    federation.server("-c", "hang=true round-timeout=5.0 rounds=9 min-replies=1")
    assert federation.wait("server") == 0
    rounds = [line for line in lines(federation.result()) if line["round"]]
    clients = [line["clients"] for line in rounds]
    assert clients[:2] == [2, 1] and clients[-1] == 2, clients
    assert "was stopped" in federation.log("n2")
    assert "not waited for any longer: n2" in federation.log("server")


class Proxy:
    """A TCP proxy that cuts connections when so many bytes have passed."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.limits: dict[str, int] = {}
        self.cuts: list[str] = []
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                shut(near)
                continue
            self._sockets.append(far)
            self._start(self._pass, "up", near, far)
            self._start(self._pass, "down", far, near)

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if passed > self.limits.get(way, passed):
                    del self.limits[way]
                    self.cuts.append(way)
                    break
                sink.sendall(data)
        shut(source)
        shut(sink)

    def close(self) -> None:
        for each in self._sockets:
            shut(each)
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()


def shut(each: socket.socket) -> None:
    """Shut both ways, so that the other thread and both ends notice."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def test_a_connection_cut_in_the_middle_of_a_transfer_costs_nothing(federation: Any) -> None:
    options = "size=1000000 rounds=4"
    proxy = Proxy(federation.port)
    try:
        federation.invite("n1", port=proxy.port)
        federation.invite("n2")
        proxy.limits = {"down": 6_000_000}  # in the middle of the second model
        for number, name in enumerate(("n1", "n2")):
            federation.node(name, "--node-config", f"partition-id={number} num-partitions=2")
        federation.server("-c", options)
        wait_for(federation, lambda: proxy.cuts == ["down"])
        proxy.limits = {"up": 3_000_000}  # in the middle of the next reply
        assert federation.wait("server") == 0
        assert proxy.cuts == ["down", "up"]
    finally:
        proxy.close()
    result = federation.result()
    assert np.array_equal(weights(result), expected(federation, options=options))
    assert [line["clients"] for line in lines(result) if line["round"]] == [2] * 4


SKEW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *tv, void *tz) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    tv->tv_sec = now.tv_sec;
    tv->tv_usec = now.tv_nsec / 1000;
    return 0;
}
int clock_gettime(clockid_t id, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, ts);
    if (id == CLOCK_REALTIME) ts->tv_sec += SECONDS;
    return result;
}
"""


def test_nodes_whose_clocks_are_an_hour_off_take_part(federation: Any) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to shift the clock of a process")
    federation.invite("n1", "n2")
    for number, (name, seconds) in enumerate((("n1", 3600), ("n2", -3600))):
        source, library = federation.folder / f"{name}.c", federation.folder / f"{name}.so"
        source.write_text(SKEW)
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-DSECONDS={seconds}", "-o", library, source, "-ldl"],
            check=True,
        )
        federation._environment["LD_PRELOAD"] = str(library)
        federation.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    del federation._environment["LD_PRELOAD"]
    federation.server()
    assert federation.wait("server") == 0
    assert np.array_equal(weights(federation.result()), expected(federation))
    assert os.environ.get("LD_PRELOAD") is None
