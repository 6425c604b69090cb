"""The process that worker processes are forked from.

It has imported what every worker needs and has never run a tensor operation, so forks are quick
(milliseconds), safe (one thread) and share the memory of the libraries. Asked over a socket, it
forks a worker and hands it the other end of a second socket.

    engine -> here      one byte and a socket        a worker, please
    here -> engine      its process id
    engine -> worker    the app, then groups of tasks
    worker -> engine    ready, then groups of results; none for a group that is better split
"""

import contextlib
import importlib
import os
import signal
import socket
import struct
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

_PID = struct.Struct("<q")


def serve(control: socket.socket, preload: list[str]) -> None:
    """Fork a worker for each request until the engine closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    for name in preload:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while True:
        _, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not handles:
            return
        child = os.fork()
        if child == 0:
            control.close()
            status = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                work(socket.socket(fileno=handles[0]))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(handles[0])
        control.sendall(_PID.pack(child))


def work(pipe: socket.socket) -> None:
    """A worker: load the app, then run groups of tasks until the engine hangs up."""
    import torch  # here and not above: the preloading decides when this is imported

    from umbel.core.app_folder import open_app
    from umbel.core.streams import expendable
    from umbel.server.embedded.executor import Executor, Task
    from umbel.server.embedded.mapped import reuse_memory
    from umbel.server.embedded.packing import Packed, pack, receive, send, unpack

    try:
        reuse_memory()
        start: dict[str, Any] = unpack(receive(pipe))
        _redirect(start["log"])
        torch.set_num_threads(start["threads"])
        try:
            app = open_app(start["path"]).client_app()
        except Exception as error:
            send(pipe, pack({"error": str(error)}))
            return
        executor = Executor(app, start["run_config"], start["nodes"], start["threads"])
        send(pipe, pack({"error": None}))
        contents: dict[int, Packed] = {}
        while True:
            bare, held, new = unpack(receive(pipe))
            contents = {number: contents[number] for number in held if number in contents}
            for number in new:
                contents[number] = receive(pipe, keep=True)
            tasks: list[Task] = [replace(task, content=contents[task.content]) for task in bare]
            if not tasks:  # nothing is to be done for now
                continue
            with expendable():  # the next task begins with a seed of its own
                done = executor.one_by_one(tasks) if len(tasks) == 1 else executor.together(tasks)
            del tasks
            packed = pack(done)
            del done
            send(pipe, packed)
            del packed
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _redirect(log: Path | None) -> None:
    """Append what the app prints to the run's log."""
    if log is None:
        return
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
