"""Whether what an app hands to `Federation` is of the right kind, said when it is handed over."""

import inspect
from typing import Any

from torch import nn

from umbel.core.errors import ConfigError

METHODS = ("initial", "train", "evaluate")


def check_trainer(trainer: Any) -> None:
    """Raises:
    ConfigError: it is no trainer; the sentence says how to make one of it.
    """
    name = getattr(trainer, "__name__", type(trainer).__name__)
    if isinstance(trainer, nn.Module) or (
        inspect.isclass(trainer) and issubclass(trainer, nn.Module)
    ):
        made = name if inspect.isclass(trainer) else f"lambda: {name}(...)"
        raise ConfigError(
            f"trainer is the model {name}; give it to a trainer: trainer=TorchTrainer({made})"
        )
    if hasattr(trainer, "get_params") and hasattr(trainer, "fit"):
        made = f"{name}()" if inspect.isclass(trainer) else f"{name}(...)"
        raise ConfigError(
            f"trainer is the estimator {name}; give it to a trainer: "
            f"trainer=SklearnTrainer({made}, features=..., classes=...)"
        )
    if inspect.isclass(trainer):
        raise ConfigError(f"trainer is the class {name}; give an object: trainer={name}(...)")
    missing = [method for method in METHODS if not callable(getattr(trainer, method, None))]
    if missing and callable(trainer):
        raise ConfigError(
            f"trainer is the function {name}; give TorchTrainer({name}) if it makes a model, or "
            f"FunctionTrainer(initial, {name}) if it trains one"
        )
    if missing:
        raise ConfigError(
            f"trainer is a {name} without the method {missing[0]}; give TorchTrainer, "
            "SklearnTrainer, FunctionTrainer, or an object with initial, train and evaluate"
        )


def check_functions(holder: Any, *names: str) -> None:
    """Raises:
    ConfigError: one of these attributes is neither a function nor None.
    """
    for name in names:
        value = getattr(holder, name)
        if value is not None and not callable(value):
            name = name.removeprefix("_")
            raise ConfigError(
                f"{name} is a {type(value).__name__}, and it has to be a function that returns "
                f"one; write {name}=lambda *given: ..., or def {name}(...)"
            )
