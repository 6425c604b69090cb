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
    from umbel.clients.features import Featured as Featured
    from umbel.clients.features import Recipe as Recipe
    from umbel.clients.features import features_of as features_of
    from umbel.clients.function_trainer import FunctionTrainer as FunctionTrainer
    from umbel.clients.partition import ByKey as ByKey
    from umbel.clients.partition import BySize as BySize
    from umbel.clients.partition import Dirichlet as Dirichlet
    from umbel.clients.partition import Iid as Iid
    from umbel.clients.partition import Shards as Shards
    from umbel.clients.partitioned import Partitioned as Partitioned
    from umbel.clients.private_sgd import PrivateSgd as PrivateSgd
    from umbel.clients.scattering import Scattering as Scattering
    from umbel.clients.sklearn_trainer import SklearnTrainer as SklearnTrainer
    from umbel.clients.softmax_trainer import SoftmaxTrainer as SoftmaxTrainer
    from umbel.clients.torch_trainer import TorchTrainer as TorchTrainer
    from umbel.federation import Federation as Federation
    from umbel.run import run as run
    from umbel.server.verify import verify as verify
    from umbel.strategies.adaptive_clip import AdaptiveClip as AdaptiveClip
    from umbel.strategies.banded_gaussian import BandedGaussian as BandedGaussian
    from umbel.strategies.clip import Clip as Clip
    from umbel.strategies.collect import PlainSum as PlainSum
    from umbel.strategies.distributed_skellam import (
        DistributedDiscreteGaussian as DistributedDiscreteGaussian,
    )
    from umbel.strategies.distributed_skellam import DistributedSkellam as DistributedSkellam
    from umbel.strategies.gaussian import Gaussian as Gaussian
    from umbel.strategies.layer import Stateless as Stateless
    from umbel.strategies.local_gaussian import LocalGaussian as LocalGaussian
    from umbel.strategies.private_mean import PrivateMean as PrivateMean
    from umbel.strategies.private_mean import private_histogram as private_histogram
    from umbel.strategies.private_mean import private_second_moment as private_second_moment
    from umbel.strategies.private_metrics import PrivateMetrics as PrivateMetrics
    from umbel.strategies.quantize import Quantize as Quantize
    from umbel.strategies.rotate import Rotate as Rotate
    from umbel.strategies.secure_sum import SecureSum as SecureSum
    from umbel.strategies.stack import Stack as Stack
    from umbel.strategies.tree_gaussian import TreeGaussian as TreeGaussian
    from umbel.strategies.weigh import Weigh as Weigh

_HOMES = {
    "ByKey": "clients.partition",
    "BySize": "clients.partition",
    "Dirichlet": "clients.partition",
    "Examples": "clients.data",
    "FunctionTrainer": "clients.function_trainer",
    "SklearnTrainer": "clients.sklearn_trainer",
    "Featured": "clients.features",
    "Federation": "federation",
    "Iid": "clients.partition",
    "Node": "clients.data",
    "Partitioned": "clients.partitioned",
    "PlainSum": "strategies.collect",
    "PrivateMean": "strategies.private_mean",
    "PrivateSgd": "clients.private_sgd",
    "Recipe": "clients.features",
    "Scattering": "clients.scattering",
    "Shards": "clients.partition",
    "SoftmaxTrainer": "clients.softmax_trainer",
    "Split": "clients.data",
    "Stack": "strategies.stack",
    "Stateless": "strategies.layer",
    "TorchTrainer": "clients.torch_trainer",
    "features_of": "clients.features",
    "private_histogram": "strategies.private_mean",
    "private_second_moment": "strategies.private_mean",
    "AdaptiveClip": "strategies.adaptive_clip",
    "BandedGaussian": "strategies.banded_gaussian",
    "Clip": "strategies.clip",
    "DistributedDiscreteGaussian": "strategies.distributed_skellam",
    "DistributedSkellam": "strategies.distributed_skellam",
    "Gaussian": "strategies.gaussian",
    "LocalGaussian": "strategies.local_gaussian",
    "PrivateMetrics": "strategies.private_metrics",
    "Quantize": "strategies.quantize",
    "Rotate": "strategies.rotate",
    "SecureSum": "strategies.secure_sum",
    "TreeGaussian": "strategies.tree_gaussian",
    "Weigh": "strategies.weigh",
    "verify": "server.verify",
    "run": "run",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'umbel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"umbel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
