"""The options that every federation understands."""

from dataclasses import dataclass, fields
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.limits import above, at_least, check_limits, named, one_of, option, up_to_one
from umbel.core.options import OptionGroup, Value, dashed
from umbel.core.registry import OWN, is_built_in, make
from umbel.strategies import known_names as known_names
from umbel.strategies.schedules import SCHEDULES, factor


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """How a federation is run; the option names are these with dashes for underscores.

    Attributes:
        rounds: how many rounds to train.
        seed: what fixes the partition, the first model, local shuffles and (without privacy)
            cohorts.
        cohort: who takes part in a round: `all` nodes, a `fixed` number, each node with the same
            probability (`poisson`), those of some that are drawn on which the loss is largest
            (`power-of-choice`), those worth most (`oort`), or another sampler that is registered.
            `app` is the one that the app brings: `Federation(sampler=...)`.
        cohort_size: how many nodes take part in a round; for `poisson` their expected number.
        cohort_cap: the most nodes of a Poisson round; 0 is no cap.
        cohort_candidates: with `cohort=power-of-choice`, how many nodes are drawn, of which those
            with the largest losses take part; 0 is twice `cohort-size`.
        min_replies: the fewest usable replies of a round; with fewer the model stays as it is. 0 is
            half of the nodes that are asked; a private round counts with any number.
        round_timeout: seconds to wait for the replies of a round; 0 waits for ever.
        optimizer: the optimiser of the server: `fedavg`, `fedavgm`, `fedadam`, `fedyogi`,
            `fedadagrad`, or another one that is registered. `app` is the one that the app brings:
            `Federation(optimizer=...)`.
        server_learning_rate: learning rate of the server's optimiser; 0 is its own, which is 1
            for the averages and 0.1 for the adaptive ones.
        server_momentum: momentum of `fedavgm`.
        beta_1: decay of the first moment in the adaptive optimisers.
        beta_2: decay of the second moment in the adaptive optimisers.
        adaptive_epsilon: adaptivity of the adaptive optimisers, added to the root of the second
            moment (tau in Reddi et al. 2021, https://arxiv.org/abs/2003.00295, algorithm 2).
        aggregator: how the updates of a round become one: an aggregator that is registered. `app`
            is what the app brings: `Federation(aggregator=...)`, or else the bottom of its stack.
        method: what changes the nodes' training and what they send: a method of Umbel's, or a local
            objective that is registered. `app` is the one that the app brings,
            `Federation(objective=...)`; without one, nodes train as their trainer does.
        schedule: how the nodes' learning rate goes over rounds: `constant`, `cosine`, `linear`,
            `step`, `exponential`.
        schedule_gamma: the factor at the end of `cosine` and `linear`, of a step of `step`, and of
            a round of `exponential`; 0 is the schedule's own: `cosine` and `linear` fall to 0,
            `step` multiplies by 0.1 and `exponential` by 0.95.
        schedule_every: rounds between the steps of `step`.
        warmup_rounds: rounds over which the learning rate rises.
        max_examples: the largest number of examples that a node counts for in a mean by
            examples; 0 is ten times the median of its round.
        buffers: what becomes of running statistics. `local`: each node goes on with its own, and
            the delivered model has those of all nodes together; `mean`: nodes go on with the mean
            as well; `never`: they do not leave a node, and the delivered model has the first ones.
        evaluate_every: rounds between central evaluations; the last round always has one.
        client_eval_every: rounds between evaluations on the nodes' own test data; 0 is only at
            the end, -1 never.
        client_eval_nodes: how many nodes evaluate; 0 is all.
        early_stop_patience: evaluations without improvement before the run stops; 0 is never.
        early_stop_metric: what must improve: `loss`, or any metric that should grow.
        keep_model: which model the run ends with: the `last` or the `best` one evaluated.
        average_from: from this round on, the run ends with the mean of the models; 0 is off.
    """

    rounds: int = option(10, at_least(1))
    seed: int = option(0, at_least(0))
    cohort: str = option("all", named("sampler", OWN))
    cohort_size: float = option(0.0, at_least(0))
    cohort_cap: int = option(0, at_least(0))
    cohort_candidates: int = option(0, at_least(0))
    min_replies: int = option(0, at_least(0))
    round_timeout: float = option(3600.0, at_least(0))
    optimizer: str = option("fedavg", named("optimizer", OWN))
    server_learning_rate: float = option(0.0, at_least(0))
    server_momentum: float = option(0.9, up_to_one())
    beta_1: float = option(0.9, up_to_one())
    beta_2: float = option(0.99, up_to_one())
    adaptive_epsilon: float = option(1e-3, above(0))
    aggregator: str = option(OWN, named("aggregator", OWN))
    method: str = option(OWN, named("objective", OWN))
    schedule: str = option("constant", one_of(*SCHEDULES))
    schedule_gamma: float = option(0.0, at_least(0))
    schedule_every: int = option(10, at_least(1))
    warmup_rounds: int = option(0, at_least(0))
    max_examples: int = option(0, at_least(0))
    buffers: str = option("local", one_of("local", "mean", "never"))
    evaluate_every: int = option(1, at_least(1))
    client_eval_every: int = option(0, at_least(-1))
    client_eval_nodes: int = option(0, at_least(0))
    early_stop_patience: int = option(0, at_least(0))
    early_stop_metric: str = "loss"
    keep_model: str = option("last", one_of("last", "best"))
    average_from: int = option(0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)
        if self.warmup_rounds and self.warmup_rounds >= self.rounds:
            raise ConfigError(
                f"warmup-rounds is {self.warmup_rounds} of {self.rounds} rounds, so the learning "
                "rate would never be reached; warm up for fewer rounds"
            )
        if self.cohort_candidates and self.cohort != "power-of-choice":
            raise ConfigError(
                f"cohort-candidates is {self.cohort_candidates}, but cohort is {self.cohort}; give "
                "cohort=power-of-choice, or leave cohort-candidates out"
            )
        # each of these raises where its options do not make one, before a run has begun
        self.learning_rate_factor(self.warmup_rounds + 1)
        if is_built_in("sampler", self.cohort):
            make("sampler", self.cohort, self._named())

    def part(self, kind: str) -> Any:
        """The part of a kind that these options name, where it needs no others and no app.

        Raises:
            ConfigError: the options are of an app that brings its own.
        """
        from umbel.strategies.parts import required_part  # with torch, which options do not need

        return required_part(kind, None, self._named())

    def _named(self) -> dict[str, Value]:
        return {dashed(f.name): getattr(self, f.name) for f in fields(self)}

    def rate_in(self, number: int, base: float | None) -> float | None:
        """The nodes' learning rate in round `number`; None where the trainer has none.

        Both sides work it out from the options, so it travels with them and not in each message.

        Args:
            number: the round, from 1.
            base: the rate before the schedule; see `umbel.strategies.schedules.checked_rate`.
        """
        return None if base is None else base * self.learning_rate_factor(number)

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
