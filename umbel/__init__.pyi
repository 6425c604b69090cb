"""The public names of Umbel, each said once: for type checkers, and for `umbel` to import by."""

from umbel.clients.data.examples import Examples as Examples
from umbel.clients.data.examples import Node as Node
from umbel.clients.data.examples import Split as Split
from umbel.clients.data.features import FeatureMap as FeatureMap
from umbel.clients.data.features import PrecomputedFeatures as PrecomputedFeatures
from umbel.clients.data.features import features_of as features_of
from umbel.clients.data.partition import ByKey as ByKey
from umbel.clients.data.partition import BySize as BySize
from umbel.clients.data.partition import Dirichlet as Dirichlet
from umbel.clients.data.partition import Iid as Iid
from umbel.clients.data.partition import Shards as Shards
from umbel.clients.data.partitioned import Partitioned as Partitioned
from umbel.clients.data.scattering import Scattering as Scattering
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
from umbel.core.registry import register as register
from umbel.federation import Federation as Federation
from umbel.former import ChosenTrainer as ChosenTrainer
from umbel.loading import load as load
from umbel.result import Result as Result
from umbel.running import Interrupted as Interrupted
from umbel.running import run as run
from umbel.server.private.verify import verify as verify
from umbel.strategies.collect import PlainSum as PlainSum
from umbel.strategies.optimizers import Adaptive as Adaptive
from umbel.strategies.optimizers import FedAvg as FedAvg
from umbel.strategies.optimizers import FedAvgM as FedAvgM
from umbel.strategies.optimizers import ServerOptimizer as ServerOptimizer
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
from umbel.strategies.samplers import Everyone as Everyone
from umbel.strategies.samplers import FixedSize as FixedSize
from umbel.strategies.samplers import NodeHistory as NodeHistory
from umbel.strategies.samplers import Poisson as Poisson
from umbel.strategies.samplers import Sampler as Sampler
from umbel.strategies.samplers import Sampling as Sampling
from umbel.strategies.samplers import SamplingContext as SamplingContext
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

__version__: str
