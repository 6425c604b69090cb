"""What a message costs beyond the client's own work, on the embedded engine."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from umbel.benchmarks.figures import Figure
from umbel.benchmarks.speed import apps
from umbel.benchmarks.speed.ray_side import echo_under_ray
from umbel.clients.admission import admit
from umbel.core import streams
from umbel.core.app_folder import open_app
from umbel.core.contents import take_record
from umbel.core.flower import Envelope, take_identity
from umbel.core.records import record_of, to_array
from umbel.server.embedded.executor import Executor, Task
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.embedded.packing import pack
from umbel.strategies.collect import RoundSpec
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS
from umbel.strategies.policy.reading import POLICY, policy_of
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts

SMALL_MS = 0.3
COPIES = 3.0
CASES = ((100, 100), (1000, 100), (10_000, 1000))
"""Nodes of the federation, and messages of a round."""
LARGE = 10_000_000
"""Float32 parameters of the large model."""
MOST_BESIDE = 1.3
"""Time of a message of changed arrays over workers, by that in process, where it is not sent."""
NODE_MS = 0.15
"""Processor time of a node's half of a message whose trainer does nothing."""
GATE_MS = 0.2
"""A node's policy and the contract of a round, for each message."""
_POLICIES: dict[str, tuple[dict[str, bool | int | float | str], str]] = {
    "plain sum": ({}, "[options]\nrounds = {max = 100}\n"),
    "secure sum": (
        {"secure": True, "noise-multiplier": 5.0},
        "min-noise = 1.0\nmin-cohort = 3\n[options]\nrounds = {max = 100}\n",
    ),
}
"""Options of a run, and the policy of its nodes."""
_FLOWERS = {
    "server_app.py": "from flwr.serverapp import ServerApp\n\napp = ServerApp()\n",
    "client_app.py": """\
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    x = message.content["model"]["x"].numpy()
    x += 1
    return Message(RecordDict({"model": ArrayRecord({"x": Array(x)})}), reply_to=message)
""",
}
"""An app that returns other numbers by Flower's own means."""
_TASK = """
import numpy as np
from umbel import Federation, FunctionTrainer


def stay(arrays, examples, job):
    return arrays, 1, {}


federation = Federation(
    FunctionTrainer(lambda _: {"x": np.zeros(10, np.float32)}, stay), lambda *_: 1
)
"""


