"""Small real parts for tests: layers whose work is plain to see, replies, tiny federations."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.clients.data import Examples, Node, Split
from umbel.clients.trainer import Evaluated, Job, Options, Trained, Weights
from umbel.server.flower import Envelope
from umbel.strategies.collect import EXAMPLES, METRICS, UPDATE, Gathering, Sum
from umbel.strategies.layer import Facts, Stateless
from umbel.strategies.records import to_array
from umbel.strategies.stack import Stack

APPS = Path(__file__).parent / "apps"


@dataclass(frozen=True)
class PlusOne(Stateless):
    """Adds one on the node and takes one for each reply off the sum; counts rounds."""

    name: str = "plus-one"

    def init(self, size: int) -> dict[str, Any]:  # type: ignore[override]
        return {"rounds": 0, "seen": torch.zeros(size)}

    def publish(self, state: Mapping[str, Any]) -> dict[str, int]:  # type: ignore[override]
        return {"rounds": state["rounds"]}

    def encode(self, update: Tensor, config: Mapping[str, Any], memory: RecordDict) -> Any:  # noqa: ARG002
        return update + 1, {"rounds": float(config["rounds"])}

    def decode(self, total: Tensor, metrics: Any, state: Any, rnd: Any) -> Any:  # noqa: ARG002
        total = total - rnd.weight
        after = {"rounds": state["rounds"] + 1, "seen": state["seen"] + total.float()}
        return total, after, {"replies": float(rnd.replies)}


@dataclass(frozen=True)
class Times(Stateless):
    """Multiplies on the node and divides on the server; does not commute with PlusOne."""

    by: float = 3.0
    name: str = "times"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        return facts if facts.l2_bound is None else facts.but(l2_bound=facts.l2_bound * self.by)

    def encode(self, update: Tensor, config: Any, memory: RecordDict) -> Any:  # noqa: ARG002
        return update * self.by, {}

    def decode(self, total: Tensor, metrics: Any, state: None, rnd: Any) -> Any:  # noqa: ARG002
        return total / self.by, state, {}


def request(node_id: int = 1001, kind: str = "train", content: RecordDict | None = None) -> Message:
    """An instruction message as its node gets it."""
    envelope = Envelope(1, f"m{node_id}", node_id, "1", 0.0, 3600.0, kind)
    return envelope.message(content if content is not None else RecordDict())


def reply(
    node_id: int,
    update: Tensor | None = None,
    examples: Any = 1,
    *,
    error: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    **more: Tensor,
) -> Message:
    """A node's reply to a request to train."""
    if error is not None:
        return Message(Error(1, error), reply_to=request(node_id))
    content = RecordDict()
    if update is not None:
        arrays = {UPDATE: update, **more}
        content[UPDATE] = ArrayRecord({name: to_array(value) for name, value in arrays.items()})
    content[METRICS] = MetricRecord({EXAMPLES: examples, **(metrics or {})})
    return Message(content, reply_to=request(node_id))


def gathering(size: int, **changes: Any) -> Gathering:
    """What a collect knows of a round without privacy."""
    return replace(Gathering(1, size, torch.float32, 1.0, Facts(size)), **changes)


def collected(collect: Any, replies: Iterable[Message], nodes: Sequence[int], round_: Any) -> Sum:
    """Drive a one-trip collect with these replies, in this order."""
    steps = collect.gather([request(node) for node in nodes], round_)
    assert [m.metadata.dst_node_id for m in next(steps)] == list(nodes)
    try:
        steps.send(iter(replies))
    except StopIteration as end:
        assert isinstance(end.value, Sum)
        return end.value
    raise AssertionError("the collect made a second trip")


class Slope:
    """A trainer of one line through the origin; counts its visits in the node's own memory."""

    OPTIONS: Mapping[str, Any] = {"learning-rate": 0.1}

    def initial(self, options: Options, seed: int) -> Weights:  # noqa: ARG002
        generator = torch.Generator().manual_seed(seed)
        return Weights({"slope": torch.randn(3, generator=generator)}, {"visits": torch.zeros(1)})

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        x, y = torch.as_tensor(examples.x), torch.as_tensor(examples.y)
        slope = weights.parameters["slope"]
        error = x @ slope - y
        noise = torch.randn(3, generator=torch.Generator().manual_seed(job.seed)) * 0.01
        assert job.learning_rate is not None
        after = slope - job.learning_rate * (x.T @ error / len(y) + noise)
        visits = weights.buffers["visits"] + 1
        return Trained(
            Weights({"slope": after}, {"visits": visits}),
            len(y),
            {"loss": float(error.square().mean()), "visits": float(visits)},
        )

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        error = torch.as_tensor(examples.x) @ weights.parameters["slope"] - examples.y
        return Evaluated(len(examples), {"loss": float(error.square().mean())})


def line(node: Node, options: Options) -> Split:
    """Ten times (partition + 1) points near the line with the slope 1, 2, 3."""
    generator = torch.Generator().manual_seed(int(options["seed"]) * 1000 + node.partition)
    x = torch.randn(10 * (node.partition % 5 + 1), 3, generator=generator)
    y = x @ torch.tensor([1.0, 2.0, 3.0])
    return Split(Examples(x, y), Examples(x[:5], y[:5]))


def held_out(options: Options) -> Examples:  # noqa: ARG001
    """Fifty points of no node."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(99))
    return Examples(x, x @ torch.tensor([1.0, 2.0, 3.0]))


def plain_stack() -> Stack:
    """A stack of two layers that do not commute."""
    return Stack([PlusOne(), Times()])


def weighted_mean(updates: Sequence[np.ndarray[Any, Any]], weights: Sequence[float]) -> Any:
    """In float64."""
    return np.average(np.asarray(updates, np.float64), axis=0, weights=weights)


WARM = """
import json, os, sys, traceback
import umbel.federation, umbel.run, umbel.cli
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.chdir(job["cwd"])
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["umbel", *job["arguments"]]
            umbel.cli.main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(json.dumps(child), flush=True)
    if job["wait"]:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


class WarmCommand:
    """`umbel` in processes of their own, forked from one that has paid for the imports."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", WARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _begin(self, arguments: Sequence[Any], cwd: Path, wait: bool) -> int:
        assert self._process.stdin is not None
        job = {
            "arguments": [*map(str, arguments)],
            "cwd": str(cwd),
            "out": str(cwd / "stdout.txt"),
            "err": str(cwd / "stderr.txt"),
            "wait": wait,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._line()))

    def run(self, *arguments: Any, cwd: Path) -> tuple[int, str, str]:
        """Exit status, standard output, standard error of a command."""
        for name in ("stdout.txt", "stderr.txt"):
            (cwd / name).unlink(missing_ok=True)
        self._begin(arguments, cwd, wait=True)
        status = int(json.loads(self._line()))
        return status, (cwd / "stdout.txt").read_text(), (cwd / "stderr.txt").read_text()

    def close(self) -> None:
        """End the process that the commands are forked from."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
