"""Flower's own programs as child processes, none of which outlives a start too many."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError

_PATIENCE_S = 20.0


class FlowerProcess:
    """A long-running program of Flower's.

    Which process it is is kept in a file: after a kill -9 of its parent it would run on and keep
    its port, so the next start ends it first.

    Args:
        home: Flower's folder in the state folder.
        command: program and arguments.
        options: further arguments of `subprocess.Popen`.
    """

    def __init__(self, home: Path, command: Sequence[str], **options: Any) -> None:
        self._file = home / "process"
        end_earlier(home)
        # A session of its own: Ctrl-C reaches the parent, which ends things in order.
        self._process = subprocess.Popen(command, start_new_session=True, **options)
        while self.running() and not _command_of(self._process.pid):
            time.sleep(0.01)  # it is not yet the program by whose name the next start knows it
        self._file.write_text(f"{self._process.pid} {command[0]}")

    def running(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def end(self) -> None:
        """End it, by force if it must be."""
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.unlink(missing_ok=True)


def end_earlier(home: Path) -> None:
    """End the program that an earlier start, which was killed, has left behind."""
    with contextlib.suppress(OSError, ValueError):
        number, _, program_name = (home / "process").read_text().partition(" ")
        pid = int(number)
        until = time.monotonic() + _PATIENCE_S
        os_signal = signal.SIGTERM
        while program_name and program_name in _command_of(pid):
            os.kill(pid, os_signal)
            if time.monotonic() > until:
                os_signal = signal.SIGKILL
            time.sleep(0.2)


def _command_of(pid: int) -> str:
    """The command line of a process; empty if there is none (any more)."""
    file = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        return file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    shown = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout


def program(name: str) -> str:
    """One of Flower's commands, of this environment.

    Raises:
        ConfigError: it is not installed.
    """
    file = Path(sys.executable).parent / name
    if not file.exists():
        raise ConfigError(f"{file} is missing; install flwr in the environment of umbel")
    return str(file)


def environment(home: Path, **more: str) -> Mapping[str, str]:
    """The environment for Flower's programs: a home of their own, and no telemetry."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Flower starts `flower-superexec` and others by name: they are beside this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    own = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}
    return os.environ | own | more


__all__: Sequence[str] = ["FlowerProcess", "end_earlier", "environment", "program"]
