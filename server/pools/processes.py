"""The pool of worker processes of this machine: forked, fed groups of tasks, replaced when dead.

Nothing here has a thread of its own: whoever waits for replies listens to the processes (`wait`).
"""

import contextlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

from umbel.core.errors import ConfigError, RunError
from umbel.server.embedded.mapped import File, reuse_memory
from umbel.server.embedded.packing import Packed, by_file, pack, receive, send, unpack
from umbel.server.pools.base import Group, Pool, Results, Work, WorkerLostError

PRELOAD = ("torch", "flwr.clientapp", "umbel.server.embedded.executor", "umbel.core.app_folder")
"""What the fork server imports once for all workers."""

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
        module = ["-P", "-m", "umbel.server.pools.fork_server"]
        command = [sys.executable, *module, str(theirs.fileno()), *PRELOAD, *preload]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._control = ours
        self._asked = False

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process id and our end of its socket.

        Raises:
            RunError: the fork server has died.
        """
        self._asked = True
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
        """End the process; its workers end when their sockets close."""
        self._control.close()
        if not self._asked:  # it may still import, which nobody shall wait for
            self._process.kill()
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
    busy: Group = ()
    future: Future[Results] | None = None
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


class Processes(Pool):
    """Runs groups of tasks on `count` processes, one group a process at a time.

    Args:
        count: how many processes.
        fork_server: where they come from, started early to save time; made here if None. It is
            closed with the pool.

    Raises:
        ConfigError: the count is below 1.
    """

    maps_files = True

    def __init__(self, count: int, fork_server: ForkServer | None = None) -> None:
        if count < 1:
            raise ConfigError(f"workers is {count}; use 0 to run the nodes in this process")
        self._count = count
        self._fork_server = fork_server
        self._start = pack(None)
        self._contents: dict[int, _Content] = {}
        self._sent = 0
        self._startup_failures = 0
        self._pending: deque[tuple[Group, Future[Results]]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._workers: list[_Worker] = []

    @property
    def workers(self) -> int:
        return self._count

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def start(self, work: Work) -> None:
        """Fork the processes, which load the app by themselves."""
        if self._fork_server is None:
            self._fork_server = ForkServer(work.threads)
        self._count = min(self._count, work.nodes)
        self._start = pack(
            {
                "path": work.app,
                "run_config": dict(work.run_config),
                "nodes": work.nodes,
                "threads": work.threads,
                "log": work.log,
            }
        )
        reuse_memory()
        self._workers = [self._spawn() for _ in range(self._count)]

    def submit(self, group: Group) -> Future[Results]:
        """Send a group to an idle process, or to the next that is."""
        future: Future[Results] = Future()
        self._pending.append((group, future))
        self._feed()
        return future

    def _feed(self) -> None:
        """Give what waits to the processes that are idle."""
        for worker in self._workers:
            if not self._pending:
                return
            if worker.ready and not worker.busy:
                self._give(worker, *self._pending.popleft())

    def _give(self, worker: _Worker, group: Group, future: Future[Results]) -> None:
        """Send a group to a process.

        What many nodes get goes to a process once, and stays there until its next group.
        """
        worker.busy, worker.future = group, future
        contents = {id(task.content): self._content(task.content) for task in group}
        numbers = frozenset(content.number for content in contents.values())
        new = [each for each in contents.values() if each.number not in worker.holds]
        worker.holds = numbers
        bare = [replace(task, content=contents[id(task.content)].number) for task in group]
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

    def wait(self, news: threading.Event, timeout: float | None) -> None:  # noqa: ARG002
        """Listen until a process has something to say, `wake` is called or the time is over.

        Raises:
            ConfigError: the app does not import in the workers.
        """
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
                continue
            self._hear(key.data)

    def wake(self) -> None:
        with suppress(OSError):  # the pool has been closed meanwhile
            self._wake_write.send(b"!")

    def abandon(self, future: Future[Results]) -> None:
        """Kill the process that is busy with this group, and replace it."""
        future.cancel()
        self._pending = deque(waiting for waiting in self._pending if waiting[1] is not future)
        for worker in list(self._workers):
            if worker.future is future:
                self._replace(worker)

    def close(self) -> None:
        """Kill all processes. What they were doing is lost."""
        for worker in self._workers:
            self._terminate(worker)
        self._workers = []
        self._pending.clear()
        self._let_go(self._contents)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        if self._fork_server is not None:
            self._fork_server.close()

    def _hear(self, worker: _Worker) -> None:
        try:
            said = unpack(receive(worker.pipe))
        except (EOFError, OSError):
            self._on_exit(worker)
            return
        if not worker.ready:
            if said["error"] is not None:
                raise ConfigError(said["error"])
            worker.ready = True
            self._startup_failures = 0
        else:
            future, worker.busy, worker.future = worker.future, (), None
            if future is not None:
                future.set_result(said)
        self._feed()

    def _on_exit(self, worker: _Worker) -> None:
        """Replace a dead process, and say so to whoever waits for its group."""
        if not worker.ready:
            self._startup_failures += 1
            if self._startup_failures > MAX_STARTUP_FAILURES:
                raise RunError(
                    f"worker process {worker.pid} died before it had loaded the app, as "
                    f"{MAX_STARTUP_FAILURES} had before; see the run's log.txt, or try --workers 0"
                )
        future = worker.future
        self._replace(worker)
        if future is not None:
            reason = f"its worker process {worker.pid} died; another has taken its place"
            future.set_exception(WorkerLostError(reason))

    def _replace(self, worker: _Worker) -> None:
        self._terminate(worker)
        self._workers[self._workers.index(worker)] = self._spawn()

    def _spawn(self) -> _Worker:
        assert self._fork_server is not None
        pid, pipe = self._fork_server.fork()
        worker = _Worker(pid, pipe)
        self._selector.register(pipe, selectors.EVENT_READ, worker)
        send(pipe, self._start)
        return worker

    def _terminate(self, worker: _Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):  # a second Ctrl-C may cut this short
            self._selector.unregister(worker.pipe)
        worker.pipe.close()
        try:
            os.kill(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
