"""A secure round over the link: a coordinator and nodes as processes of their own, mutual TLS.

measure_link()   the median round of ten nodes with ten floats: five trips, ten enrolled
                 identities, every signature checked by every node
measure_bare()   what the link is made of and nothing else: a bare gRPC stream a node, under mutual
                 TLS, ten floats out and back. No round over the link can be faster, and its time
                 tells how fast the machine is at just this at the hour
"""

import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from umbel.benchmarks.speed.apps import write_federation
from umbel.benchmarks.speed.processes import ended, umbel
from umbel.core.errors import CheckError
from umbel.transport.certificates import make_server_identity, make_ticket, open_authority

TIMES_PLAIN = 8.0
"""The longest that a secure round may take, in plain rounds of the same benchmark: five trips alone
are five of these."""
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
_FLOATS = bytes(40)  # ten floats
_GOODBYE_S = 5.0
_BARE_NODE = """\
import asyncio
import sys
from pathlib import Path

import grpc


async def main(address, folder):
    root, key, certificate = ((folder / name).read_bytes() for name in ("root", "key", "chain"))
    credentials = grpc.ssl_channel_credentials(root, key, certificate)
    async with grpc.aio.secure_channel(address, credentials) as channel:
        call = channel.stream_stream("/bare/Echo")()
        await call.write(b"hello")
        while (message := await call.read()) is not grpc.aio.EOF:
            await call.write(message)


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def measure_link(*, nodes: int = 10, rounds: int = 200) -> dict[str, Any]:
    """Seconds of a round of ten floats over loopback, with and without the secure sum.

    Returns:
        `link_round_s` and `link_plain_round_s` (medians after the first tenth, in which processes
        warm up), `link_bare_round_s` (streams of gRPC that carry ten floats and do nothing with
        them, once in as many processes), `link_over_plain` (the first over the second) and
        `link_nodes`.

    Raises:
        CheckError: a process failed, or the nodes did not all take part.
    """
    secure, plain = (_median(nodes, rounds, secure=on) for on in (True, False))
    return {
        "link_nodes": nodes,
        "link_round_s": secure,
        "link_plain_round_s": plain,
        "link_bare_round_s": measure_bare(nodes=nodes),
        "link_over_plain": secure / plain,
    }


def _median(nodes: int, rounds: int, *, secure: bool) -> float:
    with tempfile.TemporaryDirectory(prefix="umbel-secure-link-") as name:
        folder = Path(name)
        options = f"client-eval-every = -1\nsecure = {str(secure).lower()}\nrounds = {rounds}"
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


def measure_bare(*, nodes: int = 10, rounds: int = 300) -> float:
    """Seconds of a round, the median after a first tenth.

    Raises:
        CheckError: a node did not come, or did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="umbel-bare-link-") as name:
        try:
            seconds = asyncio.run(_bare_rounds(Path(name), nodes, rounds))
        except TimeoutError:
            raise CheckError("a node of the bare streams is silent; run it again") from None
    return statistics.median(seconds[rounds // 10 :])


async def _bare_rounds(folder: Path, nodes: int, rounds: int) -> list[float]:
    authority = open_authority(folder)
    own = make_server_identity(authority, ["localhost"])
    ticket = make_ticket(authority, "node", 1.0)
    for file, content in (
        ("root", ticket.root),
        ("key", ticket.key),
        ("chain", ticket.certificate),
    ):
        (folder / file).write_bytes(content)
    streams = _Streams(nodes, rounds)
    server = grpc.aio.server()
    handler: Any = grpc.stream_stream_rpc_method_handler(streams.echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare", {"Echo": handler}),)
    )
    credentials = grpc.ssl_server_credentials(
        [(own.key, own.certificate)], own.root, require_client_auth=True
    )
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    with contextlib.ExitStack() as stack:
        for _ in range(nodes):
            command = [sys.executable, "-P", "-c", _BARE_NODE, f"localhost:{port}", str(folder)]
            stack.enter_context(ended(subprocess.Popen(command, text=True)))
        try:
            return await streams.run()
        finally:
            await server.stop(_GOODBYE_S)  # nodes end by themselves once their streams do


class _Streams:
    """The server's end of every stream, and the rounds over them."""

    def __init__(self, nodes: int, rounds: int) -> None:
        self._nodes, self._rounds = nodes, rounds
        self._calls: list[Any] = []
        self._all_here, self._over = asyncio.Event(), asyncio.Event()

    async def echo(self, requests: AsyncIterator[bytes], context: Any) -> None:  # noqa: ARG002
        """One node's stream; it stays open until the rounds are over."""
        await context.read()
        self._calls.append(context)
        if len(self._calls) == self._nodes:
            self._all_here.set()
        await self._over.wait()

    async def run(self) -> list[float]:
        """Seconds of each round: out to every node, and back from the last."""
        seconds = []
        async with asyncio.timeout(_PATIENCE_S):
            await self._all_here.wait()
            for _ in range(self._rounds):
                began = time.perf_counter()
                await asyncio.gather(*(call.write(_FLOATS) for call in self._calls))
                await asyncio.gather(*(call.read() for call in self._calls))
                seconds.append(time.perf_counter() - began)
        self._over.set()
        return seconds
