"""Data in stores: S3 (the server of moto) and WebHDFS (a small server of these tests)."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import umbel
from tests.clusters.until import until
from umbel import ConfigError, Node

pytestmark = pytest.mark.clusters
pa = pytest.importorskip("pyarrow")
dataset = pytest.importorskip("pyarrow.dataset")
s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

COLUMNS: dict[str, Any] = {"x": ("a", "b"), "y": "y", "by": "user"}
ROWS = 30_000
PLAIN = {"Content-Type": "text/plain"}


def records() -> Any:
    number = np.arange(ROWS)
    a = (number % 100 / 100).astype(np.float32)
    users = np.asarray(["ada", "bob", "cyd"])[number % 3]
    return pa.table({"a": a, "b": 1 - a, "y": (a > 0.5).astype(np.int64), "user": users})


def write(path: str, system: Any = None) -> None:
    dataset.write_dataset(
        records(),
        path,
        filesystem=system,
        format="parquet",
        partitioning=["user"],
        partitioning_flavor="hive",
        max_rows_per_group=2_000,
        existing_data_behavior="overwrite_or_ignore",
    )


def trained(data: Any, out: Path) -> bytes:
    """The model of a run of three nodes."""
    federation = umbel.Federation(
        trainer=umbel.TorchTrainer(lambda: nn.Linear(2, 2), batch_size=100, learning_rate=0.5),
        data=data,
    )
    umbel.run(federation, options={"rounds": 2}, nodes=3, out=out)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        log.close()


def test_s3_gives_the_same_model_as_files_of_this_machine(s3: str, tmp_path: Path) -> None:
    storage = {"endpoint_url": s3, "key": "any", "secret": "any"}
    system = s3fs.S3FileSystem(**storage)
    system.mkdir("records")
    write("records/visits", system)
    write(str(tmp_path / "visits"))
    more: dict[str, Any] = {**COLUMNS, "memory": 1 << 16}
    remote = umbel.Parquet("s3://records/visits", storage=storage, **more)
    local = umbel.Parquet(tmp_path / "visits", **more)
    remote.check(3, {})
    assert trained(remote, tmp_path / "remote") == trained(local, tmp_path / "local")
    # Arrow's own client reads what was written.
    host = s3.removeprefix("http://")
    own = pa.fs.S3FileSystem(
        access_key="any", secret_key="any", endpoint_override=host, scheme="http"
    )
    assert dataset.dataset("records/visits", filesystem=own).count_rows() == ROWS


def test_s3_that_refuses(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    without = umbel.Parquet("s3://private/visits", storage={"endpoint_url": s3}, **COLUMNS)
    with pytest.raises(ConfigError, match="s3://private/visits is not given to this node"):
        without.check(1, {})
    asked = urllib.request.Request(f"{s3}/moto-api/reset-auth", data=b"0", headers=PLAIN)
    urllib.request.urlopen(asked).read()
    try:
        storage = {"endpoint_url": s3, "key": "wrong", "secret": "wrong"}
        wrong = umbel.Parquet("s3://private/visits", storage=storage, **COLUMNS)
        with pytest.raises(ConfigError, match=r"is not given to this node: .*give it credentials"):
            wrong.check(1, {})
    finally:
        asked = urllib.request.Request(f"{s3}/moto-api/reset-auth", data=b"inf", headers=PLAIN)
        urllib.request.urlopen(asked).read()


class _WebHdfs(http.server.BaseHTTPRequestHandler):
    """GETFILESTATUS, LISTSTATUS and OPEN with its redirect, as Hadoop documents them."""

    root: Path
    opened: set[str]

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(address.query))
        name = urllib.parse.unquote(address.path).removeprefix("/webhdfs/v1")
        file = self.root / name.strip("/")
        if "/secret" in name:
            return self._no(403, "AccessControlException", f"Permission denied: user=umbel, {name}")
        if not file.exists():
            return self._no(404, "FileNotFoundException", f"File does not exist: {name}")
        if asked["op"] == "GETFILESTATUS":
            return self._said({"FileStatus": self._status(file, "")})
        if asked["op"] == "LISTSTATUS":
            each = [self._status(one, one.name) for one in sorted(file.iterdir())]
            return self._said({"FileStatuses": {"FileStatus": each}})
        assert asked["op"] == "OPEN", asked
        if "datanode" not in asked:  # the name node sends to a data node, which has the bytes
            self.send_response(307)
            self.send_header("Location", f"http://{self.headers['Host']}{self.path}&datanode=1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.opened.add(name)
        start = int(asked.get("offset", 0))
        text = file.read_bytes()
        stop = start + int(asked.get("length", len(text)))
        return self._answer(200, text[start:stop], "application/octet-stream")

    def _status(self, file: Path, suffix: str) -> dict[str, Any]:
        kind = "DIRECTORY" if file.is_dir() else "FILE"
        size = 0 if file.is_dir() else file.stat().st_size
        more = {"owner": "umbel", "group": "umbel", "permission": "644", "replication": 1}
        return {"pathSuffix": suffix, "type": kind, "length": size, "modificationTime": 0, **more}

    def _no(self, status: int, kind: str, said: str) -> None:
        self._said({"RemoteException": {"exception": kind, "message": said}}, status)

    def _said(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: Any) -> None:
        """Nothing."""


@pytest.fixture
def webhdfs(tmp_path: Path) -> Iterator[tuple[str, Path, set[str]]]:
    """An address, the folder behind it, and the files whose bytes were asked for."""
    root = tmp_path / "hdfs"
    root.mkdir()
    handler = type("WebHdfs", (_WebHdfs,), {"root": root, "opened": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"webhdfs://127.0.0.1:{server.server_port}", root, handler.opened
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_webhdfs_gives_the_same_model_and_reads_a_nodes_own_files(
    webhdfs: tuple[str, Path, set[str]], tmp_path: Path
) -> None:
    address, root, opened = webhdfs
    write(str(root / "visits"))
    data = umbel.Parquet(f"{address}/visits", **COLUMNS)
    own = data(Node(0, 9, {"user": "bob"}), {}).train
    assert len(own) == ROWS // 3
    first = {name for name in opened if "user=ada" in name}
    assert {name.split("/")[2] for name in opened - first} == {"user=bob"}
    local = umbel.Parquet(root / "visits", **COLUMNS)
    assert trained(data, tmp_path / "remote") == trained(local, tmp_path / "local")


def test_webhdfs_that_refuses_and_that_is_not_there(
    webhdfs: tuple[str, Path, set[str]],
) -> None:
    address, root, _ = webhdfs
    write(str(root / "secret"))
    with pytest.raises(ConfigError, match=r"is not given to this node: .*Permission denied"):
        umbel.Parquet(f"{address}/secret", **COLUMNS).check(1, {})
    with pytest.raises(ConfigError, match=r"there is no webhdfs://.*/nowhere on"):
        umbel.Parquet(f"{address}/nowhere", **COLUMNS).check(1, {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match="cannot be reached from"):
        umbel.Parquet(f"webhdfs://127.0.0.1:{port}/visits", **COLUMNS).check(1, {})
