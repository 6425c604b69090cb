"""What a node needs from whoever knows how to train: the trainer's interface.

A trainer turns a model and a node's own examples into a better model. It knows nothing of
messages, rounds or privacy: the node (`umbel.clients.handler`) makes the update and sends it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flwr.app import RecordDict
from torch import Tensor

from umbel.core.errors import ConfigError
from umbel.strategies.objective import AHEAD, CORRECTION, PARTS, Correction
from umbel.strategies.transform import needs_of

if TYPE_CHECKING:
    from umbel.clients.ledger.node_ledger import Receipt
    from umbel.privacy.bounds.bundle import Bundle
    from umbel.strategies.release import Release
    from umbel.strategies.stack import Stack

Options = Mapping[str, bool | int | float | str]
"""The run's options, as in `[tool.flwr.app.config]` and `-c`."""

Tree = dict[str, Tensor]
"""Names to CPU tensors, in a fixed order."""


@dataclass(frozen=True)
class Weights:
    """A model as named tensors: what is trained, and what is only carried along.

    Attributes:
        parameters: floating-point tensors that take part in averaging.
        buffers: everything else of the model's state (running statistics, counters).
    """

    parameters: Tree
    buffers: Tree = field(default_factory=dict)


class Charges(Protocol):
    """A node's ledger, as a trainer sees it that makes its updates private by itself."""

    def charge(self, release: "Release") -> "Receipt":
        """Charge the node's records, before anything is made of them.

        Raises:
            RunError: their budget is spent, or the ledger cannot be written; nothing may be made.
        """
        ...


@dataclass(frozen=True)
class Job:
    """What one node is asked to do in one round.

    Attributes:
        round: from 1; 0 outside of rounds.
        seed: fixed by the run's seed, the round and the node; the source of every local choice.
        options: the run's options.
        learning_rate: of this round, after the schedule; None where the app leaves it to
            the trainer.
        node: the node's own configuration (`partition-id` and the like).
        memory: the node's own records, kept between rounds.
        ledger: of the node; None is one in `memory`.
        correction: what is added to every gradient of this training; None is nothing. Only a
            trainer that `honours` it is given one.
    """

    round: int
    seed: int
    options: Options
    learning_rate: float | None = None
    node: Options = field(default_factory=dict)
    memory: RecordDict = field(default_factory=RecordDict)
    ledger: Charges | None = None
    correction: Correction | None = None


@dataclass(frozen=True)
class Trained:
    """The result of local training.

    Attributes:
        weights: the model after training; the same names, shapes and order as before.
        examples: how many examples it was trained on; the weight in an average.
        metrics: of this node, e.g. {"loss": 0.3}.
        steps: how many steps the local optimiser made; 0 where the trainer does not say.
    """

    weights: Weights
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation: metrics as means over `examples` examples.

    Attributes:
        examples: how many there were.
        metrics: by name; NaN where one is not defined on these examples.
        counted: for metrics that only some examples have, how many; the weight in a mean.
    """

    examples: int
    metrics: dict[str, float]
    counted: dict[str, int] = field(default_factory=dict)


class Trainer(Protocol):
    """Knows a model: its first weights, how to train it, how to judge it."""

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model. The same options and seed give the same weights."""
        ...

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples. `weights` is not mutated."""
        ...

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """Judge a model on examples. `weights` is not mutated."""
        ...


@runtime_checkable
class Honours(Protocol):
    """A trainer that says what it does beyond plain training.

    `correction`: it adds `job.correction` to every gradient, and says its `steps`. `parts`: it can
    leave parameters as they are that the correction does not train. `ahead`: it can take gradients
    a step ahead.
    """

    @property
    def honours(self) -> frozenset[str]:
        """What it does; a trainer that does not say does nothing of it."""
        ...


_MORE = {
    PARTS: "trains some parameters and leaves the others as they are",
    AHEAD: "takes the gradient a step ahead",
}
"""What a layer may need of a trainer beyond corrections, and how that is said."""


def check_honours(trainer: Trainer, stack: "Stack") -> None:
    """Refuse a stack that asks for what a trainer would leave out.

    Raises:
        ConfigError: the trainer does not do what a layer needs of it, or would break its own
            promise with it.
    """
    honours = trainer.honours if isinstance(trainer, Honours) else frozenset()
    if "start-loss" in stack.needs and isinstance(trainer, RecordPrivate):
        raise ConfigError(
            f"{stack} looks at the exact loss of a node's records, which {type(trainer).__name__} "
            "promises to hide; take a method without it, or privacy of whole nodes (epsilon)"
        )
    if stack.twice and isinstance(trainer, RecordPrivate):
        raise ConfigError(
            f"{stack.twice[0].name} trains a second model a round, which {type(trainer).__name__} "
            "would charge a node's records for once more; take a method that trains one"
        )
    if "steps" in stack.needs and CORRECTION not in honours:
        raise ConfigError(
            f"{stack} counts the nodes' local steps, and {type(trainer).__name__} does not say "
            "them; take TorchTrainer, KerasTrainer or JaxTrainer"
        )
    for what, does in _MORE.items():
        asking = [layer.name for layer in stack.layers if what in needs_of(layer)]
        if asking and what not in honours:
            raise ConfigError(
                f"{asking[0]} {does}, and {type(trainer).__name__} cannot do that; take "
                f"TorchTrainer, or leave {asking[0]} out"
            )
    if stack.objectives and CORRECTION not in honours:
        raise ConfigError(
            f"{stack.objectives[0].name} changes the gradients that nodes train with, and "
            f"{type(trainer).__name__} does not apply that; take TorchTrainer, KerasTrainer or "
            f"JaxTrainer, or leave {stack.objectives[0].name} out"
        )


@runtime_checkable
class ChecksOptions(Protocol):
    """A trainer that can tell before a run begins whether its options can be used."""

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where an option has the wrong type or is out of its range."""
        ...


