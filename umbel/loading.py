"""A finished run's model, ready to use.

    import umbel
    model = umbel.load("runs/...")
    predictions = model(inputs)            # TorchTrainer; see `load` for the other trainers

The numbers are in the run directory, and the code that they belong to is the app's. So the app is
read again, and it has to be what was run: other code would give another model without a word.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.clients.trainers.base import ReadyTrainer, Weights
from umbel.core.app_folder import AppFolder, open_app
from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.federation import Federation, FederationServerApp
from umbel.server.output.rundir import RunDirectory


def load(run: Path | str, app: Path | str | Federation | None = None) -> Any:
    """The model that a run ended with.

    The app's own code is imported, as `umbel run` does.

    Args:
        run: the run's directory.
        app: where the app's folder is now, if it was moved; or the `Federation` itself, whose
            code is then taken as it is.

    Returns:
        What the trainer makes of the weights. `TorchTrainer` and those around it: the module, in
        eval mode on the CPU. `KerasTrainer`: the model. `JaxTrainer`: a module of Flax, or a
        function of inputs. `SklearnTrainer`: the fitted estimator, with its classes.
        `SoftmaxTrainer`: an object with `predict` and `predict_proba` of features.
        `FunctionTrainer`: the arrays by name. A trainer without a method `ready`: `Weights`.

    Raises:
        ConfigError: there is no such run, it has no model yet, its app is gone or has changed,
            or the app's model is not the one that was trained.

    >>> load("runs/20260101-120000-digits-1a2b")  # doctest: +SKIP
    """
    found = opened(run, app)
    trainer = found.federation.trainer_for(found.options)
    if isinstance(trainer, ReadyTrainer):
        return trainer.ready(found.weights, found.options)
    return found.weights


@dataclass(frozen=True)
class OpenedRun:
    """A run that has ended, with the code that its numbers belong to.

    Attributes:
        directory: of the run.
        federation: the app's.
        options: complete ones, as the run had them.
        weights: that it ended with.
    """

    directory: RunDirectory
    federation: Federation
    options: Options
    weights: Weights


def opened(run: Path | str, app: Path | str | Federation | None = None) -> OpenedRun:
    """A run and its app; see `load`.

    Raises:
        ConfigError: as `load` does.
    """
    directory = RunDirectory.open(Path(run))
    config = directory.config()
    if not directory.model_path.is_file():
        raise ConfigError(f"{directory.path} has no model.safetensors: the run has not ended")
    federation = app if isinstance(app, Federation) else _federation(directory.path, config, app)
    options = federation.complete(config.get("options", {}))
    return OpenedRun(directory, federation, options, weights_of(directory, federation, options))


def weights_of(directory: RunDirectory, federation: Federation, options: Options) -> Weights:
    """The tensors of `model.safetensors`, told apart as the trainer does.

    Raises:
        ConfigError: they are not those of the app's model.
    """
    found = directory.read_model()
    first = federation.trainer_for(options).initial(options, int(options["seed"]))
    own = {**first.parameters, **first.buffers}
    odd = sorted(found.keys() ^ own.keys())
    odd += [n for n in found if n in own and found[n].shape != own[n].shape]
    if odd:
        raise ConfigError(
            f"{directory.model_path} is not of the app's model: {odd[0]!r} differs; load it with "
            "the app and the options that it was trained with"
        )
    return Weights(
        {name: found[name].to(value.dtype) for name, value in first.parameters.items()},
        {name: found[name].to(value.dtype) for name, value in first.buffers.items()},
    )


def _federation(run: Path, config: dict[str, Any], app: Path | str | None) -> Federation:
    """The app's federation, if the app is the one that was run."""
    path = app if app is not None else config.get("app_path")
    if path is None:
        raise ConfigError(
            f"{run} does not say which app it is of; give it: umbel.load(run, app=FOLDER)"
        )
    if not Path(path).is_dir():
        raise ConfigError(
            f"the app of this run was in {path}, which is gone; say where it is now: "
            "umbel.load(run, app=FOLDER)"
        )
    folder = open_app(Path(path))
    _check_unchanged(run, folder, config)
    server_app = folder.server_app()
    if not isinstance(server_app, FederationServerApp):
        raise ConfigError(
            f"{folder.name} is no app of a Federation, so Umbel does not know its model; read "
            "the files that the app itself has written"
        )
    return server_app.federation


def _check_unchanged(run: Path, folder: AppFolder, config: dict[str, Any]) -> None:
    then = config.get("app_hash")
    if then is not None and folder.digest() != then:
        raise ConfigError(
            f"the app in {folder.path} has changed since {run}; give the folder of that version: "
            "umbel.load(run, app=FOLDER), or the Federation object to take its code as it is"
        )
