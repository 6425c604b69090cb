"""What a person sees while a run is under way: a live bar on a terminal, plain lines elsewhere.

Everything goes to the stream that is given, stderr in practice, so that stdout stays for
results. The loop that runs the rounds calls the events of `Progress`; none of them may cost
noticeable time, even when ten thousand replies arrive in one round.
"""

import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichBar
from rich.text import Text

from umbel.core.text import plain

_INTERVAL_S = 0.1  # a live bar is redrawn at most ten times a second
_BAR_WIDTH, _SMALLEST_BAR = 24, 10
_DROPPED = ("nodes", "seconds", "failed", "doing", "metric loss", "epsilon", "eta")  # in this order
_RECENT = 10  # rounds whose median time makes the estimate


class Progress(Protocol):
    """What the loop tells whoever watches."""

    def start(self, title: str, rounds: int, nodes: int) -> None:
        """A run of `rounds` rounds over `nodes` nodes begins."""
        ...

    def message_done(self, done: int, total: int) -> None:
        """`done` of the round's `total` messages have been answered."""
        ...

    def round_done(self, line: Mapping[str, Any]) -> None:
        """A round ended; `line` is what `metrics.jsonl` gets."""
        ...

    def note(self, text: str) -> None:
        """Something that the person should read, now."""
        ...

    def finish(self, text: str) -> None:
        """The run ended, well or badly; the terminal is as it was. May be called twice."""
        ...


class SilentProgress:
    """Says nothing."""

    def start(self, title: str, rounds: int, nodes: int) -> None: ...

    def message_done(self, done: int, total: int) -> None: ...

    def round_done(self, line: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, text: str) -> None: ...


class PlainProgress:
    """One plain line a round, for logs, pipes and continuous integration.

    Args:
        stream: where the lines go.
        clock: seconds that only grow; tests pass their own.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(clock)
        self._finished = False

    def start(self, title: str, rounds: int, nodes: int) -> None:
        self._pace.start(rounds)
        self._print(f"{plain(title)}: {count(rounds, 'round')}, {count(nodes, 'node')}")

    def message_done(self, done: int, total: int) -> None:
        pass

    def round_done(self, line: Mapping[str, Any]) -> None:
        self._pace.round_done(line)
        self._print("  ".join(self._pace.parts(line).values()))

    def note(self, text: str) -> None:
        self._print(f"note: {plain(text)}")

    def finish(self, text: str) -> None:
        if text and not self._finished:
            self._print(text)
        self._finished = True

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class RichProgress:
    """One live bar on a terminal: round, metrics, replies of this round, speed, time left.

    Args:
        stream: the terminal.
        clock: seconds that only grow; tests pass their own.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream, highlight=False)
        self._clock = clock
        self._pace = Pace(clock)
        self._line: dict[str, Any] = {}
        self._message_drawn = self._round_drawn = -math.inf
        self._finished = False
        self._task = TaskID(0)
        self._bar = RichBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            auto_refresh=False,  # no thread: forked workers must not inherit one
            transient=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self, title: str, rounds: int, nodes: int) -> None:
        self._pace.start(rounds)
        self._console.print(
            Text.assemble((plain(title), "bold"), f"  {count(rounds, 'round')}, "
                          f"{count(nodes, 'node')}")
        )  # fmt: skip
        self._task = self._bar.add_task("round 0", total=max(rounds, 1), state="")
        self._bar.start()
        self._console.show_cursor(True)  # so that even kill -9 leaves a usable terminal
        self._draw(0.0, "starting")

    def message_done(self, done: int, total: int) -> None:
        now = self._clock()
        if now - self._message_drawn < _INTERVAL_S:
            return
        self._message_drawn = now
        fraction = min(done / total, 1.0) if total else 0.0
        self._draw(fraction, f"{done:,}/{total:,} replies")

    def round_done(self, line: Mapping[str, Any]) -> None:
        self._pace.round_done(line)
        metrics = line.get("metrics") or self._line.get("metrics")  # not every round has some
        self._line = {**line, "metrics": metrics}
        now = self._clock()
        # A limit of its own: the next message may be minutes away, the old text must not stay.
        if now - self._round_drawn >= _INTERVAL_S:
            self._round_drawn = now
            self._draw(0.0, "")

    def note(self, text: str) -> None:
        self._console.print(Text.assemble(("note: ", "yellow"), plain(text)))

    def finish(self, text: str) -> None:
        if self._finished:
            return
        self._finished = True
        if self._bar.live.is_started:
            self._draw(0.0, "")
            self._bar.stop()
        if text:
            self._console.print(Text(text))

    def _draw(self, fraction: float, doing: str) -> None:
        pace = self._pace
        parts = pace.parts(self._line)
        round_text = parts.pop("round")
        if doing:
            parts["doing"] = doing
        room = self._console.width - len(round_text) - _SMALLEST_BAR - 3
        for kind in _DROPPED:
            if len("  ".join(parts.values())) > room:
                parts.pop(kind, None)
        self._bar.update(
            self._task,
            completed=min(pace.done + fraction, max(pace.rounds, 1)),
            description=round_text,
            state="  ".join(parts.values()),
        )
        self._bar.refresh()


