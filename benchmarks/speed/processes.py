"""Programs that a benchmark starts: when their rounds end, what memory they take, how they end.

Every program that is compared prints a line `round N/M ...` when a round is done, so all of
them are timed by the same clock, from the outside.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel.core.errors import RunError

_ROUND = re.compile(r"round (\d+)/(\d+)")
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Watched:
    """What was seen of a command.

    Attributes:
        ends: seconds from its start to the end of each round.
        seconds: until it had ended.
        peak_bytes: most memory of the process tree (proportional set size); 0 if not watched.
    """

    ends: tuple[float, ...]
    seconds: float
    peak_bytes: int = 0

    @property
    def round_s(self) -> float:
        """Median seconds of a round, without the first."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))

    @property
    def start_up_s(self) -> float:
        """Seconds before the rounds: the end of the first less an ordinary round."""
        return self.ends[0] - self.round_s


def watch(command: Sequence[str], folder: Path, *, memory: bool = False) -> Watched:
    """Run a command to its end.

    Args:
        command: the command; it must print a line a round.
        folder: where it runs.
        memory: watch its memory, which slows it down a little.

    Raises:
        RunError: it failed, or printed fewer than three rounds.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_sample, args=(process.pid, peak, done))
    if memory:
        watcher.start()
    ends: list[float] = []
    said: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        now = time.perf_counter() - began
        said.append(line)
        found = _ROUND.search(line)
        if found and int(found[1]) == len(ends) + 1:
            ends.append(now)
    process.stdout.close()
    status = process.wait()
    seconds = time.perf_counter() - began
    done.set()
    if memory:
        watcher.join()
    if status != 0 or len(ends) < 3:
        tail = "".join(said[-15:])
        raise RunError(f"{' '.join(command)} ended with status {status}:\n{tail}")
    return Watched(tuple(ends), seconds, peak[0])


def _sample(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(_SAMPLE_S):
        peak[0] = max(peak[0], sum(proportional(p) for p in tree(pid)))


def tree(pid: int) -> list[int]:
    """A process and all that descend from it; Linux only, elsewhere the process alone."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        found.append(parent)
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                queue += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # the thread has ended
    return found


def proportional(pid: int) -> int:
    """Bytes of a process, pages that it shares divided among their users; 0 if unknown."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident() -> int:
    """Bytes of this process in memory; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def anonymous() -> int:
    """Bytes of this process that are in no file: what it alone takes; 0 if unknown."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def growth(work: Callable[[], object]) -> float:
    """Bytes by which this process grows while it does some work, looked at every 2 ms."""
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return float(max(most - before, 0))


def umbel(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """`umbel WORDS...` in a folder, with one thread; what it says goes to the file `log` there."""
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from umbel.commands.cli import main; main()", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )


@contextlib.contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """The process, ended when the block ends: asked first, and killed if it does not listen."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
