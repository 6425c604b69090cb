"""A run as what is exported, compressed and served: its model with everything about it."""

from pathlib import Path
from typing import Any

from umbel.core.options import Options
from umbel.deliver.trained import TrainedModel
from umbel.federation import Federation, TestsCentrally
from umbel.loading import opened


def trained_model(run: Path | str, app: Path | str | Federation | None = None) -> TrainedModel:
    """The model that a run ended with, ready to be delivered.

    Args:
        run: the run's directory.
        app: where the app's folder is now, if it was moved; or the `Federation` itself.

    Raises:
        ConfigError: see `umbel.load`.
    """
    found = opened(run, app)
    federation, options = found.federation, found.options
    return TrainedModel(
        name=str(found.directory.config().get("app") or federation.name or "model"),
        run=found.directory,
        trainer=federation.trainer_for(options),
        weights=found.weights,
        options=options,
        inputs=federation.inputs or _told(federation, "inputs"),
        labels=federation.labels or _told(federation, "labels") or (),
        examples=held_out_of(federation, options),
    )


def held_out_of(federation: Federation, options: Options) -> object:
    """The examples that judge the model; None where the app has none."""
    if federation.test is not None:
        return federation.test(options)
    data = federation.data
    return data.central_test(options) if isinstance(data, TestsCentrally) else None


def _told(federation: Federation, what: str) -> Any:
    """What the app's data say of themselves."""
    method = getattr(federation.data, what, None)
    return method() if callable(method) else None
