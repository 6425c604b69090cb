"""The same rounds on Flower's SuperLink with SuperNodes: TLS, node authentication, loopback.

Everything is started as an operator would: `umbel server --engine flower`, `umbel client
--engine flower`. The app times its own rounds, so start-up is not in them.
"""

import contextlib
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from umbel.benchmarks.speed.apps import write_echo
from umbel.benchmarks.speed.processes import ended, umbel
from umbel.core.errors import CheckError

_PATIENCE_S = 900.0
_CONFIG = """\
sizes = "10"
rounds = "3"
nodes = 2
out = ""
"""
_SERVER = """\
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config, found = context.run_config, []
    sizes, rounds = (map(int, str(config[name]).split(",")) for name in ("sizes", "rounds"))
    while len(ids := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    for size, count in zip(sizes, rounds):
        model = Array(np.zeros(size, np.float32))
        total, seconds = np.zeros(size, np.float32), []
        for number in range(count):
            began = time.perf_counter()
            content = RecordDict({"m": ArrayRecord({"w": model})})
            messages = [Message(content, each, "train", group_id=str(number)) for each in ids]
            for reply in grid.send_and_receive(messages):
                total += reply.content["m"]["w"].numpy()
            seconds.append(time.perf_counter() - began)
        found.append(seconds)
    Path(config["out"]).write_text(json.dumps(found))
"""


def measure(*, parameters: int, quick: bool = False) -> dict[str, float]:
    """Median times of rounds, the first of each size left out.

    Args:
        parameters: of the large model, float32.
        quick: two nodes only, and few rounds.

    Returns:
        `round_2` and `round_10` in milliseconds (ten floats), `large` in seconds (two nodes).

    Raises:
        CheckError: the run did not end in time, or failed.
    """
    rounds = (2, 2) if quick else (6, 5)
    small, large = _rounds(2, [10, parameters], rounds)
    found = {"round_2": small * 1e3, "large": large}
    if not quick:
        found["round_10"] = _rounds(10, [10], [5])[0] * 1e3
    return found


def _rounds(nodes: int, sizes: Sequence[int], rounds: Sequence[int]) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="umbel-superlink-") as name:
        folder = Path(name)
        write_echo(folder / "app", _SERVER, _CONFIG)
        out, address = folder / "seconds.json", f"127.0.0.1:{_free_pair()}"
        words = f'sizes="{_list(sizes)}" rounds="{_list(rounds)}" nodes={nodes} out="{out}"'
        with contextlib.ExitStack() as stack:
            for number in range(nodes):
                add = ("nodes", "add", f"n{number}", "--state", "state", "--address", address)
                umbel(folder, *add).wait(_PATIENCE_S)
            flower = ("--engine", "flower")
            serving = ("server", "app", "--state", "state", "--listen", address, *flower)
            server = stack.enter_context(ended(umbel(folder, *serving, "-c", words)))
            for number in range(nodes):
                join = ("--join", f"n{number}.join", "--state", f"n{number}")
                stack.enter_context(ended(umbel(folder, "client", "app", *join, *flower)))
            until = time.monotonic() + _PATIENCE_S
            while server.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
            if not out.exists():
                log = (folder / "log").read_text()[-2000:]
                raise CheckError(f"Flower's SuperLink did not finish its rounds: {log}")
            return [statistics.median(each[1:]) for each in json.loads(out.read_text())]


def _list(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _free_pair() -> int:
    """A port that is free together with the next one, where the SuperLink listens."""
    while True:
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            two.bind(("127.0.0.1", port + 1))
            return port
