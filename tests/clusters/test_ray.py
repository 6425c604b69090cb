"""The pool on Ray, with a cluster that `ray start --head` begins: `make test-clusters`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clusters.conftest import OPTIONS
from tests.clusters.until import START_S, until
from tests.fakes import APPS, WarmCommand

pytestmark = pytest.mark.clusters
pytest.importorskip("ray")

WORKERS = ("ray::IDLE", "ray::run_shipped")
"""What Ray calls them; its own agents are called by other names."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A cluster of this machine with two processors."""

    def __init__(self, folder: Path) -> None:
        self.port, self.client = free_port(), free_port()
        self.log = folder / "ray.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray's sockets have long names, for which tests' own folders are too deep.
        self.home = tempfile.TemporaryDirectory(prefix="ray")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("ray"),
                    *("start", "--head", "--block", "--node-ip-address=127.0.0.1"),
                    *(f"--port={self.port}", f"--ray-client-server-port={self.client}"),
                    *("--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"),
                    *(f"--object-store-memory={100 << 20}", f"--temp-dir={self.home.name}"),
                ],
                stdout=log,
                stderr=log,
                env=environment,
            )
        until(lambda: "Ray runtime started" in self.log.read_text(encoding="utf-8"))

    def workers(self) -> list[psutil.Process]:
        """The processes that have run tasks."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.cmdline()[:1] and child.cmdline()[0].startswith(WORKERS):
                    found.append(child)
        return found

    def close(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()
        self.process.wait()
        self.home.cleanup()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    made = Head(tmp_path_factory.mktemp("ray"))
    try:
        yield made
    finally:
        made.close()


def run(
    head: Head, folder: Path, *arguments: Any, port: int = 0, during: Callable[[], None] = print
) -> tuple[int, str]:
    """`umbel run ... --pool ray` as a process of one of the cluster's machines."""
    command = [Path(sys.executable).with_name("umbel"), "run", *arguments, "--pool", "ray"]
    address = {"RAY_ADDRESS": f"127.0.0.1:{port or head.port}", "OMP_NUM_THREADS": "1"}
    log = folder / "stderr.txt"
    with log.open("wb") as err:
        process = subprocess.Popen(
            [*map(str, (*command, *OPTIONS))],
            env=os.environ | address,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
    try:
        during()
        process.wait(START_S)
    finally:
        process.kill()
    return process.returncode, log.read_text(encoding="utf-8")


def test_the_same_model_on_ray_bit_for_bit(head: Head, model: bytes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, said = run(head, tmp_path, APPS / "slope", "--out", out)
    assert status == 0, said
    assert (out / "model.safetensors").read_bytes() == model


def test_workers_are_killed_and_their_tasks_run_elsewhere(
    head: Head, model: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed: list[int] = []

    def text() -> str:
        file = out / "metrics.jsonl"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def disturb() -> None:
        until(lambda: '"round": 1' in text())
        for worker in head.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                killed.append(worker.pid)

    status, said = run(head, tmp_path, APPS / "slope", "--out", out, during=disturb)
    assert status == 0, said
    assert killed
    assert (out / "model.safetensors").read_bytes() == model
    assert '"failed": [{' not in text()


def test_what_cannot_run_there_is_refused(head: Head, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for file in (APPS / "slope").glob("*.*"):
        (app / file.name).write_bytes(file.read_bytes())
    text = (app / "client_app.py").read_text(encoding="utf-8")
    (app / "client_app.py").write_text("import nowhere\n" + text, encoding="utf-8")
    status, said = run(head, tmp_path, app, "--out", tmp_path / "one")
    assert status == 2 and "No module named 'nowhere'" in said, said
    assert "Traceback" not in said
    status, said = run(head, tmp_path, APPS / "slope", "--out", tmp_path / "two", port=free_port())
    assert status == 2 and "there is no Ray cluster" in said, said
    assert "Traceback" not in said


def test_the_same_model_from_elsewhere(
    umbel: WarmCommand, head: Head, model: bytes, tmp_path: Path
) -> None:
    """Through Ray's server for clients, which takes half a minute on a crowded machine."""
    out = tmp_path / "run"
    where = ("--pool", f"ray://127.0.0.1:{head.client}", "--out", out)
    done = umbel.command("run", APPS / "slope", *where, *OPTIONS, cwd=tmp_path)
    assert done.status == 0, done.err
    assert (out / "model.safetensors").read_bytes() == model