def choose(stream: TextIO) -> Progress:
    """A live bar where `stream` is a terminal that can draw one, plain lines elsewhere."""
    dumb = os.environ.get("TERM", "") in ("dumb", "") or "CI" in os.environ
    return PlainProgress(stream) if dumb or not stream.isatty() else RichProgress(stream)


class Pace:
    """How many rounds are done, how fast they go, and when the last one will be.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._last = 0.0
        self.rounds = 0
        self.done = 0

    def start(self, rounds: int) -> None:
        self.rounds = rounds
        self._last = self._clock()

    def round_done(self, line: Mapping[str, Any]) -> None:
        now = self._clock()
        self.done = int(line.get("round", self.done + 1))
        if self.done > 0:
            self._recent.append(now - self._last)
        self._last = now

    def remaining(self) -> float | None:
        """Seconds until the last round ends, from the median of the latest; None if unknown."""
        if not self._recent or self.done >= self.rounds:
            return None
        ordered = sorted(self._recent)
        return ordered[len(ordered) // 2] * (self.rounds - self.done)

    def parts(self, line: Mapping[str, Any]) -> dict[str, str]:
        """`round 3/30`, `accuracy 0.712`, `10 nodes`, `0.52 s`, `ETA 14 s` …, each by its kind."""
        parts = {"round": f"round {self.done}/{self.rounds}"}
        metrics = line.get("metrics") or _of_training(line)
        first = headline(metrics)
        for name in [first, *(["loss"] if "loss" in metrics and first != "loss" else [])]:
            if name is not None:
                parts[f"metric {name}"] = f"{plain(name)} {number(metrics[name])}"
        if line.get("epsilon") is not None:
            parts["epsilon"] = f"epsilon {number(line['epsilon'])}"
        if line.get("clients") is not None:
            parts["nodes"] = count(int(line["clients"]), "node")
        if line.get("failed"):
            parts["failed"] = f"{len(line['failed'])} failed"
        if line.get("seconds") is not None:
            parts["seconds"] = f"{line['seconds']:.2f} s"
        remaining = self.remaining()
        if remaining is not None:
            parts["eta"] = f"ETA {duration(remaining)}"
        return parts


def _of_training(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the nodes measured while they trained, where nothing else was evaluated."""
    return {f"training {name}": value for name, value in (line.get("train") or {}).items()}


def headline(metrics: Mapping[str, Any]) -> str | None:
    """The name of the one metric to show: an accuracy if there is one, else a loss, else any."""
    for wanted in ("accuracy", "acc", "loss"):
        if wanted in metrics:
            return wanted
        for name in metrics:
            if wanted in re.split(r"[^a-z0-9]+", name.lower()):
                return name
    return next(iter(metrics), None)


def number(value: object) -> str:
    """A metric in three significant digits or so; words for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if isinstance(value, float) and (value == 0 or 0.001 <= abs(value) < 1):
        return f"{value:.3f}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`14 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def count(amount: int, noun: str) -> str:
    """`1 node`, `1,000 nodes`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"
