"""What a run ends with: its model, written down, and how it did."""

from collections.abc import Mapping

from umbel.core.errors import RunError
from umbel.server.checkpoint import Position
from umbel.server.parts import RunParts
from umbel.server.shortfall import Shortfall
from umbel.server.training_spec import Outcome


def outcome(parts: RunParts, position: Position, stopped: str) -> Outcome:
    """Write the model that the run ends with, and say how it did.

    Args:
        parts: of the run.
        position: after the last round.
        stopped: why there is no further one.

    Raises:
        RunError: all rounds have run, and none changed the model.
    """
    missed = Shortfall.of(parts.run.rounds())
    if stopped == "rounds" and missed.nothing:
        raise RunError(
            f"none of the {missed.rounds} rounds changed the model: "
            f"{missed.reason or 'no node could train'}; the nodes' errors are in "
            f"{parts.run.log_path}"
        )
    job = parts.job
    parameters, buffers = parts.model.of(position)
    metrics: Mapping[str, float] = parts.central.metrics
    if job.options.keep_model == "best" and position.best is not None:
        parameters, buffers = parts.model.best(position)
        if job.evaluate is not None:
            metrics = job.evaluate(parameters, buffers)
    parts.run.write_model({**parameters, **buffers}, {"round": str(position.round)})
    measured = "central" if metrics else ""
    if job.evaluate is None and parts.clients.means:
        metrics, measured = parts.clients.means, "nodes"
    return Outcome(
        rounds=position.round,
        stopped=stopped,
        metrics=dict(metrics),
        parameters=parameters,
        buffers=buffers,
        public=position.public,
        measured=measured,
    )
