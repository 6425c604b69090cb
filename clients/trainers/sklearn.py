"""A trainer for scikit-learn's linear models and multi-layer perceptrons.

    trainer = SklearnTrainer(LogisticRegression(C=0.1), features=30, classes=2)

How an estimator goes on from the model it was sent depends on what it offers:

    partial_fit   `local-epochs` passes (SGDClassifier, SGDRegressor, MLPClassifier, ...)
    warm_start    `fit` with `local-iterations` iterations (LogisticRegression, Lasso, ...)
    neither       a whole `fit` on the node's examples (LinearRegression, Ridge, ...); averaging
                  their solutions is the federation, and one round is all there is to it

A pipeline is the estimator at its end, behind steps that are fitted already: every node scales
alike, by numbers that are public (or agreed upon by private means), and the trained model has them.

A node may lack some classes: `fit` is shown one example of each with next to no weight.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import hinge_loss, log_loss
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from umbel.clients.data.arrays import not_a_number, plain_array
from umbel.clients.data.examples import Examples
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.clients.trainers.exported import Exported
from umbel.core.errors import ConfigError
from umbel.core.options import checked

Array = np.ndarray[Any, Any]

RATES = ("eta0", "learning_rate_init")
"""What scikit-learn calls a learning rate."""


ABSENT = 1e-9
"""Weight of an example that stands for an absent class; liblinear drops those of weight zero."""


@dataclass(frozen=True)
class SklearnTrainer:
    """Trains a scikit-learn estimator; weights are float64.

    Attributes:
        estimator: with `coef_` and `intercept_` (linear), or an MLP with solver sgd or adam. Its
            own settings hold, but for what the options say. A fitted one is where training
            starts, and knows its features and classes. Or a pipeline of fitted steps with such
            an estimator at its end.
        features: number of inputs of the estimator, behind the steps before it.
        classes: number of classes, labelled from 0; 0 is regression.
        local_epochs: passes over the node's examples, with `partial_fit`.
        local_iterations: of the solver, with `warm_start`; 0 is the estimator's own `max_iter`.
        OPTIONS: every option that this trainer understands, with its default.

    Raises:
        ConfigError: the estimator is of another kind, or its shape is not known.
    """

    estimator: BaseEstimator
    features: int = 0
    classes: int = 0
    local_epochs: int = 1
    local_iterations: int = 5
    USE: ClassVar[str] = "model.predict(x)"
    OPTIONS: dict[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    steps: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        kind = getattr(self.estimator, "__name__", type(self.estimator).__name__)
        if inspect.isclass(self.estimator):
            raise ConfigError(
                f"SklearnTrainer was given the class {kind}; give it an object: {kind}(...)"
            )
        if not hasattr(self.estimator, "get_params") or not hasattr(self.estimator, "fit"):
            raise ConfigError(
                f"SklearnTrainer was given a {kind}, which is no estimator of scikit-learn"
            )
        if isinstance(self.estimator, Pipeline):
            object.__setattr__(self, "steps", _fitted(self.estimator[:-1]))
            object.__setattr__(self, "estimator", self.estimator[-1])
        options: dict[str, Any] = {
            "local-epochs": self.local_epochs,
            "local-iterations": self.local_iterations,
        }
        rate = self._rate
        if rate is not None:
            options["learning-rate"] = float(getattr(self.estimator, rate)) or 0.01
        object.__setattr__(self, "OPTIONS", options)
        features = getattr(self.estimator, "n_features_in_", 0)
        object.__setattr__(self, "features", self.features or features)
        known = getattr(self.estimator, "classes_", ())
        object.__setattr__(self, "classes", self.classes or len(known))
        self._check()

    def initial(self, options: Options, seed: int) -> Weights:  # noqa: ARG002
        """The first model: zeros for a linear one, small random layers for a perceptron."""
        if hasattr(self.estimator, "coef_") or hasattr(self.estimator, "coefs_"):
            return _weights(self.estimator)
        weights = _weights(self._template)
        if not hasattr(self._template, "coefs_"):
            return Weights(
                {n: torch.zeros_like(v) for n, v in weights.parameters.items()}, weights.buffers
            )
        return Weights(self._first_layers(weights, np.random.RandomState(seed & 0xFFFFFFFF)))

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples; `weights` is not mutated.

        Raises:
            ConfigError: the examples or the options do not fit the estimator.
        """
        estimator = self._loaded(weights)
        options = {n: checked(n, job.options.get(n, d), d) for n, d in self.OPTIONS.items()}
        rate = job.learning_rate or job.options.get("learning-rate")
        if self._rate is not None and rate is not None:
            estimator.set_params(**{self._rate: float(rate)})
        x, y = self._arrays(examples)
        with seeded(job.seed), _quiet():
            if hasattr(estimator, "partial_fit"):
                self._pass_over(estimator, x, y, int(options["local-epochs"]), job.seed)
            else:
                self._fit(estimator, x, y, int(options["local-iterations"]), job.seed)
            loss = self._metrics(estimator, x, y)["loss"]
        trained = _weights(estimator)
        if not all(bool(torch.isfinite(value).all()) for value in trained.parameters.values()):
            raise ConfigError(
                "training gave weights that are not finite; lower the learning rate, or scale the "
                "inputs"
            )
        return Trained(trained, len(x), {"loss": loss})

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        """Loss and accuracy, or for a regression loss (squared error), rmse and r2.

        The loss of a classifier is the log loss, or the hinge loss where there are no
        probabilities.
        """
        x, y = self._arrays(examples)
        return Evaluated(len(x), self._metrics(self._loaded(weights), x, y))

    def ready(self, weights: Weights, options: Options) -> Any:  # noqa: ARG002
        """A fitted estimator, with the classes of the one that the trainer was given."""
        estimator = self._loaded(weights)
        known = getattr(self.estimator, "classes_", None)
        if known is not None:
            estimator.classes_ = np.array(known)
        if self.steps is None:
            return estimator
        return Pipeline([*copy.deepcopy(self.steps).steps, ("model", estimator)])

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The estimator of `ready` as a chain of matrices.

        Raises:
            ConfigError: it is none.
        """
        from umbel.clients.trainers.sklearn_module import module_of

        model = self.ready(weights, options)
        return module_of(model, int(getattr(model, "n_features_in_", self.features)))

    @cached_property
    def _rate(self) -> str | None:
        names = self.estimator.get_params()
        return next((name for name in RATES if name in names), None)

    @cached_property
    def _template(self) -> Any:
        """A fitted estimator of the right shape, to be copied and filled with weights."""
        estimator = clone(self.estimator)
        rng = np.random.default_rng(0)
        rows = max(12, 2 * self.classes)
        x = rng.normal(size=(rows, self.features))
        y = np.arange(rows) % self.classes if self.classes else x[:, 0]
        with seeded(0), _quiet():
            if not hasattr(estimator, "partial_fit"):
                estimator.fit(x, y)
            elif self.classes:
                estimator.partial_fit(x, y, classes=np.arange(self.classes))
            else:
                estimator.partial_fit(x, y)
        if hasattr(estimator, "t_") and not hasattr(estimator, "coefs_"):
            estimator.t_ = 1.0
        # A perceptron's optimiser starts afresh with every job: its moments are of other data.
        estimator.__dict__.pop("_optimizer", None)
        return estimator

    def _check(self) -> None:
        name = type(self.estimator).__name__
        if self.features < 1:
            raise ConfigError(
                f"the number of inputs of {name} is not known before it sees data; say "
                "SklearnTrainer(..., features=N)"
            )
        if is_classifier(self.estimator) and self.classes < 2:
            raise ConfigError(
                f"the number of classes of {name} is not known before it sees data; say "
                "SklearnTrainer(..., classes=N), at least 2"
            )
        if not is_classifier(self.estimator) and self.classes:
            raise ConfigError(f"{name} is a regression; leave out classes={self.classes}")
        if getattr(self.estimator, "average", False):
            raise ConfigError(f"{name} averages its own weights; set average=False")
        if getattr(self.estimator, "early_stopping", False):
            raise ConfigError(f"{name} holds back examples to stop early; set early_stopping=False")
        if getattr(self.estimator, "solver", "") == "lbfgs" and hasattr(
            self.estimator, "batch_size"
        ):
            raise ConfigError(
                f"{name} cannot go on from given weights with lbfgs; use solver='adam'"
            )
        if not _has_weights(self._template):
            raise ConfigError(
                f"{name} has no coefficients to average; use a linear model or an MLP of "
                "scikit-learn, or FunctionTrainer"
            )

    def _loaded(self, weights: Weights) -> Any:
        estimator = copy.deepcopy(self._template)
        expected = _weights(estimator)
        for name, own in expected.parameters.items():
            given = weights.parameters.get(name)
            if given is None or given.shape != own.shape:
                raise ConfigError(
                    f"the weights do not belong to this {type(estimator).__name__}: {name} should "
                    f"have shape {tuple(own.shape)}; use the same estimator, features and classes"
                )
        _fill(estimator, weights)
        return estimator

    def _pass_over(self, estimator: Any, x: Array, y: Array, epochs: int, seed: int) -> None:
        for epoch in range(epochs):
            if "random_state" in estimator.get_params():
                estimator.set_params(random_state=(seed + epoch) & 0xFFFFFFFF)
            estimator.partial_fit(x, y)

    def _fit(self, estimator: Any, x: Array, y: Array, iterations: int, seed: int) -> None:
        names = estimator.get_params()
        changes: dict[str, Any] = {"random_state": seed & 0xFFFFFFFF, "warm_start": True}
        if iterations and "warm_start" in names:
            changes["max_iter"] = iterations
        estimator.set_params(**{n: v for n, v in changes.items() if n in names})
        missing = np.setdiff1d(np.arange(self.classes), y)
        if not len(missing):
            estimator.fit(x, y)
            return
        weight = np.concatenate([np.ones(len(x)), np.full(len(missing), ABSENT)])
        x = np.concatenate([x, np.zeros((len(missing), x.shape[1]))])
        estimator.fit(x, np.concatenate([y, missing]), sample_weight=weight)

    def _first_layers(self, weights: Weights, rng: np.random.RandomState) -> dict[str, Tensor]:
        """Uniform layers as scikit-learn draws them (Glorot and Bengio 2010)."""
        factor = 2.0 if self._template.activation == "logistic" else 6.0
        first = {}
        for name, value in weights.parameters.items():
            layer = weights.parameters[name.replace("intercepts", "coefs")]
            bound = (factor / sum(layer.shape)) ** 0.5
            first[name] = torch.from_numpy(rng.uniform(-bound, bound, tuple(value.shape)))
        return first

    def _arrays(self, examples: Any) -> tuple[Array, Array]:
        if isinstance(examples, tuple) and len(examples) == 2:
            examples = Examples(*examples)
        if not isinstance(examples, Examples):
            raise ConfigError(
                f"a node's examples are a {type(examples).__name__}; scikit-learn needs "
                "Examples(x, y)"
            )
        if len(examples) == 0:
            raise ConfigError("a node has no examples; every node needs at least one")
        x, y = (_numpy(examples.x, "inputs"), _numpy(examples.y, "targets"))
        if y.size != len(x):
            raise ConfigError(
                f"the targets of {len(x)} examples have the shape {y.shape}; give one number each"
            )
        y = y.reshape(len(x))
        x = x.reshape(len(x), -1).astype(np.float64) / (255 if x.dtype == np.uint8 else 1)
        if self.steps is not None:
            x = np.asarray(self.steps.transform(x), np.float64)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ConfigError(
                f"{not_a_number(Examples(x, y))}; fill it or leave those examples out"
            )
        if x.shape[1] != self.features:
            raise ConfigError(
                f"an example has {x.shape[1]} inputs, but the trainer was made for features="
                f"{self.features}; make the two agree"
            )
        if not self.classes:
            return x, y.astype(np.float64)
        labels = y.astype(np.int64)
        if (labels != y).any() or labels.min() < 0 or labels.max() >= self.classes:
            raise ConfigError(
                f"class labels go from {y.min()} to {y.max()}; with classes={self.classes} they "
                f"have to be whole numbers from 0 to {self.classes - 1}"
            )
        return x, labels

    def _metrics(self, estimator: Any, x: Array, y: Array) -> dict[str, float]:
        predicted = estimator.predict(x)
        if not self.classes:
            error, spread = float(((predicted - y) ** 2).mean()), float(y.var())
            metrics = {"loss": error, "rmse": error**0.5}
            return metrics | ({"r2": 1 - error / spread} if spread > 0 else {})
        labels = np.arange(self.classes)
        if hasattr(estimator, "predict_proba"):
            loss = log_loss(y, estimator.predict_proba(x), labels=labels)
        else:
            loss = hinge_loss(y, estimator.decision_function(x), labels=labels)
        return {"loss": float(loss), "accuracy": float((predicted == y).mean())}


def _fitted(steps: Pipeline) -> Pipeline | None:
    """The steps before the estimator; None where there are none.

    Raises:
        ConfigError: one of them is not fitted.
    """
    for name, step in steps.steps:
        try:
            check_is_fitted(step)
        except NotFittedError:
            raise ConfigError(
                f"the step {name!r} ({type(step).__name__}) of the pipeline is not fitted, and "
                "nodes that fit it by themselves would not scale alike; fit it on public examples"
            ) from None
    return steps if len(steps.steps) else None


def _numpy(values: Any, what: str) -> Array:
    array = plain_array(values, what)
    return array.cpu().numpy() if isinstance(array, Tensor) else array


@contextmanager
def _quiet() -> Iterator[None]:
    """A few iterations are not meant to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _has_weights(estimator: Any) -> bool:
    return hasattr(estimator, "coefs_") or (
        hasattr(estimator, "coef_") and hasattr(estimator, "intercept_")
    )


