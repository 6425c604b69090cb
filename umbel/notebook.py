"""Progress in a notebook's cell: one line that is redrawn, with a bar, and notes above it."""

import html
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from umbel.core.text import plain
from umbel.server.output.progress import Pace, Progress, count

_INTERVAL_S = 0.2  # a cell is redrawn at most five times a second


class Cell(Protocol):
    """A piece of output that can be redrawn, as IPython's display handle can."""

    def update(self, shown: Any) -> None:
        """Put `shown` in the place of what was there."""
        ...


class _Html:
    """Markup as IPython displays it, with plain text for where there is no browser."""

    def __init__(self, markup: str, text: str) -> None:
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


class NotebookProgress:
    """Shows a run in the output of a cell.

    Args:
        display: puts an object into the cell's output and returns a handle to redraw it.
        clock: seconds that only grow; tests pass their own.
    """

    def __init__(
        self, display: Callable[[Any], Cell], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._display, self._clock = display, clock
        self._pace = Pace(clock)
        self._cell: Cell | None = None
        self._title, self._last, self._notes = "", "", list[str]()
        self._done = self._rounds = 0
        self._drawn = float("-inf")

    def start(self, title: str, rounds: int, nodes: int) -> None:
        """See `Progress`."""
        self._pace.start(rounds)
        self._rounds = rounds
        self._title = f"{plain(title)}: {count(rounds, 'round')}, {count(nodes, 'node')}"
        self._draw()

    def message_done(self, done: int, total: int) -> None:
        """See `Progress`."""

    def round_done(self, line: Mapping[str, Any]) -> None:
        """See `Progress`."""
        self._pace.round_done(line)
        self._done = int(line["round"])
        self._last = "  ".join(self._pace.parts(line).values())
        if self._clock() - self._drawn >= _INTERVAL_S or self._done == self._rounds:
            self._draw()

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._notes.append(plain(text))
        self._draw()

    def finish(self, text: str) -> None:
        """See `Progress`."""
        if text:
            self._last = text
        self._draw()

    def _draw(self) -> None:
        said = [*(f"note: {note}" for note in self._notes), self._title, self._last]
        text = "\n".join(filter(None, said))
        bar = f'<progress value="{self._done}" max="{max(1, self._rounds)}"></progress>'
        shown = _Html("<br>".join([*map(html.escape, filter(None, said)), bar]), text)
        self._drawn = self._clock()
        if self._cell is None:
            self._cell = self._display(shown)
        else:
            self._cell.update(shown)


def notebook_progress() -> Progress | None:
    """Progress for the cell that is running; None outside of notebooks."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.display import display

    return NotebookProgress(lambda shown: display(shown, display_id=True))
