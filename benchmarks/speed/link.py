"""What the link costs, on this machine, over loopback, with mutual TLS.

    measure()     an empty round with 2 and 10 nodes; a large model to 2 nodes and back
    memory()      what the coordinator needs beyond its app, for 2 and for more nodes
    idle()        what 500 connected nodes cost that have nothing to do
    figures()     all of it beside the targets and, if asked, Flower's SuperLink

The coordinator runs in a process of its own and every node in two, as in a real federation.
The app of the nodes returns what it got; that of the coordinator adds the replies up.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ArrayRecord, Message, RecordDict

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed import superlink
from umbel.benchmarks.speed.apps import write_echo
from umbel.benchmarks.speed.processes import anonymous, proportional, resident, tree
from umbel.clients.process.membership import open_channel
from umbel.core.app_folder import open_app
from umbel.core.contents import take_record
from umbel.core.errors import CheckError
from umbel.server.link.enrolment import Enrolment
from umbel.server.link.grid import LinkGrid
from umbel.server.link.hub import BEAT_S
from umbel.server.link.service import ServerSettings, Service
from umbel.transport.certificates import Identity, make_request, new_key
from umbel.transport.frames import PROTOCOL, SERVICE, from_wire, to_wire
from umbel.transport.join import write_join_file
from umbel.transport.link_pb2 import Beat, Frame, Hello

SMALL, LARGE = 10, 10_000_000
TARGETS = {
    "round_2": 5.0,
    "round_10": 15.0,
    "large": 0.5,
    "models_2": 5.0,
    "models_20": 5.0,
    "node": 5.0,
    "core": 5.0,
    "own": 300.0,
}
_PATIENCE_S = 180.0
_WATCHED = 2
"""Of how many nodes the memory is looked at: to look takes processor time."""
_SAMPLE_S = 0.05
_SERVER = "from flwr.serverapp import ServerApp\n\napp = ServerApp()\n"


def measure(
    *,
    parameters: int = LARGE,
    rounds: int = 200,
    large_rounds: int = 9,
    nodes: Sequence[int] = (2, 10),
) -> dict[str, Any]:
    """Median seconds of rounds.

    Args:
        parameters: of the large model, float32.
        rounds: of ten floats.
        large_rounds: of the large model, with the first number of nodes.
        nodes: how many nodes, for the empty rounds.

    Returns:
        `empty_round_s` by number of nodes, `large_round_s`, `parameters`, and the spread.
    """
    found: dict[str, Any] = {"parameters": parameters, "empty_round_s": {}, "nodes": list(nodes)}
    for number, count in enumerate(nodes):
        jobs = [(SMALL, rounds)] + ([(parameters, large_rounds)] if number == 0 else [])
        timed = _with_nodes(count, jobs)
        found["empty_round_s"][str(count)] = statistics.median(timed[0]["seconds"])
        if number == 0:
            seconds = timed[1]["seconds"]
            found["large_round_s"] = statistics.median(seconds)
            found["large_round_range_s"] = [min(seconds), max(seconds)]
    return found


def memory(
    *, parameters: int = LARGE, nodes: Sequence[int] = (2, 20), rounds: int = 3
) -> dict[str, Any]:
    """What a large model takes of memory, at its peak.

    Returns:
        `parameters`, and in models, by number of nodes: `models` of the coordinator beyond its
        app; `node` of the node that takes most, its two processes together with pages that they
        share counted once, beyond the same with ten floats.
    """
    found: dict[str, Any] = {"parameters": parameters, "models": {}, "node": {}}
    for count in nodes:
        [small] = _with_nodes(count, [(SMALL, rounds)])
        [large] = _with_nodes(count, [(parameters, rounds)])
        more = large["node_bytes"] - small["node_bytes"]
        found["models"][str(count)] = large["peak_bytes"] / (4 * parameters)
        found["node"][str(count)] = more / (4 * parameters)
    return found


def idle(*, nodes: int = 500, seconds: float = 20.0) -> dict[str, Any]:
    """Share of a core and memory of a coordinator with idle nodes, from one load process."""
    with _folder() as folder:
        state = folder / "state"
        identities = _enrol_directly(state, nodes)
        with _coordinator(folder, [("idle", nodes, seconds)]) as (process, port):
            load = threading.Thread(
                target=lambda: asyncio.run(_sit(f"127.0.0.1:{port}", identities, process)),
                daemon=True,
            )
            load.start()
            found = _read_result(process)
            load.join(10)
    result: dict[str, Any] = found[0]
    return result


def figures(*, quick: bool = False, flower: bool = False) -> list[Figure]:
    """The figures of `umbel bench speed --link`; `quick` only shows that it works."""
    size = 100_000 if quick else LARGE
    rounds = measure(parameters=size, rounds=5 if quick else 200, large_rounds=3 if quick else 11)
    peaks = memory(parameters=size, nodes=(2,) if quick else (2, 20))
    models = peaks["models"]
    still = idle(nodes=20, seconds=1) if quick else idle()
    theirs = superlink.measure(parameters=size, quick=quick) if flower else {}
    targets = {} if quick else TARGETS
    found = {
        "round_2": rounds["empty_round_s"]["2"] * 1e3,
        "round_10": rounds["empty_round_s"]["10"] * 1e3,
        "large": rounds["large_round_s"],
        **{f"models_{nodes}": value for nodes, value in models.items()},
        "node": peaks["node"]["2"],
        "core": 100 * still["core_share"],
        "own": still["own_bytes"] / 1e6,
        "resident": still["resident_bytes"] / 1e6,
    }
    idle_nodes = f"{still['nodes']} idle nodes"
    said = {
        "round_2": ("a round of ten floats, 2 nodes", "ms"),
        "round_10": ("a round of ten floats, 10 nodes", "ms"),
        "large": (f"{size:,} float32 to 2 nodes and back, added up", "s"),
        "models_2": (f"memory beyond the app, {size:,} parameters, 2 nodes", "models"),
        "models_20": (f"memory beyond the app, {size:,} parameters, 20 nodes", "models"),
        "node": (f"memory of a node, {size:,} parameters", "models"),
        "core": (f"{idle_nodes}: share of a core", "%"),
        "own": (f"{idle_nodes}: memory of its own", "MB"),
        "resident": (f"{idle_nodes}: with the pages of program files", "MB"),
    }
    made = []
    for name, value in found.items():
        what, unit = said[name]
        beside = {"Flower's SuperLink": theirs[name]} if name in theirs else {}
        made.append(Figure("link", what, value, unit, targets.get(name), beside))
    return made


# ---- the coordinator's process


def _serve(folder: Path, jobs: Sequence[Sequence[Any]]) -> None:
    """Entry point of the coordinator: prints its port, then one line of results."""
    settings = ServerSettings(folder / "state", listen="127.0.0.1:0")
    service = Service(settings, version="bench", app_digest=open_app(folder / "app").digest())
    service.start()
    print(service.listener.port, flush=True)
    results = []
    for job in jobs:
        results.append(_sit_idle(service, *job[1:]) if job[0] == "idle" else _rounds(service, *job))
    print(json.dumps(results), flush=True)
    service.stop(for_good=True)


def _rounds(service: Service, parameters: int, rounds: int, nodes: int) -> dict[str, Any]:
    _wait(service, nodes)
    grid = LinkGrid(service.hub, run_id=parameters)
    model = Array(np.zeros(parameters, np.float32))
    start = len(model.data) - 4 * parameters
    total = np.empty(parameters, np.float32)
    total[:] = 0
    before, peak, over = resident(), [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, over))
    if parameters > 10_000:
        watch.start()
    seconds = []
    for number in range(rounds):
        began = time.perf_counter()
        content = RecordDict({"m": ArrayRecord({"w": model})})
        ids = grid.get_node_ids()
        messages = [Message(content, each, "train", group_id=str(number)) for each in ids]
        replies = 0
        for reply in grid.stream(messages, _PATIENCE_S):
            if reply.has_error():
                raise CheckError(f"a node failed: {reply.error.reason}")
            data = take_record(reply.content, "m", ArrayRecord)["w"].data
            total += np.frombuffer(data, np.float32, offset=start)
            replies += 1
            del reply, data
        seconds.append(time.perf_counter() - began)
        if replies != nodes:
            raise CheckError(f"{replies} of {nodes} nodes have replied")
    over.set()
    if watch.is_alive():
        watch.join()
    return {"seconds": seconds[1:], "peak_bytes": max(0, peak[0] - before)}


def _wait(service: Service, nodes: int) -> None:
    until = time.monotonic() + _PATIENCE_S

    def check() -> None:
        if time.monotonic() > until:
            raise CheckError(f"{service.hub.connected()} of {nodes} nodes have come")

    service.wait_for_nodes(nodes, lambda _: None, check)


def _watch(peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.002):
        peak[0] = max(peak[0], resident())


def _sit_idle(service: Service, nodes: int, seconds: float) -> dict[str, Any]:
    _wait(service, nodes)
    time.sleep(2)  # handshakes are over
    before, began = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    used, took = time.process_time() - before, time.perf_counter() - began
    return {
        "nodes": service.hub.connected(),
        "core_share": used / took,
        "own_bytes": anonymous(),
        "resident_bytes": resident(),
    }


# ---- the nodes' side


def _with_nodes(count: int, jobs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with _folder() as folder, contextlib.ExitStack() as stack:
        full = [(*job, count) for job in jobs]
        process, port = stack.enter_context(_coordinator(folder, full))
        enrolment = Enrolment(folder / "state")
        authority = enrolment.authority()
        nodes = []
        for number in range(count):
            name = f"n{number}"
            join = enrolment.add(name, authority, f"127.0.0.1:{port}")
            write_join_file(folder / f"{name}.join", join)
            command = [
                *(sys.executable, "-c", "from umbel.commands.cli import main; main()"),
                *("client", "app", "--join", f"{name}.join", "--state", name),
                *("--node-config", f"partition-id={number}", "--threads", "1"),
            ]
            node = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            stack.callback(node.wait)
            stack.callback(node.terminate)
            nodes.append(node.pid)
        enrolment.close()
        peak, over = [0], threading.Event()
        watch = threading.Thread(target=_watch_nodes, args=(nodes[:_WATCHED], peak, over))
        watch.start()
        try:
            found = _read_result(process)
        finally:
            over.set()
            watch.join()
        return [{**each, "node_bytes": peak[0]} for each in found]


def _watch_nodes(nodes: Sequence[int], peak: list[int], over: threading.Event) -> None:
    while not over.wait(_SAMPLE_S):
        peak[0] = max(peak[0], *(sum(map(proportional, tree(node))) for node in nodes))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as name:
        write_echo(Path(name) / "app", _SERVER)
        yield Path(name)


@contextlib.contextmanager
def _coordinator(
    folder: Path, jobs: Sequence[Sequence[Any]]
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "umbel.benchmarks.speed.link",
        str(folder),
        json.dumps(jobs),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.strip().isdigit():
                raise CheckError("the coordinator of the benchmark did not start")
            yield process, int(line)
        finally:
            process.terminate()


def _read_result(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise CheckError("the coordinator of the benchmark has failed; its error is above")
    found: list[dict[str, Any]] = json.loads(line)
    return found


def _enrol_directly(state: Path, nodes: int) -> list[Identity]:
    """Certificates without the calls that would fetch them."""
    enrolment = Enrolment(state)
    authority = enrolment.authority()
    identities = []
    for number in range(nodes):
        name, key = f"n{number}", new_key()
        enrolment.add(name, authority, "127.0.0.1:1")
        certificate = enrolment.issue(name, make_request(key, name), authority)
        identities.append(Identity(certificate.public_bytes(Encoding.PEM), key, authority.pem))
    enrolment.close()
    return identities


async def _sit(
    address: str, identities: Sequence[Identity], process: "subprocess.Popen[str]"
) -> None:
    """Connect, and do nothing but beat, until the coordinator has ended."""

    async def node(identity: Identity, wait: float) -> None:
        await asyncio.sleep(wait)
        async with open_channel(address, identity) as channel:
            call = channel.stream_stream(
                f"/{SERVICE}/Connect", request_serializer=to_wire, response_deserializer=from_wire
            )()
            hello = Hello(protocol=PROTOCOL, version="bench", instance=secrets.token_hex(8))
            await call.write(Frame(hello=hello))
            await call.read()
            while process.poll() is None:
                await asyncio.sleep(BEAT_S)
                await call.write(Frame(beat=Beat(phase="idle")))
                await call.read()

    async def again(identity: Identity, wait: float) -> None:
        """As nodes do: who is turned away at the door in a crowd comes again."""
        while process.poll() is None:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await node(identity, wait)
            wait = 1 + secrets.randbelow(1000) / 1000

    waiting = [asyncio.create_task(again(each, 0.01 * n)) for n, each in enumerate(identities)]
    await asyncio.gather(*waiting, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("jobs")
    arguments = parser.parse_args()
    _serve(arguments.folder, json.loads(arguments.jobs))
