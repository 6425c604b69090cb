"""Export, compression and serving of one run, measured through the commands that people use.

    python -m umbel.benchmarks.deliver.acceptance RUN OUT.json

RUN is a run of the Fashion-MNIST example. Requests are JSON of one photograph, 1,000 of them over
16 connections that stay open, after 200 that warm up; the same client asks a constant endpoint of
the same framework for comparison.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from umbel.clients.data.datasets import load
from umbel.server.output.rundir import machine, versions

REQUESTS, CONNECTIONS, WARM = 1000, 16, 200
UMBEL = [sys.executable, "-c", "from umbel.commands.cli import main; main()"]


def command(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json."""
    done = subprocess.run(
        [*UMBEL, *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def processor_seconds(pid: int) -> float:
    """What a process has used of the processors so far, which other programs do not change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started(
    arguments: Sequence[str], port: int
) -> tuple[subprocess.Popen[bytes], dict[str, float]]:
    """Start a server, and wait until it answers; it and the seconds that took."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            connection.getresponse().read()
            seconds = time.perf_counter() - began
            return process, {"seconds": seconds, "processor": processor_seconds(process.pid)}
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"{arguments} ended with {process.returncode}") from None
            time.sleep(0.01)


def ask(port: int, bodies: Sequence[bytes], requests: int) -> dict[str, Any]:
    """Throughput and latency of many requests over 16 connections."""
    times: list[float] = []
    errors: list[str] = []

    def client(place: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in range(place, requests, CONNECTIONS):
            began = time.perf_counter()
            try:
                connection.request(
                    "POST",
                    "/predict",
                    bodies[number % len(bodies)],
                    {"content-type": "application/json"},
                )
                reply = connection.getresponse()
                content = reply.read()
                if reply.status != 200 or b"predictions" not in content:
                    errors.append(f"{reply.status}")
            except OSError as error:
                errors.append(repr(error))
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(CONNECTIONS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return {
        "requests": requests,
        "connections": CONNECTIONS,
        "errors": len(errors),
        "per_second": requests / seconds,
        "p50_ms": 1e3 * float(np.quantile(times, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
    }


def serving(folder: Path, turns: int = 3) -> dict[str, Any]:
    """A served model beside a constant endpoint, in turns; a kill; and the next start."""
    images = load("fashion-mnist").test.x[:100]
    bodies = [json.dumps({"inputs": [np.asarray(one).tolist()]}).encode() for one in images]
    port, other = free_port(), free_port()
    serve = [*UMBEL, "predict", str(folder), "--listen", f"127.0.0.1:{port}", "--threads", "1"]
    constant = Path(__file__).parent / "constant.py"
    model, first = started(serve, port)
    bare, bare_start = started([sys.executable, str(constant), str(other)], other)
    measure: Callable[[int], dict[str, Any]] = lambda at: ask(at, bodies, REQUESTS)  # noqa: E731
    try:
        ask(port, bodies, WARM)
        ask(other, bodies, WARM)
        pairs = [(measure(port), measure(other)) for _ in range(turns)]
    finally:
        bare.terminate()
        bare.wait()
        os.kill(model.pid, signal.SIGKILL)
        model.wait()
    again, second = started(serve, port)
    again.terminate()
    again.wait()
    ratios = [one["per_second"] / two["per_second"] for one, two in pairs]
    return {
        "model": [one for one, _ in pairs],
        "constant": [two for _, two in pairs],
        "throughput_ratio": float(np.median(ratios)),
        "first_start": first,
        "restart_after_kill": second,
        "start_of_the_constant_endpoint": bare_start,
    }


def main(run: str, out: str) -> None:
    """Measure everything and write it down."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        exported = command("export", run, "--out", str(place / "onnx"))
        served = serving(place / "onnx")
        print(json.dumps(served, indent=2), file=sys.stderr)
        small = command("compress", run, "--out", str(place / "small"))
    result = {
        "command": "python -m umbel.benchmarks.deliver.acceptance RUN OUT.json",
        "machine": {**machine(), "load": os.getloadavg()},
        "versions": versions(),
        "export": {name: exported[name] for name in ("bytes", "metrics", "difference")},
        "compress": {name: small[name] for name in ("recipe", "original", "table")},
        "serve": served,
    }
    Path(out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
