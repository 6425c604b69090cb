"""One of several trainers, as an option of the run says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umbel.clients.trainers.base import (
    BundleTrainer,
    ChecksOptions,
    CohortTrainer,
    Evaluated,
    Job,
    Options,
    Trained,
    Trainer,
    Weights,
)
from umbel.clients.trainers.exported import Exported, exported_by
from umbel.core.errors import ConfigError

if TYPE_CHECKING:
    from umbel.privacy.bounds.bundle import Bundle


@dataclass(frozen=True)
class ChosenTrainer:
    """Trains as the trainer does that an option names.

    Attributes:
        option: whose value names the trainer, such as `recipe`.
        trainers: by that value.
        OPTIONS: of all trainers; where two have one name, the first trainer's default.

    Raises:
        ConfigError: there is no trainer of that name (when it is asked for one).
    """

    option: str
    trainers: Mapping[str, Trainer]
    OPTIONS: Mapping[str, bool | int | float | str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known: dict[str, bool | int | float | str] = {}
        for trainer in self.trainers.values():
            known = {**getattr(trainer, "OPTIONS", {}), **known}
        object.__setattr__(self, "OPTIONS", known)

    def chosen(self, options: Options) -> Trainer:
        """The trainer that these options name."""
        name = options[self.option]
        if name not in self.trainers:
            raise ConfigError(f"{self.option} is {name!r}; it can be {', '.join(self.trainers)}")
        return self.trainers[str(name)]

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where no trainer has the name, or the chosen one refuses."""
        trainer = self.chosen(options)
        if isinstance(trainer, ChecksOptions):
            trainer.check_options(options)

    def initial(self, options: Options, seed: int) -> Weights:
        return self.chosen(options).initial(options, seed)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        return self.chosen(job.options).train(weights, examples, job)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        return self.chosen(options).evaluate(weights, examples, options)

    def train_cohort(
        self, weights: Sequence[Weights], examples: Sequence[Any], jobs: Sequence[Job]
    ) -> list[Trained] | None:
        """The chosen trainer's, where it has one."""
        trainer = self.chosen(jobs[0].options)
        if not isinstance(trainer, CohortTrainer):
            return None
        return trainer.train_cohort(weights, examples, jobs)

    def ready(self, weights: Weights, options: Options) -> Any:
        """The chosen trainer's model; its weights where that makes none."""
        ready = getattr(self.chosen(options), "ready", None)
        return weights if ready is None else ready(weights, options)

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The chosen trainer's."""
        return exported_by(self.chosen(options), weights, options)

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The chosen trainer's."""
        names = getattr(self.chosen(options), "statistics", None)
        return () if names is None else tuple(names(options))

    def group_size(self, options: Options) -> int:
        """How many nodes an engine should give to `train_cohort` at a time."""
        sized = getattr(self.chosen(options), "group_size", None)
        return 1 if sized is None else int(sized(options))

    def bundles(self, weights: Weights, examples: Any, job: Job) -> "Iterator[Bundle]":
        """The chosen trainer's.

        Raises:
            ConfigError: it has none.
        """
        return bundling(self, job.options).bundles(weights, examples, job)


def bundling(trainer: Trainer, options: Options) -> BundleTrainer:
    """Who makes bundles under these options.

    Raises:
        ConfigError: this trainer cannot train many nodes as one bundle.
    """
    found = trainer.chosen(options) if isinstance(trainer, ChosenTrainer) else trainer
    if not isinstance(found, BundleTrainer):
        raise ConfigError(f"{type(found).__name__} cannot train many nodes as one bundle")
    return found


def use_of(trainer: Trainer, options: Options) -> str:
    """How the model is used that `umbel.load` gives: an expression of `model` and `x`."""
    found = trainer.chosen(options) if isinstance(trainer, ChosenTrainer) else trainer
    inner = getattr(found, "trainer", found)  # of `OneStep` and `PrivateSgd`
    return str(getattr(found, "USE", getattr(inner, "USE", "model")))