def measure(*, quick: bool = False, flower: bool = False, workers: int = 2) -> list[Figure]:
    """Messages with ten floats and with a large model, in process and over workers.

    Args:
        quick: a tenth of the sizes, and few repeats.
        flower: measure Flower's simulation under Ray too.
        workers: worker processes.
    """
    scale = 10 if quick else 1
    figures = [
        Figure("messages", f"policy and contract, {name}", 1e3 * seconds, "ms/message", GATE_MS)
        for name, seconds in gate(repeats=20 if quick else 2000).items()
    ]
    idle = node(repeats=20 if quick else 2000)
    name = "a node that trains nothing, its own half"
    figures.append(Figure("messages", name, 1e3 * idle, "ms/message", NODE_MS))
    with tempfile.TemporaryDirectory() as where:
        app = apps.write_echo(Path(where))
        for nodes, messages in ((n // scale, m // scale) for n, m in CASES):
            ray = {"Flower under Ray": 1e3 * echo_under_ray(nodes, messages)} if flower else {}
            for count in (0, workers):
                seconds = exchange(app, nodes, messages, 10, count, repeats=3 if quick else 15)
                figures.append(
                    Figure(
                        "messages",
                        f"10 floats, {messages:,} of {nodes:,} nodes, {_where(count)}",
                        1e3 * seconds,
                        "ms/message",
                        SMALL_MS,
                        ray,
                    )
                )
        figures += large(app, LARGE // scale, workers, quick=quick)
        figures += large_and_other(Path(where), LARGE // scale, workers, quick=quick)
    return figures


def large(app: Path, size: int, workers: int, *, quick: bool) -> list[Figure]:
    """A model that comes back as it was."""
    figures = []
    for count in (0, workers):
        copy = memcpy(4 * size)
        seconds = exchange(app, 20, 20, size, count, repeats=3 if quick else 7)
        figures.append(
            Figure(
                "messages",
                f"{size / 1e6:.0f} M float32, {_where(count)}",
                seconds / copy,
                "copies/message",
                COPIES,
                {"one copy in ms": 1e3 * copy},
            )
        )
    return figures


def large_and_other(where: Path, size: int, workers: int, *, quick: bool) -> list[Figure]:
    """A model that comes back with other numbers, as from Umbel's own nodes and Flower's."""
    figures = []
    for name, app in {
        "Umbel's nodes": apps.write_adding(where / "adding"),
        "Flower's arrays": apps.write_app(where / "flower", _FLOWERS, name="flower"),
    }.items():
        alone, beside = (
            exchange(app, 20, 20, size, count, repeats=3 if quick else 7) for count in (0, workers)
        )
        figures.append(
            Figure(
                "messages",
                f"{size / 1e6:.0f} M float32, changed by {name}, {_where(workers)}",
                beside / alone,
                "x in process",
                MOST_BESIDE,
                {"ms in process": 1e3 * alone},
            )
        )
    return figures


def _where(workers: int) -> str:
    return f"{workers} workers" if workers else "in process"


def exchange(
    app: Path, nodes: int, messages: int, size: int, workers: int, *, repeats: int
) -> float:
    """Median seconds a message, over rounds of `messages` messages with `size` float32 each."""
    times = []
    with EmbeddedGrid(app, nodes, workers=workers) as grid:
        content = RecordDict({"model": record_of({"x": to_array(torch.zeros(size))})})
        cohort = grid.get_node_ids()[:messages]
        for repeat in range(repeats + 2):
            requests = [Message(content, node, "train", group_id=str(repeat)) for node in cohort]
            began = time.perf_counter()
            replies = sum(reply.has_content() for reply in grid.stream(requests))
            times.append((time.perf_counter() - began) / messages)
            if replies != messages:
                raise RuntimeError(f"{replies} of {messages} messages came back")
    return statistics.median(times[2:])


def gate(*, repeats: int) -> dict[str, float]:
    """Seconds of processor time in which a node checks one message of ten floats, by stack.

    Its policy, what protects the update, the contract and the terms of the session: everything
    that is done for a request to train beside training, sealing and sending.
    """
    found = {}
    take_identity(1)  # no grid has been made yet
    with tempfile.TemporaryDirectory() as where:
        folder = apps.write_federation(Path(where) / "app", _TASK, name="ten", config="")
        app: Any = open_app(folder).client_app()
        for name, (options, text) in _POLICIES.items():
            file = Path(where) / f"{name}.toml"
            file.write_text(text)
            context = Context(1, 1001, {POLICY: str(file)}, RecordDict(), dict(options))
            message = _asked(app.known(context).stack)
            began = 0.0
            for repeat in range(repeats + 1):
                if repeat == 1:  # the first one makes what is kept
                    began = time.thread_time()
                known = app.known(context)
                admit(policy_of(context.node_config), "train", message, app, known, alone=True)
                if known.consider(message, context) is not None:
                    raise RuntimeError("the message was refused")
            found[name] = (time.thread_time() - began) / repeats
    return found


def node(*, repeats: int) -> float:
    """Seconds of processor time in which a virtual node answers, if its trainer does nothing.

    From the packed request to the reply: the records, the gate, the seeds and the layers.
    """
    take_identity(1)
    with tempfile.TemporaryDirectory() as where:
        folder = apps.write_federation(Path(where) / "app", _TASK, name="ten", config="")
        app: Any = open_app(folder).client_app()
        known = app.known(Context(1, 1001, {}, RecordDict(), {}))
        message = _asked(known.stack)
        take_record(message.content, CONFIG, ConfigRecord)["manifest"] = known.manifest.digest
        executor, content = Executor(app, {}, 3), pack(message.content)
        tasks = [Task(Envelope.of(message), content, None, seed) for seed in range(repeats)]
        with streams.kept():
            first = executor.one_by_one(tasks[:1])  # makes what is kept
            if first[0].failure:
                raise RuntimeError(first[0].failure)
            began = time.thread_time()
            for task in tasks:
                executor.one_by_one([task])
            return (time.thread_time() - began) / repeats


def _asked(stack: Stack) -> Message:
    """A request to train as a coordinator sends it, with the terms of a session if it has them."""
    before = Facts(size=10, expected_replies=3, max_replies=3, round=1)
    states = stack.init(10)
    told = ConfigRecord({"round": 1, **stack.publish(states, before)})
    model = ArrayRecord({PARAMETERS: to_array(torch.zeros(10))})
    requests = [Message(RecordDict({MODEL: model, CONFIG: told}), 1001, "train")] * 3
    facts = stack.check(before, states)
    round_ = RoundSpec(1, facts.size, torch.float32, 3.0, facts, run_id=1)
    return next(stack.collect.gather(requests, round_))[0]


def memcpy(size: int) -> float:
    """Median seconds to copy `size` bytes into memory that is there already, on one thread."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(15):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
