"""Federated learning on Flower: the public names.

Names are imported when they are first used, so that `import umbel` is quick.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from umbel import former

__version__ = "0.1.0"

if TYPE_CHECKING:
    from umbel.clients.chosen_trainer import ChosenTrainer as ChosenTrainer
    from umbel.clients.data.examples import Examples as Examples
    from umbel.clients.data.examples import Node as Node
    from umbel.clients.data.examples import Split as Split
    from umbel.clients.data.features import Featured as Featured
    from umbel.clients.data.features import Recipe as Recipe
    from umbel.clients.data.features import features_of as features_of
    from umbel.clients.data.inputs import Columns as Columns
    from umbel.clients.data.inputs import Letters as Letters
    from umbel.clients.data.inputs import Pixels as Pixels
    from umbel.clients.data.inputs import Plain as Plain
    from umbel.clients.data.inputs import Samples as Samples
    from umbel.clients.data.partition import ByKey as ByKey
    from umbel.clients.data.partition import BySize as BySize
    from umbel.clients.data.partition import Dirichlet as Dirichlet
    from umbel.clients.data.partition import Iid as Iid
    from umbel.clients.data.partition import Shards as Shards
    from umbel.clients.data.partitioned import Partitioned as Partitioned
    from umbel.clients.data.scattering import Scattering as Scattering
    from umbel.clients.pytorch.compact import compact as compact
    from umbel.clients.pytorch.one_step import OneStep as OneStep
    from umbel.clients.pytorch.trainer import TorchTrainer as TorchTrainer
    from umbel.clients.trainers.base import Evaluated as Evaluated
    from umbel.clients.trainers.base import Job as Job
    from umbel.clients.trainers.base import Trained as Trained
    from umbel.clients.trainers.base import Trainer as Trainer
    from umbel.clients.trainers.base import Weights as Weights
    from umbel.clients.trainers.function import FunctionTrainer as FunctionTrainer
    from umbel.clients.trainers.private_sgd import PrivateSgd as PrivateSgd
    from umbel.clients.trainers.sklearn import SklearnTrainer as SklearnTrainer
    from umbel.clients.trainers.softmax import SoftmaxTrainer as SoftmaxTrainer
    from umbel.core.errors import CheckError as CheckError
    from umbel.core.errors import ConfigError as ConfigError
    from umbel.core.errors import RunError as RunError
    from umbel.core.errors import StackError as StackError
    from umbel.core.errors import UmbelError as UmbelError
    from umbel.federation import Federation as Federation
    from umbel.loading import load as load
    from umbel.result import Result as Result
    from umbel.running import Interrupted as Interrupted
    from umbel.running import run as run
    from umbel.server.private.verify import verify as verify
    from umbel.strategies.collect import PlainSum as PlainSum
    from umbel.strategies.private.adaptive_clip import AdaptiveClip as AdaptiveClip
    from umbel.strategies.private.banded_gaussian import BandedGaussian as BandedGaussian
    from umbel.strategies.private.clip import Clip as Clip
    from umbel.strategies.private.gaussian import Gaussian as Gaussian
    from umbel.strategies.private.local_gaussian import LocalGaussian as LocalGaussian
    from umbel.strategies.private.private_mean import PrivateMean as PrivateMean
    from umbel.strategies.private.private_mean import private_histogram as private_histogram
    from umbel.strategies.private.private_mean import private_second_moment as private_second_moment
    from umbel.strategies.private.private_metrics import PrivateMetrics as PrivateMetrics
    from umbel.strategies.private.tree_gaussian import TreeGaussian as TreeGaussian
    from umbel.strategies.secure.distributed_skellam import (
        DistributedDiscreteGaussian as DistributedDiscreteGaussian,
    )
    from umbel.strategies.secure.distributed_skellam import DistributedSkellam as DistributedSkellam
    from umbel.strategies.secure.quantize import Quantize as Quantize
    from umbel.strategies.secure.rotate import Rotate as Rotate
    from umbel.strategies.secure.secure_sum import SecureSum as SecureSum
    from umbel.strategies.secure.weigh import Weigh as Weigh
    from umbel.strategies.stack import Stack as Stack
    from umbel.strategies.transform import Claim as Claim
    from umbel.strategies.transform import Facts as Facts
    from umbel.strategies.transform import Round as Round
    from umbel.strategies.transform import Stateless as Stateless
    from umbel.strategies.transform import Transform as Transform

_HOMES = {
    "compact": "clients.pytorch.compact",
    "Columns": "clients.data.inputs",
    "Letters": "clients.data.inputs",
    "Pixels": "clients.data.inputs",
    "Plain": "clients.data.inputs",
    "Samples": "clients.data.inputs",
    "ByKey": "clients.data.partition",
    "BySize": "clients.data.partition",
    "Dirichlet": "clients.data.partition",
    "Examples": "clients.data.examples",
    "FunctionTrainer": "clients.trainers.function",
    "SklearnTrainer": "clients.trainers.sklearn",
    "Featured": "clients.data.features",
    "Federation": "federation",
    "Iid": "clients.data.partition",
    "Node": "clients.data.examples",
    "Partitioned": "clients.data.partitioned",
    "PlainSum": "strategies.collect",
    "PrivateMean": "strategies.private.private_mean",
    "PrivateSgd": "clients.trainers.private_sgd",
    "Recipe": "clients.data.features",
    "Scattering": "clients.data.scattering",
    "Shards": "clients.data.partition",
    "SoftmaxTrainer": "clients.trainers.softmax",
    "Split": "clients.data.examples",
    "Stack": "strategies.stack",
    "Stateless": "strategies.transform",
    "ChosenTrainer": "clients.chosen_trainer",
    "OneStep": "clients.pytorch.one_step",
    "TorchTrainer": "clients.pytorch.trainer",
    "features_of": "clients.data.features",
    "private_histogram": "strategies.private.private_mean",
    "private_second_moment": "strategies.private.private_mean",
    "AdaptiveClip": "strategies.private.adaptive_clip",
    "BandedGaussian": "strategies.private.banded_gaussian",
    "Clip": "strategies.private.clip",
    "DistributedDiscreteGaussian": "strategies.secure.distributed_skellam",
    "DistributedSkellam": "strategies.secure.distributed_skellam",
    "Gaussian": "strategies.private.gaussian",
    "LocalGaussian": "strategies.private.local_gaussian",
    "PrivateMetrics": "strategies.private.private_metrics",
    "Quantize": "strategies.secure.quantize",
    "Rotate": "strategies.secure.rotate",
    "SecureSum": "strategies.secure.secure_sum",
    "TreeGaussian": "strategies.private.tree_gaussian",
    "Weigh": "strategies.secure.weigh",
    "verify": "server.private.verify",
    "load": "loading",
    "run": "running",
    "Interrupted": "running",
    "Result": "result",
    "Claim": "strategies.transform",
    "Evaluated": "clients.trainers.base",
    "Facts": "strategies.transform",
    "Job": "clients.trainers.base",
    "Round": "strategies.transform",
    "Trained": "clients.trainers.base",
    "Trainer": "clients.trainers.base",
    "Transform": "strategies.transform",
    "Weights": "clients.trainers.base",
    "UmbelError": "core.errors",
    "ConfigError": "core.errors",
    "StackError": "core.errors",
    "RunError": "core.errors",
    "CheckError": "core.errors",
}

__all__ = sorted([*_HOMES, "__version__"])


class _Moved(types.ModuleType):
    """`umbel.run` as a module, for code that imports from it as from earlier releases."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who looks through all modules wants none of its contents
            raise AttributeError(name)
        return getattr(importlib.import_module("umbel.running"), name)


# `import umbel.run` finds it here, and leaves the function `umbel.run` as it is.
sys.modules.setdefault("umbel.run", _Moved("umbel.run", _Moved.__doc__))


former.install()


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'umbel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"umbel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
