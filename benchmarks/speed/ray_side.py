"""The same work under Flower's own simulation on Ray, in a process of its own.

python -m umbel.benchmarks.speed.ray_side echo NODES MESSAGES ROUNDS
python -m umbel.benchmarks.speed.ray_side app FOLDER NODES '{"rounds": 5}'
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from umbel.benchmarks.speed import apps
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError, RunError
from umbel.core.options import Options
from umbel.core.records import to_array

ROUNDS = 4
_SECONDS = "seconds a message: "


def command(*arguments: object) -> list[str]:
    """The command line that runs this module.

    Raises:
        ConfigError: Ray is not installed.
    """
    if not available():
        raise ConfigError("Flower's simulation needs Ray; install it with: pip install umbel[ray]")
    return [sys.executable, "-P", "-m", __spec__.name, *map(str, arguments)]


def available() -> bool:
    """Whether Ray is installed."""
    from importlib.util import find_spec

    return find_spec("ray") is not None


def app_command(folder: Path, nodes: int, options: Options) -> list[str]:
    """A command that runs a federation's app and prints a line a round."""
    return command("app", folder, nodes, json.dumps(dict(options)))


def echo_under_ray(nodes: int, messages: int) -> float:
    """Median seconds a message of ten floats."""
    with tempfile.TemporaryDirectory() as where:
        done = subprocess.run(
            command("echo", nodes, messages, ROUNDS), cwd=where, capture_output=True, text=True
        )
    for line in done.stdout.splitlines():
        if line.startswith(_SECONDS):
            return float(line.removeprefix(_SECONDS))
    raise RunError(f"Flower's simulation failed:\n{done.stderr[-2000:]}")


def _echo(nodes: int, messages: int, rounds: int) -> None:
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.05)  # Flower's nodes register one by one, and nothing tells when
        cohort = list(grid.get_node_ids())[:messages]
        content = RecordDict({"model": ArrayRecord({"x": to_array(torch.zeros(10))})})
        times = []
        for repeat in range(rounds):
            requests = [Message(content, node, "train", group_id=str(repeat)) for node in cohort]
            began = time.perf_counter()
            replies = list(grid.send_and_receive(requests))
            times.append((time.perf_counter() - began) / messages)
            if not all(reply.has_content() for reply in replies):
                raise RunError("not every message came back")
        print(f"{_SECONDS}{statistics.median(times[1:])}", flush=True)

    _simulate(server, apps.app, nodes)


def _app(folder: Path, nodes: int, options: Options) -> None:
    opened = open_app(folder)
    federation = getattr(opened.server_app(), "federation", None)
    if federation is None:
        raise ConfigError(f"{folder} is not the app of a Federation")
    wanted = {**federation.options, **opened.options, **options}
    federation = replace(federation, options=wanted)
    _simulate(federation.server_app(), federation.client_app(), nodes)


def _simulate(server: ServerApp, client: object, nodes: int) -> None:
    from flwr.simulation import run_simulation

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, nodes, backend_config=resources)  # type: ignore[arg-type]  # a ClientApp, and a table that Flower types too narrowly


def main(arguments: Sequence[str]) -> None:
    """Run what the command line names."""
    what, *rest = arguments
    if what == "echo":
        _echo(*map(int, rest))
    else:
        folder, nodes, options = rest
        _app(Path(folder), int(nodes), json.loads(options))


if __name__ == "__main__":
    main(sys.argv[1:])
