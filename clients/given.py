"""Whether what an app hands to `Federation` is of the right kind, said when it is handed over."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from umbel.clients.trainers.base import Options, SaysUse, Trainer
from umbel.core.errors import ConfigError, UmbelError, described
from umbel.core.registry import is_function, takes_one

METHODS = ("initial", "train", "evaluate")

FOREIGN = {
    "keras.src.models.model.Model": "KerasTrainer(lambda: {}(...))",
    "flax.nnx.module.Module": "JaxTrainer(lambda rngs: {}(...))",
    "flax.linen.module.Module": "JaxTrainer({}(...), inputs=...)",
}
"""Models of frameworks that need not be installed, and the trainers for them."""


@runtime_checkable
class HasOptions(Protocol):
    """A trainer that says which options it understands."""

    OPTIONS: Mapping[str, bool | int | float | str]
    """By name, each with its default."""


def understood(trainer: Trainer) -> Mapping[str, bool | int | float | str]:
    """The options that a trainer understands, each with its default."""
    return trainer.OPTIONS if isinstance(trainer, HasOptions) else {}


def use_of(trainer: Trainer) -> str:
    """How the model is used that `umbel.load` gives: an expression of `model` and `x`."""
    return trainer.USE if isinstance(trainer, SaysUse) else "model"


def trainer_of(given: Trainer | Callable[[Options], Trainer], options: Options) -> Trainer:
    """The trainer of these options, where an app gives a function of them.

    Raises:
        ConfigError: the function fails, or gives no trainer.
    """
    if not is_function(given):
        return given  # type: ignore[return-value]  # `check_trainer` has seen it
    try:
        found = given(options)  # type: ignore[operator]  # a function
    except UmbelError:
        raise
    except Exception as error:
        raise _no_trainer(given, f"it failed with {described(error)}") from error
    if not all(hasattr(found, method) for method in METHODS) or inspect.isclass(found):
        raise _no_trainer(given, f"it gave a {type(found).__name__}")
    return found


def _no_trainer(given: Any, what: str) -> ConfigError:
    name = given.__name__ if inspect.isroutine(given) else "trainer"
    return ConfigError(
        f"trainer is the function {name}, which was asked for a trainer under the run's options: "
        f"{what}; give TorchTrainer({name}) if it makes a model, or "
        f"FunctionTrainer(initial, {name}) if it trains one"
    )


def check_trainer(trainer: Any) -> None:
    """Raises:
    ConfigError: it is no trainer; the sentence says how to make one of it.
    """
    if is_function(trainer):
        if not takes_one(trainer):
            raise _no_trainer(trainer, "it takes no options")
        return  # of the options; what it gives is looked at when they are known
    name = getattr(trainer, "__name__", type(trainer).__name__)
    kind = trainer if inspect.isclass(trainer) else type(trainer)
    for base in kind.__mro__:
        made = FOREIGN.get(f"{base.__module__}.{base.__name__}")
        if made is not None:
            raise ConfigError(
                f"trainer is the model {name}; give it to a trainer: trainer={made.format(name)}"
            )
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
    if missing:
        raise ConfigError(
            f"trainer is a {name} without the method {missing[0]}; give TorchTrainer, "
            "KerasTrainer, JaxTrainer, SklearnTrainer, FunctionTrainer, or an object with initial, "
            "train and evaluate"
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
