"""Checkpoints: after a round where that costs little, always before what cannot be repeated."""

import time

from flwr.serverapp import Grid

from umbel.server import checkpoint
from umbel.server.checkpoint import Position
from umbel.server.drive import states_of
from umbel.server.observers.base import RoundDone, Watcher
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.collect import Exchange, Seals

EVERY_S = 1.0
"""Rounds that are shorter than this may share a checkpoint; a resumed run repeats them."""
SHARE = 0.05
"""Where saving is quick, a checkpoint comes as soon as it costs no more than this share."""


class Checkpoints(Watcher):
    """Saves positions, and finds the last one again.

    Args:
        run: the run directory.
        grid: the engine; the states of virtual nodes are saved with a position.
        collect: of the run's stack.
        rounds: how many are planned; the last one is always saved.
        progress: where a person watches.
    """

    def __init__(
        self, run: RunDirectory, grid: Grid, collect: Exchange, rounds: int, progress: Progress
    ) -> None:
        self._run, self._rounds, self._progress = run, rounds, progress
        self._path = run.checkpoint_path
        self._saved_at = self._took = 0.0
        self._states = states_of(grid)
        self.once = isinstance(collect, Seals) and self._states is None
        """Whether nodes answer a round once only: in secret sums, where their records stay."""

    def load(self) -> Position | None:
        """The last position, and with it the engine and the run's lines; None of a new run."""
        position = checkpoint.load(self._path)
        if position is None:
            self._run.truncate_rounds(-1)
            return None
        if self._states is not None:
            self._states.restore(checkpoint.load_nodes(self._path, position.round))
        if not self.once:
            self._tell_what_is_repeated(position.round)
        self._run.truncate_rounds(position.round)
        return position

    def begin_round(self, number: int) -> None:
        """Before any message of a round that nodes would not answer again."""
        if self.once:
            checkpoint.begin(self._path, number)

    def begun(self) -> int:
        """The round that was under way when the run was stopped, where it cannot be repeated."""
        return checkpoint.begun(self._path) if self.once else 0

    def round_done(self, done: RoundDone, position: Position) -> Position:
        now = time.monotonic()
        wait = min(EVERY_S, self._took / SHARE)
        if done.number == self._rounds or now - self._saved_at >= wait:
            self.save(position)
        return position

    def stopped(self, position: Position) -> None:
        """What was paid for is kept, whenever this run is looked at again."""
        self.save(position)

    def save(self, position: Position) -> None:
        """Save a position now."""
        now = time.monotonic()
        changed = {} if self._states is None else self._states.take_changed()
        checkpoint.save(self._path, position, changed)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - now

    def _tell_what_is_repeated(self, saved: int) -> None:
        done = max((int(line.get("round", 0)) for line in self._run.rounds()), default=0)
        if done > saved:
            which = f"round {done}" if done == saved + 1 else f"rounds {saved + 1} to {done}"
            self._progress.note(
                f"{which} had ended and not been saved yet; the run goes on before, and repeats it"
            )
