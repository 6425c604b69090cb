"""The best model so far, and when to stop waiting for a better one."""

import math
from collections.abc import Mapping

from umbel.core.errors import ConfigError
from umbel.server.checkpoint import Best, Position
from umbel.server.evaluation import direction
from umbel.strategies.run_options import RunOptions


def remember_best(
    options: RunOptions, position: Position, metrics: Mapping[str, float]
) -> Position:
    """The position with its model as the best one, if it is.

    Raises:
        ConfigError: the metric that decides is not among `metrics`.
    """
    name = options.early_stop_metric
    if options.keep_model == "last" and not options.early_stop_patience:
        return position
    if name not in metrics:
        raise ConfigError(
            f"early-stop-metric is {name!r}, which the evaluation does not give; choose one "
            f"of {', '.join(metrics)}"
        )
    value = -metrics[name] if direction(name) < 0 else metrics[name]
    if math.isnan(value):  # nothing is better than NaN, so it would stay the best for ever
        value = -math.inf
    if position.best is not None and not value > position.best.value:
        return position.replace(evaluations_since_best=position.evaluations_since_best + 1)
    best = Best(value, position.round, position.delivered, position.buffers)
    return position.replace(best=best, evaluations_since_best=0)


def patience_is_over(options: RunOptions, position: Position) -> bool:
    """Whether the last evaluations have brought no better model, and nobody waits any longer."""
    patience = options.early_stop_patience
    return patience > 0 and position.evaluations_since_best >= patience
