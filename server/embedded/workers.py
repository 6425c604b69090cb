"""A pool of worker processes: started from a nursery, fed groups of tasks, replaced when dead."""

import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError, RunError
from umbel.core.flower import CRASHED
from umbel.server.embedded.executor import Done, Task
from umbel.server.embedded.mapped import File, reuse_memory
from umbel.server.embedded.packing import Packed, by_file, pack, receive, send, unpack

PRELOAD = ("torch", "flwr.clientapp", "umbel.server.embedded.executor", "umbel.core.app_folder")
"""What the nursery imports once for all workers."""

MAX_STARTUP_FAILURES = 3
"""Processes in a row that may die while they load the app; one may be somebody's mistake."""


class ForkServer:
    """Handle of the process that forks workers; make it early, its imports take a second."""

    def __init__(self, threads: int = 1, preload: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
        )
        # is_available() must not initialise CUDA in a process that forks
        environment = os.environ | limits | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        module = ["-P", "-m", "umbel.server.embedded.fork_server"]
        command = [sys.executable, *module, str(theirs.fileno()), *PRELOAD, *preload]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._control = ours

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process id and our end of its socket.

        Raises:
            RunError: the nursery has died.
        """
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            answer = self._control.recv(8, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        theirs.close()
        if len(answer) != 8:
            ours.close()
            raise RunError("worker processes cannot be started: the process they come from died")
        return struct.unpack("<q", answer)[0], ours

    def close(self) -> None:
        """End the nursery; its workers end when their sockets close."""
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class _Worker:
    pid: int
    pipe: socket.socket
    ready: bool = False
    busy: Sequence[Task] = ()
    holds: frozenset[int] = frozenset()
    """Numbers of the contents that it has: those of its last group."""


@dataclass(frozen=True)
class _Content:
    """What several nodes are sent, on its way to the workers.

    Attributes:
        number: by which workers know it.
        packed: the content.
        file: with its large blobs, which all workers map.
    """

    number: int
    packed: Packed
    file: File | None


class Workers:
    """Runs groups of tasks on `count` processes, one group a process at a time.

    Args:
        nursery: where the processes come from; closed with the pool.
        count: how many processes.
        app: the app's folder.
        run_config: the run's options.
        nodes: how many virtual nodes there are.
        threads: of a node's tensor operations.
        log: where the app's own output goes.
        mapped: large arrays of replies are mapped from the workers' files; else they are bytes,
            as an app may expect that knows Flower alone.
    """

    def __init__(
        self,
        nursery: ForkServer,
        count: int,
        app: Path,
        *,
        run_config: Mapping[str, Any],
        nodes: int,
        threads: int = 1,
        log: Path | None = None,
        mapped: bool = False,
    ) -> None:
        self._mapped = mapped
        self._contents: dict[int, _Content] = {}
        self._sent = 0
        self._nursery = nursery
        self._start = pack(
            {
                "path": app,
                "run_config": dict(run_config),
                "nodes": nodes,
                "threads": threads,
                "log": log,
            }
        )
        self._stillborn = 0
        reuse_memory()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._workers = [self._spawn() for _ in range(count)]

    @property
    def idle(self) -> bool:
        """Whether a process is waiting for work."""
        return any(worker.ready and not worker.busy for worker in self._workers)

    @property
    def busy(self) -> bool:
        """Whether any process is at work or still loading the app."""
        return any(worker.busy or not worker.ready for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [worker.pid for worker in self._workers]

    def give(self, tasks: Sequence[Task]) -> None:
        """Send a group to an idle process.

        What many nodes get goes to a process once, and stays there until its next group.
        """
        worker = next(w for w in self._workers if w.ready and not w.busy)
        worker.busy = tasks
        contents = {id(task.content): self._content(task.content) for task in tasks}
        numbers = frozenset(content.number for content in contents.values())
        new = [each for each in contents.values() if each.number not in worker.holds]
        worker.holds = numbers
        bare = [replace(task, content=contents[id(task.content)].number) for task in tasks]
        try:
            send(worker.pipe, pack((bare, numbers, [content.number for content in new])))
            for content in new:
                send(worker.pipe, content.packed, content.file)
        except OSError:  # it died; wait() finds out and reports its tasks
            with suppress(OSError):
                worker.pipe.shutdown(socket.SHUT_RDWR)

    def _content(self, packed: Packed) -> _Content:
        """The content as workers know it; what none of them works on any longer is let go."""
        if id(packed) not in self._contents:
            busy = {id(task.content) for worker in self._workers for task in worker.busy}
            self._let_go(self._contents.keys() - busy)
            self._sent += 1
            self._contents[id(packed)] = _Content(self._sent, packed, by_file(packed))
        return self._contents[id(packed)]

    def _let_go(self, keys: Iterable[int]) -> None:
        for key in list(keys):
            del self._contents[key]

    def rest(self) -> None:
        """Nothing is to be done: what the processes hold for their next groups is let go."""
        self._let_go(self._contents)
        for worker in self._workers:
            if worker.ready and not worker.busy and worker.holds:
                worker.holds = frozenset()
                with suppress(OSError):
                    send(worker.pipe, pack(([], frozenset(), [])))

    def wait(self, timeout: float | None) -> list[tuple[Task, Done | None]]:
        """Wait until a process has something to say or `wake` is called; finished tasks.

        None comes with tasks of a group that the app does not run as one.

        Raises:
            ConfigError: the app does not import in the workers.
        """
        finished: list[tuple[Task, Done | None]] = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
                continue
            finished += self._hear(key.data)
        return finished

    def wake(self) -> None:
        """Make a `wait` in another thread return."""
        self._wake_write.send(b"!")

    def abandon(self, wanted: Container[str]) -> list[Task]:
        """Kill the processes none of whose messages is wanted, and replace them; their tasks."""
        tasks: list[Task] = []
        for worker in list(self._workers):
            ids = [task.envelope.message_id for task in worker.busy]
            if ids and not any(message_id in wanted for message_id in ids):
                tasks += self._replace(worker)
        return tasks

    def close(self) -> None:
        """Kill all processes. What they were doing is lost."""
        for worker in self._workers:
            self._terminate(worker)
        self._workers = []
        self._let_go(self._contents)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        self._nursery.close()

    def _hear(self, worker: _Worker) -> Sequence[tuple[Task, Done | None]]:
        try:
            said = unpack(receive(worker.pipe, mapped=self._mapped))
        except (EOFError, OSError):
            return self._on_exit(worker)
        if not worker.ready:
            if said["error"] is not None:
                raise ConfigError(said["error"])
            worker.ready = True
            self._stillborn = 0
            return []
        tasks, worker.busy = worker.busy, ()
        return list(zip(tasks, said or [None] * len(tasks), strict=True))

    def _on_exit(self, worker: _Worker) -> list[tuple[Task, Done | None]]:
        """Replace a dead process; its task becomes an error reply, the node's state stays.

        Of a group, nobody knows which node it was: each is to be tried by itself.
        """
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn > MAX_STARTUP_FAILURES:
                raise RunError(
                    f"worker process {worker.pid} died before it had loaded the app, as "
                    f"{MAX_STARTUP_FAILURES} had before; see the run's log.txt, or try --workers 0"
                )
        tasks = self._replace(worker)
        if len(tasks) > 1:
            return [(task, None) for task in tasks]
        reason = f"its worker process {worker.pid} died; another has taken its place"
        return [(task, Done(task.envelope.error(CRASHED, reason), task.state)) for task in tasks]

    def _replace(self, worker: _Worker) -> Sequence[Task]:
        self._terminate(worker)
        self._workers[self._workers.index(worker)] = self._spawn()
        return worker.busy

    def _spawn(self) -> _Worker:
        pid, pipe = self._nursery.fork()
        worker = _Worker(pid, pipe)
        self._selector.register(pipe, selectors.EVENT_READ, worker)
        send(pipe, self._start)
        return worker

    def _terminate(self, worker: _Worker) -> None:
        self._selector.unregister(worker.pipe)
        worker.pipe.close()
        try:
            os.kill(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
