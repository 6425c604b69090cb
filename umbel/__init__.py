"""Federated learning on Flower: the public names.

Names are imported when they are first used, so that `import umbel` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from umbel.clients.data import Examples as Examples
    from umbel.clients.data import Node as Node
    from umbel.clients.data import Split as Split
    from umbel.clients.function_trainer import FunctionTrainer as FunctionTrainer
    from umbel.clients.partition import ByKey as ByKey
    from umbel.clients.partition import BySize as BySize
    from umbel.clients.partition import Dirichlet as Dirichlet
    from umbel.clients.partition import Iid as Iid
    from umbel.clients.partition import Shards as Shards
    from umbel.clients.partitioned import Partitioned as Partitioned
    from umbel.clients.sklearn_trainer import SklearnTrainer as SklearnTrainer
    from umbel.clients.torch_trainer import TorchTrainer as TorchTrainer
    from umbel.federation import Federation as Federation
    from umbel.run import run as run
    from umbel.strategies.collect import PlainSum as PlainSum
    from umbel.strategies.layer import Stateless as Stateless
    from umbel.strategies.stack import Stack as Stack

_HOMES = {
    "ByKey": "clients.partition",
    "BySize": "clients.partition",
    "Dirichlet": "clients.partition",
    "Examples": "clients.data",
    "FunctionTrainer": "clients.function_trainer",
    "SklearnTrainer": "clients.sklearn_trainer",
    "Federation": "federation",
    "Iid": "clients.partition",
    "Node": "clients.data",
    "Partitioned": "clients.partitioned",
    "PlainSum": "strategies.collect",
    "Shards": "clients.partition",
    "Split": "clients.data",
    "Stack": "strategies.stack",
    "Stateless": "strategies.layer",
    "TorchTrainer": "clients.torch_trainer",
    "run": "run",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'umbel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"umbel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
