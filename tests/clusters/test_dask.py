"""The pool on Dask, with a real scheduler and real workers: `make test-clusters`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.clusters.conftest import OPTIONS
from tests.clusters.until import until
from tests.fakes import APPS, WarmCommand
from umbel.core.errors import ConfigError

pytestmark = pytest.mark.clusters
distributed = pytest.importorskip("distributed")


class Cluster:
    """A scheduler and workers of this machine, as their own commands start them."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.folder = folder
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self.protocol = "tls" if environment else "tcp"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.begin_scheduler()

    def begin_scheduler(self) -> subprocess.Popen[bytes]:
        arguments = ["--host", f"{self.protocol}://127.0.0.1", "--port", str(self.port)]
        self.scheduler = self._begin("scheduler", *arguments, "--no-dashboard")
        until(lambda: self._listens())
        return self.scheduler

    def begin_worker(self) -> subprocess.Popen[bytes]:
        url = f"{self.protocol}://{self.address}"
        arguments = ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--host", "127.0.0.1"]
        return self._begin("worker", url, *arguments, "--local-directory", str(self.folder))

    def _begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]]
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )
        self.processes.append(process)
        return process

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        for _ in range(2):
            made.begin_worker()
        yield made
    finally:
        made.close()


def test_the_same_model_on_dask_bit_for_bit(
    umbel: WarmCommand, cluster: Cluster, model: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pool = f"dask://{cluster.address}"
    done = umbel.command(
        "run", APPS / "slope", "--pool", pool, "--out", out, *OPTIONS, cwd=tmp_path
    )
    assert done.status == 0, done.err
    assert (out / "model.safetensors").read_bytes() == model


def test_a_worker_is_killed_and_another_joins(
    umbel: WarmCommand, cluster: Cluster, model: bytes, tmp_path: Path
) -> None:
    """Its tasks run elsewhere: no node fails, and the model is the same."""
    out = tmp_path / "run"
    pool = f"dask://{cluster.address}"

    def disturb(pid: int) -> None:
        del pid
        until(lambda: (out / "metrics.jsonl").exists() and '"round": 1' in _text(out))
        worker = cluster.begin_worker()
        cluster.processes[1].send_signal(signal.SIGKILL)
        assert worker.poll() is None

    more = ("-c", "rounds=3", "--nodes", "6")
    done = umbel.command(
        "run",
        APPS / "slope",
        "--pool",
        pool,
        "--out",
        out,
        *more,
        cwd=tmp_path,
        during=disturb,
    )
    assert done.status == 0, done.err
    assert (out / "model.safetensors").read_bytes() == model
    assert '"failed": [{' not in _text(out)


def _text(out: Path) -> str:
    return (out / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_scheduler_is_killed_and_the_run_goes_on_later(
    umbel: WarmCommand, model: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    cluster = Cluster(tmp_path)
    try:
        cluster.begin_worker()
        pool = f"dask://{cluster.address}"

        def kill(pid: int) -> None:
            del pid
            until(lambda: (out / "metrics.jsonl").exists() and '"round": 1' in _text(out))
            cluster.scheduler.kill()

        done = umbel.command(
            "run",
            APPS / "slope",
            "--pool",
            pool,
            "--out",
            out,
            "-c",
            "rounds=400",
            "--nodes",
            "6",
            cwd=tmp_path,
            during=kill,
        )
        assert done.status == 1, done.err
        assert f"the Dask scheduler at tcp://{cluster.address} is gone" in done.err
        assert "umbel run --resume" in done.err and "Traceback" not in done.err
    finally:
        cluster.close()
    resumed = umbel.command(
        "run", "--resume", out, "--pool", "processes", "-c", "rounds=3", cwd=tmp_path / "again"
    )
    assert resumed.status == 0, resumed.err
    assert (out / "model.safetensors").read_bytes() == model


def test_nobody_there() -> None:
    from umbel.server.pools import dask

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before, dask.CONNECT_S = dask.CONNECT_S, 2.0
    try:
        with pytest.raises(ConfigError, match="there is no Dask scheduler at tcp://127"):
            dask.from_options({"pool": f"dask://127.0.0.1:{port}"})
        with pytest.raises(ConfigError, match="needs the address of a scheduler"):
            dask.from_options({"pool": "dask"})
    finally:
        dask.CONNECT_S = before


def test_an_app_that_does_not_import_there_is_refused(
    umbel: WarmCommand, cluster: Cluster, tmp_path: Path
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for file in (APPS / "slope").glob("*.*"):
        (app / file.name).write_bytes(file.read_bytes())
    text = (app / "client_app.py").read_text(encoding="utf-8")
    (app / "client_app.py").write_text("import nowhere\n" + text, encoding="utf-8")
    out = tmp_path / "run"
    pool = f"dask://{cluster.address}"
    done = umbel.command("run", app, "--pool", pool, "--out", out, *OPTIONS, cwd=tmp_path)
    assert done.status == 2, done.err
    assert "No module named 'nowhere'" in done.err and "Traceback" not in done.err
