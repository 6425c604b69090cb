"""A search by Optuna: trials in one file, so that it can go on, and be worked on side by side.

tree-structured Parzen estimator    picks options from what earlier trials gave (Bergstra et al.
                                    2011)
successive halving                  ends a trial whose score is not among the better half when
                                    it has run for 1, 2, 4, ... rounds (Li et al. 2020, ASHA)
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError, UmbelError, described
from umbel.core.options import Value
from umbel.deliver.extras import needed
from umbel.deliver.search.space import Dimension

STORAGE = "search.sqlite"
Report = Callable[[int, float], None]
"""Told of the score after each round; raises where the trial shall end."""
Objective = Callable[[int, Mapping[str, Value], Report], float]
"""Runs the trial of a number with these options; its final score."""


@dataclass(frozen=True)
class Goal:
    """What is searched for.

    Attributes:
        metric: its name among a run's metrics.
        higher: whether more of it is better.
    """

    metric: str
    higher: bool

    def better(self, one: float, other: float) -> bool:
        """Whether the first is better."""
        return one > other if self.higher else one < other


class Search:
    """One study.

    Attributes:
        folder: where its storage is.
        dimensions: of the space.
    """

    def __init__(
        self, folder: Path, dimensions: Sequence[Dimension], goal: Goal, *, seed: int
    ) -> None:
        """Begin a study, or open the one that is in the folder.

        Args:
            folder: for the storage.
            dimensions: of the space.
            goal: what is searched for.
            seed: of the choices.

        Raises:
            ConfigError: Optuna is missing, or the folder's study is of another space.
        """
        self._optuna = optuna = needed("optuna", "umbel tune", "tune")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.folder, self.dimensions = folder, list(dimensions)
        said = {"space": " ".join(map(str, dimensions)), "metric": goal.metric}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{folder / STORAGE}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self._study = optuna.create_study(
                study_name="search",
                storage=storage,
                load_if_exists=True,
                direction="maximize" if goal.higher else "minimize",
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5),
                pruner=optuna.pruners.SuccessiveHalvingPruner(),
            )
        before = self._study.user_attrs
        for name, value in said.items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"{folder} holds a search with the {name} {before[name]!r}, and this one has "
                    f"{value!r}; go on with that, or name another folder with --out"
                )
            self._study.set_user_attr(name, value)

    def first(self, options: Mapping[str, Value]) -> None:
        """Try these options first, where they lie in the space: the defaults, to compare with."""
        if not self._study.trials:
            self._study.enqueue_trial(
                {one.name: options[one.name] for one in self.dimensions}, skip_if_exists=True
            )

    def run(self, objective: Objective, trials: int) -> None:
        """Try options until so many trials have ended, in this and all other processes.

        A trial whose options cannot be used is a failed one, and the search goes on.
        """
        optuna = self._optuna

        def one(trial: Any) -> float:
            options = {each.name: each.pick(trial) for each in self.dimensions}

            def report(number: int, score: float) -> None:
                trial.report(score, number)
                if trial.should_prune():
                    raise optuna.TrialPruned

            try:
                return objective(trial.number, options, report)
            except UmbelError as error:
                trial.set_user_attr("error", described(error, ""))
                raise

        state = optuna.trial.TrialState
        ended = optuna.study.MaxTrialsCallback(
            trials, states=(state.COMPLETE, state.PRUNED, state.FAIL)
        )
        if self.ended() < trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                warnings.simplefilter("ignore", UserWarning)  # a first value outside of the space
                self._study.optimize(one, callbacks=[ended], catch=(UmbelError,))

    def ended(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def trials(self) -> list[dict[str, Any]]:
        """All trials that have ended, by number: options, score, state, rounds, error."""
        return [
            {
                "number": trial.number,
                "options": dict(trial.params),
                "score": trial.value,
                "state": {"COMPLETE": "complete", "PRUNED": "pruned"}.get(
                    trial.state.name, "failed"
                ),
                "rounds": max(trial.intermediate_values, default=0),
                **({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {}),
            }
            for trial in self._study.trials
            if trial.state.is_finished()
        ]

    def importance(self) -> dict[str, float]:
        """Each option's part in how scores differ (functional ANOVA, Hutter et al. 2014)."""
        complete = [one for one in self.trials() if one["state"] == "complete"]
        if len(complete) < 4 or len({one["score"] for one in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=0)
            try:
                found = self._optuna.importance.get_param_importances(
                    self._study, evaluator=evaluator
                )
            except (ImportError, ValueError, RuntimeError):
                return {}
        return {name: float(value) for name, value in found.items()}
