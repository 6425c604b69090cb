"""Where a run begins: with the first model, or where its checkpoint stands."""

from umbel.core.records import Tree
from umbel.server import checkpoint
from umbel.server.checkpoint import Position
from umbel.server.drive import go_on
from umbel.server.parts import RunParts
from umbel.strategies.layout import averaged_buffers


class Beginning:
    """Makes or finds the position before the first round of this process.

    Args:
        parts: of the run.
        first: the parameters of the first model.
    """

    def __init__(self, parts: RunParts, first: Tree) -> None:
        self._parts, self._first = parts, first

    def position(self) -> Position:
        """The position to go on from, once observers have seen it."""
        parts = self._parts
        position = parts.checkpoints.load()
        if position is not None:
            lines = parts.run.rounds()
            for observer in parts.observers:
                position = observer.resume(position, lines)
            go_on(parts.grid, [line for line in lines if line["round"] <= position.round])
            return self._after_a_stop(position)
        position = self._new()
        for observer in parts.observers:
            position = observer.begin(position)
        return self._after_a_stop(position)

    def _new(self) -> Position:
        parts = self._parts
        parameters = parts.requests.share(parts.manifest.flatten(self._first))
        self._first = {}  # the position holds the model from now on
        buffers = checkpoint.no_buffers()
        if parts.synced_buffers.size:
            synced = averaged_buffers(parts.job.buffers, parts.job.options.buffers)
            buffers = parts.synced_buffers.flatten(synced)
        return Position(
            round=0,
            parameters=parameters,
            buffers=buffers,
            slots=parts.optimizer.init(parameters),
            layers=parts.job.stack.init(parts.manifest.size),
        )

    def _after_a_stop(self, position: Position) -> Position:
        """Go on with a round that no node has begun: those give no second update for one."""
        parts = self._parts
        begun = parts.checkpoints.begun()
        if begun <= position.round:
            return position
        entering = parts.population.facts.replace(round=begun)
        parts.job.guard.forfeit(begun, parts.job.stack.check(entering, position.layers))
        parts.progress.note(
            f"round {begun} was under way when the coordinator stopped, and nodes give their "
            "masked updates of a round once only; the rounds after the checkpoint of round "
            f"{position.round} are given up, and the run goes on with round {begun + 1}"
        )
        return position.replace(round=begun)
