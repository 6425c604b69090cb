"""A secure round over the link: a coordinator and nodes as processes of their own, mutual TLS.

measure_link()   the median round of ten nodes with ten floats: five trips, ten enrolled
                 identities, every signature checked by every node
"""

import contextlib
import json
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from umbel.benchmarks.speed.apps import write_federation
from umbel.benchmarks.speed.processes import ended, umbel
from umbel.strategies.errors import CheckError

TARGET_S = 0.080
_PATIENCE_S = 300.0
_TASK = """\
import numpy as np

from umbel import Federation, FunctionTrainer


def train(arrays, examples, job):
    return {"w": arrays["w"] + examples}, 1, {}


def initial(options):
    return {"w": np.zeros(10, "f4")}


federation = Federation(FunctionTrainer(initial, train), lambda node, _: node.partition)
"""


def measure_link(*, nodes: int = 10, rounds: int = 200) -> dict[str, Any]:
    """Seconds of a round of ten floats over loopback, with and without the secure sum.

    Returns:
        `link_round_s` and `link_plain_round_s` (medians after the first tenth, in which processes
        warm up), `nodes`, `target_s`.

    Raises:
        CheckError: a process failed, or the nodes did not all take part.
    """
    secure, plain = (_median(nodes, rounds, secure=on) for on in (True, False))
    return {
        "link_nodes": nodes,
        "link_round_s": secure,
        "link_plain_round_s": plain,
        "link_target_s": TARGET_S,
    }


def _median(nodes: int, rounds: int, *, secure: bool) -> float:
    with tempfile.TemporaryDirectory(prefix="umbel-secure-link-") as name:
        folder = Path(name)
        options = f"federated-every = -1\nsecure = {str(secure).lower()}\nrounds = {rounds}"
        write_federation(folder / "app", _TASK, name="small", config=options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        for number in range(nodes):
            umbel(
                folder, "nodes", "add", f"n{number}", "--state", "state", "--address", address
            ).wait(_PATIENCE_S)
        with contextlib.ExitStack() as stack:
            serving = ("server", "app", "--state", "state", "--listen", address, "--json")
            server = stack.enter_context(ended(umbel(folder, *serving)))
            for number in range(nodes):
                config = f"partition-id={number} num-partitions={nodes}"
                words = ("client", "app", "--join", f"n{number}.join", "--state", f"n{number}")
                more = ("--threads", "1", "--node-config", config)
                stack.enter_context(ended(umbel(folder, *words, *more)))
            return _read(server, folder, nodes)


def _read(server: "subprocess.Popen[str]", folder: Path, nodes: int) -> float:
    until = time.monotonic() + _PATIENCE_S
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    files = list((folder / "state" / "runs").glob("*/metrics.jsonl"))
    if server.poll() != 0 or not files:
        raise CheckError(f"the coordinator failed: {(folder / 'log').read_text()[-2000:]}")
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    timed = [line for line in lines if line["round"] > max(5, len(lines) // 10)]
    if any(line["clients"] != nodes for line in timed):
        raise CheckError("a node was missing in a round of the benchmark; run it again")
    return float(statistics.median(line["seconds"] for line in timed))
