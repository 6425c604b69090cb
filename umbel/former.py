"""Modules and names as they were in earlier releases.

Apps, notebooks and pickled states name modules by their addresses. An address that has changed
still finds its module, the same object, so that a class keeps one identity.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbel.clients.trainers.base import Options, Trainer

ADDRESSES = {
    "cli": "commands.cli",
    "clients.function_trainer": "clients.trainers.function",
    "clients.node": "clients.handler",
    "clients.private_sgd": "clients.trainers.private_sgd",
    "clients.sklearn_trainer": "clients.trainers.sklearn",
    "clients.softmax_trainer": "clients.trainers.softmax",
    "clients.trainer": "clients.trainers.base",
    "server.asking": "server.queries",
    "server.embedded.workers": "server.pools.processes",
    "run": "running",
    "strategies.app": "core.app_folder",
    "strategies.errors": "core.errors",
    "strategies.layer": "strategies.transform",
    "strategies.node_policy": "strategies.policy.node_policy",
    "strategies.options": "core.options",
    "strategies.records": "core.records",
}
"""Former addresses of what people import, and today's, below `umbel`."""

TAKEN = {"run"}
"""Those of them that are a public name today: importing the module must leave `umbel.run` alone."""

NAMES = {"Featured": "PrecomputedFeatures", "Recipe": "FeatureMap"}
"""Public names as they were, and today's."""


class _Former(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its former address."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        known = fullname.removeprefix("umbel.") in ADDRESSES and fullname.startswith("umbel.")
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(f"umbel.{ADDRESSES[spec.name.removeprefix('umbel.')]}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        # The import system has just written the former address into the module.
        former = module.__spec__
        if former is not None and former.name in self._specs:
            module.__spec__ = self._specs.pop(former.name)


class _Taken(types.ModuleType):
    """A module under an address that is a public name's: the import system finds it, binds nothing,
    and its contents are imported when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who looks through all modules wants none of its contents
            raise AttributeError(name)
        address = ADDRESSES[self.__name__.removeprefix("umbel.")]
        return getattr(importlib.import_module(f"umbel.{address}"), name)


def install() -> None:
    """Let the former addresses be imported."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
    for address in TAKEN:
        sys.modules.setdefault(f"umbel.{address}", _Taken(f"umbel.{address}", _Taken.__doc__))


def ChosenTrainer(  # noqa: N802 - it was a class
    option: str, trainers: "Mapping[str, Trainer]"
) -> "Callable[[Options], Trainer]":
    """The trainer that an option names; today the `trainer` of a federation may be such a function.

    Args:
        option: whose value names the trainer, such as `recipe`.
        trainers: by that value.
    """

    def chosen(options: "Options") -> "Trainer":
        from umbel.core.options import choose

        value: Any = options[option]
        return trainers[choose(option, value, trainers)]

    return chosen
