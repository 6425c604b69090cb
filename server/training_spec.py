"""What a run trains, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from umbel.core.errors import ConfigError
from umbel.core.records import Tree
from umbel.server.privacy_gate import NoGuard, PrivacyGate
from umbel.strategies.async_options import AsyncOptions
from umbel.strategies.contract import Contract
from umbel.strategies.optimizers import ServerOptimizer
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.samplers import Sampler
from umbel.strategies.stack import Stack

if TYPE_CHECKING:  # its mathematics takes a second to import
    from umbel.strategies.private.private_mean import PrivateMean

Evaluate = Callable[[Tree, Tree], Mapping[str, float]]
"""Central evaluation: parameters and buffers to metrics."""


@dataclass(frozen=True)
class TrainingSpec:
    """What is trained, and how.

    Attributes:
        parameters: the first model.
        buffers: the first model's buffers.
        options: of the run.
        privacy: what is asked of noise.
        stack: the layers and the collect.
        evaluate: central evaluation, where there is held-out data.
        learning_rate: of the nodes, before the schedule; None leaves it to the trainer.
        guard: the budget of a private run.
        questions: private means that are asked before, between and after rounds.
        statistics: names of the buffers that nodes show for the delivered model.
        asynchronous: whether and how rounds go on without the slow.
        pooled: virtual nodes that share a process may answer as one.
        quiet: why nodes are not asked what they measure; empty where they are.
        sampler: who takes part in a round; None is the one that the options name.
        optimizer: makes the next model; None is the one that the options name.
        contract: what nodes act on, for secure sums; None takes their word.

    Raises:
        ConfigError: an option watches the central evaluation, and there is none.
    """

    parameters: Tree
    buffers: Tree
    options: RunOptions
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    stack: Stack = field(default_factory=Stack)
    evaluate: Evaluate | None = None
    learning_rate: float | None = None
    guard: PrivacyGate = field(default_factory=NoGuard)
    questions: tuple[PrivateMean, ...] = ()
    statistics: tuple[str, ...] = ()
    pooled: bool = False
    asynchronous: AsyncOptions = field(default_factory=AsyncOptions)
    quiet: str = ""
    sampler: Sampler | None = None
    optimizer: ServerOptimizer | None = None
    contract: Contract | None = None

    def __post_init__(self) -> None:
        options = self.options
        watching = options.keep_model == "best" or options.early_stop_patience > 0
        if watching and self.evaluate is None:
            what = "keep-model=best" if options.keep_model == "best" else "early-stop-patience"
            raise ConfigError(
                f"{what} needs held-out examples at the coordinator, and this app has none; give "
                "Federation a `test` function, or leave the option out"
            )


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        rounds: that were finished.
        stopped: why no further one was begun.
        metrics: of the last central evaluation; without one, means over the nodes' own tests.
        measured: "central", "nodes", or empty where nobody measured.
        parameters: the model.
        buffers: the model's.
        public: what private means released, by name.
    """

    rounds: int
    stopped: str
    metrics: Mapping[str, float]
    parameters: Tree
    buffers: Tree
    public: Mapping[str, Tensor] = field(default_factory=dict)
    measured: str = ""
