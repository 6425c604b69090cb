"""Progress: what is said, how often, and that the terminal is left as it was."""

import io
import math
import os
import pty
import re
import select
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.server.output.progress import (
    Pace,
    PlainProgress,
    Progress,
    RichProgress,
    SilentProgress,
    choose,
    duration,
    headline,
    number,
)

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal and counts its writes."""

    writes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def line(number: int, **changes: Any) -> dict[str, Any]:
    metrics = {"loss": 0.81, "accuracy": 0.7123}
    return {"round": number, "seconds": 0.52, "clients": 10, "metrics": metrics, **changes}


def drive(progress: Progress, clock: Clock) -> None:
    progress.start("fashion", 30, 100)
    for at in range(1, 4):
        for done in range(1, 11):
            clock.now += 0.06
            progress.message_done(done, 10)
        progress.round_done(line(at))
    progress.note("node 7 is slow")
    progress.finish("stopped after 3 rounds")


def test_one_plain_line_a_round() -> None:
    stream, clock = io.StringIO(), Clock()
    drive(PlainProgress(stream, clock), clock)
    assert stream.getvalue().splitlines() == [
        "fashion: 30 rounds, 100 nodes",
        "round 1/30  accuracy 0.712  loss 0.810  10 nodes  0.52 s  ETA 17 s",
        "round 2/30  accuracy 0.712  loss 0.810  10 nodes  0.52 s  ETA 17 s",
        "round 3/30  accuracy 0.712  loss 0.810  10 nodes  0.52 s  ETA 16 s",
        "note: node 7 is slow",
        "stopped after 3 rounds",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": {}}, "round 1/2  10 nodes  0.52 s"),
        ({"metrics": None, "seconds": None, "clients": None}, "round 1/2"),
        ({"metrics": {"rmse": 1234.5}, "clients": 1}, "round 1/2  rmse 1,234  1 node  0.52 s"),
        ({"metrics": {"loss": math.nan}}, "round 1/2  loss not a number  10 nodes  0.52 s"),
        ({"metrics": {"a\nb": 1}, "epsilon": 2.5}, "a b 1  epsilon 2.5  10 nodes"),
        ({"failed": [{}, {}], "epsilon": math.inf}, "epsilon infinite  10 nodes  2 failed"),
    ],
)
def test_lines_say_what_there_is(changes: dict[str, Any], expected: str) -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream, Clock())
    plain.start("t", 2, 1)
    plain.round_done(line(1, **changes))
    assert expected in stream.getvalue()


def test_the_bar_shows_round_metrics_replies_and_time_left() -> None:
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    drive(progress, clock)
    text = stream.getvalue()
    for shown in ("fashion", "round 3/30", "accuracy 0.712", "loss 0.810", "/10 replies", "ETA"):
        assert shown in text
    assert "note: " in text and "node 7 is slow" in text
    assert text.rstrip().endswith("stopped after 3 rounds")


def test_the_last_metrics_stay_in_view_while_there_are_no_new_ones() -> None:
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    progress.start("t", 9, 1)
    progress.round_done(line(1))
    clock.now += 1
    stream.truncate(0)
    progress.round_done(line(2, metrics={}))
    progress.finish("")
    assert "round 2/9" in stream.getvalue() and "accuracy 0.712" in stream.getvalue()


def test_ten_thousand_messages_a_round_are_drawn_ten_times_a_second() -> None:
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    progress.start("t", 3, 10_000)
    begin = stream.writes
    for done in range(10_000):
        clock.now += 0.0001  # one second in all
        progress.message_done(done + 1, 10_000)
    assert 5 <= stream.writes - begin <= 2 * 11
    progress.finish("")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_keeps_what_matters_most_on_one_line(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    progress.start("t", 30, 100)
    clock.now += 9
    progress.round_done(line(3, failed=[{}], epsilon=1.25))
    clock.now += 1
    stream.truncate(0)
    progress.message_done(5, 10)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", stream.getvalue()).strip("\x00")
    progress.finish("")
    assert "round 3/30" in drawn
    assert width < 60 or ("accuracy 0.712" in drawn and "ETA 4 min" in drawn)
    assert width < 120 or ("loss 0.810" in drawn and "5/10 replies" in drawn)
    assert "\n" not in drawn and len(drawn) <= width


def test_the_cursor_is_never_left_hidden() -> None:
    stream = Terminal()
    progress = RichProgress(stream, Clock())
    progress.start("t", 3, 1)
    text = stream.getvalue()
    assert text.rfind(SHOW) > text.rfind(HIDE), "a kill now must leave a usable terminal"
    progress.message_done(1, 2)
    progress.finish("")
    progress.finish("twice does no harm")
    text = stream.getvalue()
    assert text.rfind(SHOW) > text.rfind(HIDE)
    assert "twice" not in text


def test_finish_without_start() -> None:
    for progress in (RichProgress(Terminal()), PlainProgress(io.StringIO()), SilentProgress()):
        progress.note("early")
        progress.finish("no run")


def test_text_is_not_markup() -> None:
    stream = Terminal()
    progress = RichProgress(stream, Clock())
    progress.start("[red]app[/nope]", 1, 1)
    progress.note("[bold]literal[/]")
    progress.round_done(line(1, metrics={"[x]": 1.0}))
    progress.finish("[/also]")
    for shown in ("[red]app[/nope]", "[bold]literal[/]", "[x] 1", "[/also]"):
        assert shown in stream.getvalue()


def test_who_watches_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(io.StringIO()), PlainProgress)
    assert isinstance(choose(Terminal()), RichProgress)
    monkeypatch.setenv("CI", "true")
    assert isinstance(choose(Terminal()), PlainProgress)
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(Terminal()), PlainProgress)


def test_silence() -> None:
    drive(SilentProgress(), Clock())


def test_ctrl_c_on_a_real_terminal_gives_the_cursor_back() -> None:
    """A child that draws on a pseudo-terminal is interrupted by the terminal itself."""
    code = (
        "import sys, time\n"
        "from umbel.server.output.progress import choose\n"
        "progress = choose(sys.stderr)\n"
        "progress.start('t', 5, 1)\n"
        "try:\n"
        "    while True: progress.message_done(1, 2); time.sleep(0.05)\n"
        "finally:\n"
        "    progress.finish('interrupted')\n"
    )
    main, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stderr=side, stdout=side, start_new_session=False,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(side)
    text = ""
    interrupted = False
    try:
        while select.select([main], [], [], 60)[0]:
            try:
                chunk = os.read(main, 4096)
            except OSError:  # the last writer has closed the terminal
                break
            text += chunk.decode(errors="replace")
            if "replies" in text and not interrupted:
                interrupted = True
                os.write(main, b"\x03")
    finally:
        child.kill()
        child.wait()
        os.close(main)
    assert "KeyboardInterrupt" in text and "interrupted" in text
    assert text.rfind(SHOW) > text.rfind(HIDE)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_the_estimate_is_the_median_of_recent_rounds_times_what_is_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(10)
    assert pace.remaining() is None
    for at, seconds in enumerate((2.0, 2.0, 50.0), start=1):
        clock.now += seconds
        pace.round_done({"round": at})
    assert pace.remaining() == 14.0, "one slow round is not seven"
    pace.round_done({"round": 10})
    assert pace.remaining() is None


def test_round_zero_and_resumed_runs() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(20)
    clock.now += 100
    pace.round_done({"round": 0})
    assert pace.remaining() is None, "the evaluation before training says nothing of a round"
    clock.now += 1
    pace.round_done({"round": 13})
    assert pace.done == 13 and pace.remaining() == 7.0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["loss", "accuracy"], "accuracy"),
        (["loss", "test_accuracy", "x"], "test_accuracy"),
        (["eval/loss", "val-acc"], "val-acc"),
        (["x", "eval_loss"], "eval_loss"),
        (["rmse", "r2"], "rmse"),
        (["accelerations", "glossary"], "accelerations"),
    ],
)
def test_the_metric_to_show(names: list[str], expected: str | None) -> None:
    assert headline(dict.fromkeys(names, 0.0)) == expected


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 59.4, 59.6, 200, 3599.7, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip


@given(st.one_of(st.floats(), st.integers(-(10**30), 10**30), st.text(), st.booleans(), st.none()))
def test_numbers_are_short_words(value: object) -> None:
    text = number(value)
    assert "\n" not in text
    if isinstance(value, float):
        assert len(text) <= 12


def test_numbers() -> None:
    values = (0, 0.0, 0.5, 0.0001, 12.345, 999.6, 1234.5, -0.25, 1e9)
    shown = ["0", "0.000", "0.500", "0.0001", "12.3", "1,000", "1,234", "-0.250", "1e+09"]
    assert [number(value) for value in values] == shown