def _weights(estimator: Any) -> Weights:
    """Copies of an estimator's coefficients; the steps that SGD has made are a buffer."""
    if hasattr(estimator, "coefs_"):
        layers = {f"coefs.{i}": value for i, value in enumerate(estimator.coefs_)}
        layers |= {f"intercepts.{i}": value for i, value in enumerate(estimator.intercepts_)}
        return Weights({name: _tensor(value) for name, value in layers.items()})
    linear = {"coef": _tensor(estimator.coef_), "intercept": _tensor(estimator.intercept_)}
    return Weights(linear, {"steps": _tensor(estimator.t_)} if hasattr(estimator, "t_") else {})


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value, np.float64, order="C"))


def _fill(estimator: Any, weights: Weights) -> None:
    arrays = {name: value.double().numpy().copy() for name, value in weights.parameters.items()}
    if hasattr(estimator, "coefs_"):
        layers = range(len(estimator.coefs_))
        estimator.coefs_ = [arrays[f"coefs.{i}"] for i in layers]
        estimator.intercepts_ = [arrays[f"intercepts.{i}"] for i in layers]
        return
    estimator.coef_ = arrays["coef"]
    intercept = arrays["intercept"]
    estimator.intercept_ = intercept if intercept.ndim else float(intercept)
    if "steps" in weights.buffers and hasattr(estimator, "t_"):
        estimator.t_ = float(weights.buffers["steps"])
