"""Small real parts for tests: layers whose work is plain to see, replies, tiny federations."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from umbel.core.flower import Envelope
from umbel.core.records import to_array
from umbel.server.pools.processes import ForkServer
from umbel.strategies.collect import EXAMPLES, METRICS, UPDATE, Aggregate, RoundSpec
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Broadcast, Facts, NodeContext, RoundContext, Stateless

APPS = Path(__file__).parent / "apps"


@dataclass(frozen=True)
class PlusOne(Stateless):
    """Adds one on the node and takes one for each reply off the sum; counts rounds."""

    name: str = "plus-one"

    def init(self, size: int) -> dict[str, Any]:  # type: ignore[override]
        return {"rounds": 0, "seen": torch.zeros(size)}

    def broadcast(self, state: Mapping[str, Any], facts: Facts) -> Broadcast:  # noqa: ARG002
        return Broadcast({"rounds": state["rounds"]})

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:
        ctx.report("rounds", float(ctx.config["rounds"]))
        return update + 1

    def decode(self, total: Tensor, state: Any, ctx: RoundContext) -> Any:
        total = total - ctx.weight
        after = {"rounds": state["rounds"] + 1, "seen": state["seen"] + total.float()}
        ctx.report("replies", float(ctx.replies))
        return total, after


@dataclass(frozen=True)
class Times(Stateless):
    """Multiplies on the node and divides on the server; does not commute with PlusOne."""

    by: float = 3.0
    name: str = "times"

    def check(self, facts: Facts, state: None) -> Facts:  # noqa: ARG002
        return facts if facts.l2_bound is None else facts.replace(l2_bound=facts.l2_bound * self.by)

    def encode(self, update: Tensor, ctx: NodeContext) -> Tensor:  # noqa: ARG002
        return update * self.by

    def decode(self, total: Tensor, state: None, ctx: RoundContext) -> Any:  # noqa: ARG002
        return total / self.by, state


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


def gathering(size: int, **changes: Any) -> RoundSpec:
    """What a collect knows of a round without privacy."""
    return replace(RoundSpec(1, size, torch.float32, 1.0, Facts(size)), **changes)


def collected(
    collect: Any, replies: Iterable[Message], nodes: Sequence[int], round_: Any
) -> Aggregate:
    """Drive a one-trip collect with these replies, in this order."""
    steps = collect.gather([request(node) for node in nodes], round_)
    assert [m.metadata.dst_node_id for m in next(steps)] == list(nodes)
    try:
        steps.send(iter(replies))
    except StopIteration as end:
        assert isinstance(end.value, Aggregate)
        return end.value
    raise AssertionError("the collect made a second trip")


def plain_stack() -> Stack:
    """A stack of two layers that do not commute."""
    return Stack([PlusOne(), Times()])


def weighted_mean(updates: Sequence[np.ndarray[Any, Any]], weights: Sequence[float]) -> Any:
    """In float64."""
    return np.average(np.asarray(updates, np.float64), axis=0, weights=weights)


class SharedNursery(ForkServer):
    """A nursery that outlives the pools that take workers from it."""

    def close(self) -> None:
        """The pool is done; others may follow."""

    def end(self) -> None:
        """End the process."""
        super().close()


WARM = """
import importlib, json, os, signal, sys, traceback
import umbel.federation, umbel.running, umbel.commands.cli
import umbel.commands.privacy, umbel.server.private.run, umbel.server.private.verify
import umbel.strategies.recipe
import umbel.serve, umbel.server.output.report
import umbel.commands.client, umbel.clients.process.node_process, umbel.clients.process.start


def die_at(place, count, when):
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def watched(*args, **kwargs):
        calls[0] += 1
        if when == "before" and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if when == "after" and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "stop" and calls[0] == count:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    setattr(owner, name, watched)


