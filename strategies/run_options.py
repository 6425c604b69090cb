"""The options that every federation understands."""

import math
from dataclasses import dataclass

from umbel.strategies.cohort import cohort_named
from umbel.strategies.errors import ConfigError
from umbel.strategies.optimizers import optimizer_named
from umbel.strategies.options import OptionGroup, choose, dashed
from umbel.strategies.schedules import factor


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """How a federation is run; the option names are these with dashes for underscores.

    Attributes:
        rounds: how many rounds to train.
        seed: fixes the partition, the first model, local shuffles and (without privacy) cohorts.
        cohort: `all`, `fixed` or `poisson`.
        cohort_size: nodes in a round; expected nodes for `poisson`.
        cohort_cap: the most nodes of a Poisson round; 0 is no cap.
        min_replies: a round with fewer usable replies leaves the model as it is.
        round_timeout: seconds to wait for the replies of a round; 0 waits for ever.
        optimizer: `fedavg`, `fedavgm`, `fedadam`, `fedyogi` or `fedadagrad`.
        server_learning_rate: of the optimiser; 0 is its own, 1 for the averages and 0.1 for the
            adaptive ones.
        server_momentum: of `fedavgm`.
        beta_1: of the adaptive optimisers; beta_2, tau likewise.
        schedule: of the nodes' learning rate: `constant`, `cosine`, `linear`, `step`,
            `exponential`.
        schedule_gamma: see `umbel.strategies.schedules.factor`, schedule_every likewise; 0 is
            the schedule's own: `cosine` and `linear` fall to 0, `step` multiplies by 0.1 and
            `exponential` by 0.95.
        warmup_rounds: rounds over which the learning rate rises.
        buffers: what becomes of running statistics. `local`: each node goes on with its own, and
            the delivered model has those of all nodes together; `mean`: nodes go on with the mean
            as well; `never`: they do not leave a node, and the delivered model has the first ones.
        evaluate_every: rounds between central evaluations; the last round always has one.
        federated_every: rounds between evaluations on the nodes' own test data; 0 is only at
            the end, -1 never.
        federated_nodes: how many nodes evaluate; 0 is all.
        early_stop_patience: evaluations without improvement before the run stops; 0 is never.
        early_stop_metric: what must improve: `loss`, or any metric that should grow.
        keep: which model the run ends with: the `last` or the `best` one evaluated.
        average_from: from this round on, the run ends with the mean of the models; 0 is off.
    """

    rounds: int = 10
    seed: int = 0
    cohort: str = "all"
    cohort_size: float = 0.0
    cohort_cap: int = 0
    min_replies: int = 1
    round_timeout: float = 3600.0
    optimizer: str = "fedavg"
    server_learning_rate: float = 0.0
    server_momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    schedule: str = "constant"
    schedule_gamma: float = 0.0
    schedule_every: int = 10
    warmup_rounds: int = 0
    buffers: str = "local"
    evaluate_every: int = 1
    federated_every: int = 0
    federated_nodes: int = 0
    early_stop_patience: int = 0
    early_stop_metric: str = "loss"
    keep: str = "last"
    average_from: int = 0

    def __post_init__(self) -> None:
        self._check_counts()
        choose("buffers", self.buffers, ("local", "mean", "never"))
        choose("keep", self.keep, ("last", "best"))
        if self.server_learning_rate < 0:
            raise ConfigError(
                f"server-learning-rate is {self.server_learning_rate}; it must be at least 0"
            )
        for name in ("server_momentum", "beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{dashed(name)} is {getattr(self, name)}; it must be from 0 up to 1"
                )
        if self.warmup_rounds and self.warmup_rounds >= self.rounds:
            raise ConfigError(
                f"warmup-rounds is {self.warmup_rounds} of {self.rounds} rounds, so the learning "
                "rate would never be reached; warm up for fewer rounds"
            )
        if self.tau <= 0:
            raise ConfigError(f"tau is {self.tau}; it must be above 0")
        # each of these raises where its options do not make one, before a run has begun
        self.learning_rate_factor(self.warmup_rounds + 1)
        optimizer_named(self.optimizer, learning_rate=self.server_learning_rate)
        cohort_named(self.cohort, self.cohort_size, self.cohort_cap)

    def _check_counts(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{dashed(name)} is {value}; it must be finite")
        least = {"rounds": 1, "evaluate_every": 1, "schedule_every": 1, "federated_every": -1}
        least["min_replies"] = 1
        for name in (
            *least,
            *("cohort_size", "cohort_cap", "round_timeout", "warmup_rounds", "seed"),
            *("federated_nodes", "early_stop_patience", "average_from", "schedule_gamma"),
        ):
            if getattr(self, name) < least.get(name, 0):
                raise ConfigError(
                    f"{dashed(name)} is {getattr(self, name)}; "
                    f"it must be at least {least.get(name, 0)}"
                )

    def learning_rate_factor(self, number: int) -> float:
        """What the nodes' learning rate is multiplied by in round `number`."""
        return factor(
            self.schedule,
            number,
            self.rounds,
            gamma=self.schedule_gamma,
            every=self.schedule_every,
            warmup=self.warmup_rounds,
        )