@runtime_checkable
class ReadyTrainer(Protocol):
    """A trainer that can hand out its model for use outside of Umbel."""

    def ready(self, weights: Weights, options: Options) -> Any:
        """The model with these weights, which shares nothing with the trainer."""
        ...


@runtime_checkable
class SaysUse(Protocol):
    """A trainer that says how the model is used that `ready` gives."""

    USE: str
    """One expression of `model` and `x`, for reports."""


@runtime_checkable
class CohortTrainer(Protocol):
    """A trainer that can train several nodes' models as one batched computation."""

    def train_cohort(
        self, weights: Sequence[Weights], examples: Sequence[Any], jobs: Sequence[Job]
    ) -> list[Trained] | None:
        """What `train` gives for each node, to float tolerance; None where it does not apply."""
        ...


@runtime_checkable
class SizesGroups(Protocol):
    """A trainer that says how many nodes are worth training as one computation."""

    def group_size(self, options: Options) -> int:
        """How many nodes an engine should give to `train_cohort` at a time."""
        ...


@runtime_checkable
class KeepsStatistics(Protocol):
    """A trainer whose model has running statistics of the examples among its buffers."""

    def statistics(self, options: Options) -> tuple[str, ...]:
        """Their names."""
        ...


@runtime_checkable
class StartsFromModule(Protocol):
    """A trainer whose first model can be a given PyTorch module."""

    def starting_from(self, module: Any) -> "Trainer":
        """A trainer like this one whose first model is a copy of the `torch.nn.Module`."""
        ...


@runtime_checkable
class RecordPrivate(Protocol):
    """A trainer that promises privacy for each single record of a node."""

    def privacy(self, options: Options) -> Any:
        """The promise under these options."""
        ...


def promising(trainer: Trainer, options: Options) -> Trainer | None:
    """The trainer where it promises privacy for single records under these options, else None."""
    del options  # a trainer of one kind promises under all of them
    return trainer if isinstance(trainer, RecordPrivate) else None


def own_promise(trainer: Trainer | None) -> bool:
    """Whether a promise is of Umbel's own trainer, and not of a class that calls itself so."""
    home = sys.modules.get("umbel.clients.trainers.private_sgd")
    return trainer is not None and home is not None and type(trainer) is home.PrivateSgd


@runtime_checkable
class BundleTrainer(Protocol):
    """A trainer that can give the updates of many one-example nodes without forming each."""

    def bundles(self, weights: Weights, examples: Any, job: Job) -> "Iterator[Bundle]":
        """What trained minus received is for each node; one example of `examples` a node."""
        ...