def play(job):
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    sys.stdout.reconfigure(line_buffering=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["always_save"]:
        saving = importlib.import_module("umbel.server.observers.checkpoints")
        assert saving.EVERY_S > 0  # one that was moved would save as seldom as before
        saving.EVERY_S = 0.0
    for death in job["deaths"]:
        die_at(*death)
    if job["keywords"] is None:
        sys.argv = ["umbel", *job["arguments"]]
        umbel.commands.cli.main()
    else:
        print(json.dumps(umbel.run(**job["keywords"])), flush=True)


def begin(job):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        play(job)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep(job):  # in a process of its own: begins a job, waits for it, writes down how it ended
    child = begin(job)
    print(json.dumps({"pid": child}), flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(job["ended"] + ".new", "w") as file:
        file.write(str(status))
    os.rename(file.name, job["ended"])
    os._exit(0)


print("ready", flush=True)
keepers = set()
for line in sys.stdin:
    job = json.loads(line)
    keepers -= {keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG)[0]}
    if "ended" in job:
        keeper = os.fork()
        if keeper == 0:
            keep(job)
        keepers.add(keeper)
        continue
    child = begin(job)
    try:
        os.setpgid(child, child)  # the child does so too; whoever comes first
    except OSError:
        pass
    print(json.dumps({"pid": child}), flush=True)
    print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (minus the signal's number), and what it said."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of the output."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class Background:
    """A command that runs beside the test; it is used as `subprocess.Popen` is.

    Args:
        pid: of its process, which is a child of another one than the test's.
        ended: the file that will hold its exit status.
    """

    def __init__(self, pid: int, ended: Path) -> None:
        self.pid, self._ended = pid, ended

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return int(self._ended.read_text()) if self._ended.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


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
        self._folder = tempfile.TemporaryDirectory()
        self._begun = 0

    def command(self, *arguments: Any, cwd: Path, **more: Any) -> Ended:
        """Run `umbel ARGUMENTS` in a folder."""
        return self._play(cwd, arguments=[*map(str, arguments)], **more)

    def start(
        self, *arguments: str, cwd: Path, environment: Mapping[str, str], out: Path, err: Path
    ) -> Background:
        """Start `umbel ARGUMENTS`; what it says is added to the files."""
        self._begun += 1
        ended = Path(self._folder.name) / str(self._begun)
        job = {
            "arguments": list(arguments),
            "keywords": None,
            "deaths": [],
            "always_save": False,
            "cwd": str(cwd),
            "environment": dict(environment),
            "out": str(out),
            "err": str(err),
            "ended": str(ended),
        }
        self._ask(job)
        return Background(int(json.loads(self._line())["pid"]), ended)

    def run(self, *, cwd: Path, **keywords: Any) -> Ended:
        """Call `umbel.run(...)`: a run without its report."""
        kept = {name: keywords.pop(name) for name in ("deaths", "during") if name in keywords}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in keywords.items()}
        return self._play(cwd, keywords=plain, **kept)

    def _play(
        self,
        cwd: Path,
        *,
        arguments: Sequence[str] = (),
        keywords: Mapping[str, Any] | None = None,
        deaths: Sequence[tuple[str, int, str]] = (),
        during: Callable[[int], None] | None = None,
    ) -> Ended:
        """`deaths` are places, call numbers and before/after, or stop: a Ctrl-C after the call.

        `during` is given the process id.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        out, err = cwd / "stdout.txt", cwd / "stderr.txt"
        job = {
            "arguments": list(arguments),
            "keywords": keywords,
            "deaths": list(deaths),
            "always_save": keywords is not None,
            "cwd": str(cwd),
            "environment": {name: os.environ[name] for name in ("UMBEL_KEY", "XDG_DATA_HOME")},
            "out": str(out),
            "err": str(err),
        }
        for file in (out, err):
            file.write_bytes(b"")
        self._ask(job)
        child = int(json.loads(self._line())["pid"])
        try:
            if during is not None:
                during(child)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            status = int(json.loads(self._line())["status"])
        return Ended(status, out.read_text(), err.read_text())

    def _ask(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End the process that the commands are forked from."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()
