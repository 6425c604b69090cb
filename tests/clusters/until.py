"""Waiting for what other processes do."""

import threading
import time
from collections.abc import Callable

START_S = 120.0


def until(condition: Callable[[], bool], seconds: float = START_S) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        threading.Event().wait(0.05)
