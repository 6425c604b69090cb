"""A trainer for the estimators of scikit-learn that can be averaged.

    trainer = SklearnTrainer(LogisticRegression(C=0.1), features=30, classes=2)

How an estimator goes on from the model it was sent depends on what it offers:

    partial_fit   `local-epochs` passes (SGDClassifier, SGDRegressor, MLPClassifier, ...)
    warm_start    `fit` with `local-iterations` iterations (LogisticRegression, Lasso, ...)
    neither       a whole `fit` on the node's examples (LinearRegression, Ridge, ...); averaging
                  their solutions is the federation, and one round is all there is to it
    sums          naive Bayes, PCA, StandardScaler and k-means are made of means of sufficient
                  statistics (`umbel.clients.trainers.sums`); one round is the pooled fit, a round
                  of k-means is one step of Lloyd's algorithm

A pipeline is the estimator at its end, behind steps that are fitted already or are fitted by the
federation: every node scales alike. A step that the federation fits takes a round, before which
nothing behind it is trained; in the rounds after it goes on being measured.

A node may lack some classes: `fit` is shown one example of each with next to no weight.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
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
from umbel.clients.trainers.sums import (
    KNOWN,
    SHARE,
    Sums,
    is_known,
    is_sums,
    nearest,
    refusal,
    sums_of,
)
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
            starts, and knows its features and classes. Or naive Bayes, KMeans, PCA or
            StandardScaler. Or a pipeline with such an estimator at its end, and before it steps
            that are fitted, StandardScaler or PCA.
        features: number of inputs of the first step that is not fitted: of the estimator, behind
            the fitted steps before it, or of a StandardScaler or PCA.
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
    steps: tuple["_Step", ...] = field(init=False, repr=False, compare=False, default=())

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
        before: list[tuple[str, Any]] = []
        if isinstance(self.estimator, Pipeline):
            before = self.estimator.steps[:-1]
            object.__setattr__(self, "estimator", self.estimator[-1])
        options: dict[str, Any] = {
            "local-epochs": self.local_epochs,
            "local-iterations": self.local_iterations,
        }
        rate = self._rate
        if rate is not None:
            options["learning-rate"] = float(getattr(self.estimator, rate)) or 0.01
        if is_sums(self.estimator):
            options = {}
        object.__setattr__(self, "OPTIONS", options)
        if self.features < 1 and not (before and any(not _is_fitted(step) for _, step in before)):
            features = getattr(self.estimator, "n_features_in_", 0)
            object.__setattr__(self, "features", features)
        known = getattr(self.estimator, "classes_", ())
        object.__setattr__(self, "classes", self.classes or len(known))
        self._check_shape()
        object.__setattr__(self, "steps", _steps(before, self.features))
        self._check()

    def initial(self, options: Options, seed: int) -> Weights:  # noqa: ARG002
        """The first model: zeros for a linear one, small random layers for a perceptron.

        Statistics are zero as well, but for where k-means starts.
        """
        first = self._first(seed)
        parameters: dict[str, Tensor] = {}
        for step in self.steps:
            parameters |= step.first(seed)
        return Weights({**parameters, **first.parameters}, first.buffers)

    def _first(self, seed: int) -> Weights:
        if self._end is not None:
            return Weights(self._end.first(seed))
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
        x, y = self._arrays(examples)
        parameters = {name: value.clone() for name, value in weights.parameters.items()}
        buffers = {name: value.clone() for name, value in weights.buffers.items()}
        share = 1 / (len(x) * max(1, int(job.node.get("num-partitions", 1))))
        ready = True
        for step in self.steps:
            ready = ready and step.measure(weights.parameters, parameters, x, y, share)
            x = step.transform(weights.parameters, x)
        if ready and self._end is not None:
            self._end.measure(weights.parameters, parameters, x, y, share)
            loss = self._metrics(self._end.fitted(parameters), x, y)
        elif ready:
            estimator = self._trained(weights, x, y, job)
            loss = self._metrics(estimator, x, y)
            after = _weights(estimator)
            parameters |= after.parameters
            buffers |= after.buffers
        else:  # the steps before it are not known yet
            loss = self._metrics(self._loaded(weights), x, y)
        if not all(bool(torch.isfinite(value).all()) for value in parameters.values()):
            raise ConfigError(
                "training gave weights that are not finite; lower the learning rate, or scale the "
                "inputs"
            )
        shown = {name: value for name, value in loss.items() if name == "loss"}
        return Trained(Weights(parameters, buffers), len(x), shown)

    def _trained(self, weights: Weights, x: Array, y: Array, job: Job) -> Any:
        """The estimator after a node's own training."""
        estimator = self._loaded(weights)
        options = {n: checked(n, job.options.get(n, d), d) for n, d in self.OPTIONS.items()}
        rate = job.learning_rate or job.options.get("learning-rate")
        if self._rate is not None and rate is not None:
            estimator.set_params(**{self._rate: float(rate)})
        with seeded(job.seed), _quiet():
            if hasattr(estimator, "partial_fit"):
                self._pass_over(estimator, x, y, int(options["local-epochs"]), job.seed)
            else:
                self._fit(estimator, x, y, int(options["local-iterations"]), job.seed)
        return estimator

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        """Loss and accuracy, or for a regression loss (squared error), rmse and r2.

        The loss of a classifier is the log loss, or the hinge loss where there are no
        probabilities; of k-means and PCA the mean squared distance to the nearest centre, or to
        what the components can say. A scaler alone has none.
        """
        x, y = self._arrays(examples)
        for step in self.steps:
            x = step.transform(weights.parameters, x)
        return Evaluated(len(x), self._metrics(self._loaded(weights), x, y))

    def ready(self, weights: Weights, options: Options) -> Any:  # noqa: ARG002
        """A fitted estimator, with the classes of the one that the trainer was given."""
        estimator = self._loaded(weights)
        known = getattr(self.estimator, "classes_", None)
        if known is not None:
            estimator.classes_ = np.array(known)
        if not self.steps:
            return estimator
        made = [(step.name, step.fitted(weights.parameters)) for step in self.steps]
        return Pipeline([*copy.deepcopy(made), ("model", estimator)])

    @cached_property
    def _inputs(self) -> int:
        """Number of inputs of the estimator at the end."""
        return self.steps[-1].outputs if self.steps else self.features

    @cached_property
    def _end(self) -> "_Step | None":
        """The estimator at the end where it is made of sums."""
        sums = sums_of(self.estimator, self._inputs, self.classes)
        return None if sums is None else _Step("", sums=sums, outputs=sums.outputs)

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
        x = rng.normal(size=(rows, self._inputs))
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

    def _check_shape(self) -> None:
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
            raise ConfigError(
                f"{name} is no classifier, so there are no classes; leave out "
                f"classes={self.classes}"
            )

    def _check(self) -> None:
        name = type(self.estimator).__name__
        if self._end is not None:
            return
        why = refusal(self.estimator)
        made_of_models = ".ensemble." in type(self.estimator).__module__
        if (
            made_of_models
            or hasattr(self.estimator, "transform")
            or (not hasattr(self.estimator, "predict") and not hasattr(self.estimator, "coef_"))
        ):
            raise ConfigError(why)
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
        try:
            made = _has_weights(self._template)
        except Exception:  # one that does not even fit a few rows
            made = False
        if not made:
            raise ConfigError(why)

    def _loaded(self, weights: Weights) -> Any:
        if self._end is not None:
            return self._end.fitted(weights.parameters)
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
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ConfigError(
                f"{not_a_number(Examples(x, y))}; fill it or leave those examples out"
            )
        seen = x
        for step in self.steps:  # what is fitted comes first, and is the same for everybody
            if step.sums is not None:
                break
            seen = step.transform({}, seen)
        if seen.shape[1] != self.features:
            raise ConfigError(
                f"an example has {seen.shape[1]} inputs, but the trainer was made for features="
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
        if isinstance(estimator, KMeans | MiniBatchKMeans):
            centres = estimator.cluster_centers_
            off = np.square(x - centres[nearest(x, centres)]).sum(1)
            return {"loss": float(off.mean())}
        if isinstance(estimator, PCA):
            back = estimator.inverse_transform(estimator.transform(x))
            return {"loss": float(np.square(x - back).sum(1).mean())}
        if not hasattr(estimator, "predict"):
            return {}
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


@dataclass(frozen=True)
class _Step:
    """A step before the estimator, or the estimator itself: fitted already, or made of sums.

    Attributes:
        name: in the pipeline; what its statistics' names begin with.
        step: a fitted one.
        sums: how it is made.
        outputs: number of columns behind it.
    """

    name: str
    step: Any = None
    sums: Sums | None = None
    outputs: int = 0

    def _key(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _means(self, tree: Mapping[str, Tensor]) -> dict[str, Array]:
        assert self.sums is not None
        names = [KNOWN, SHARE, *self.sums.shapes()]
        found: dict[str, Array] = {}
        for name in names:
            value = tree.get(self._key(name))
            if value is None or tuple(value.shape) != self.sums.shapes().get(name, ()):
                raise ConfigError(
                    f"the weights do not belong to this model: there is no {self._key(name)} of "
                    "its shape; use the same estimator, features and classes"
                )
            found[name] = value.double().numpy()
        return found

    def first(self, seed: int) -> dict[str, Tensor]:
        """The statistics before anything is known."""
        if self.sums is None:
            return {}
        shapes = {KNOWN: (), SHARE: (), **self.sums.shapes()}
        values = {name: np.zeros(shape) for name, shape in shapes.items()}
        values |= self.sums.first(seed)
        return {self._key(name): _tensor(value) for name, value in values.items()}

    def measure(
        self,
        before: Mapping[str, Tensor],
        after: dict[str, Tensor],
        x: Array,
        y: Array,
        share: float,
    ) -> bool:
        """Put a node's statistics into `after`; whether they were known before."""
        if self.sums is None:
            return True
        means = self._means(before)
        found = {KNOWN: np.float64(1), SHARE: np.float64(share), **self.sums.measured(means, x, y)}
        after.update({self._key(name): _tensor(value) for name, value in found.items()})
        return is_known(means)

    def fitted(self, tree: Mapping[str, Tensor]) -> Any:
        """The step with these statistics; a neutral one where they are not known."""
        return self.step if self.sums is None else self.sums.fitted(self._means(tree))

    def transform(self, tree: Mapping[str, Tensor], x: Array) -> Array:
        """What is behind the step."""
        return np.asarray(self.fitted(tree).transform(x), np.float64)


def _is_fitted(step: Any) -> bool:
    if step in (None, "passthrough"):
        return True
    try:
        check_is_fitted(step)
    except NotFittedError:
        return False
    return True


def _steps(steps: list[tuple[str, Any]], features: int) -> tuple[_Step, ...]:
    """The steps before the estimator.

    Raises:
        ConfigError: one of them is neither fitted nor made of sums.
    """
    found: list[_Step] = []
    width, federated = features, False
    for name, step in steps:
        if step in (None, "passthrough"):
            continue
        if _is_fitted(step):
            if federated:  # its width is known; before, `features` is what is behind all of them
                width = int(step.transform(np.zeros((1, width))).shape[1])
            found.append(_Step(name, step=step, outputs=width))
            continue
        if not hasattr(step, "transform") or not is_sums(step):
            raise ConfigError(
                f"the step {name!r} ({type(step).__name__}) of the pipeline is not fitted, and "
                "nodes that fit it by themselves would not scale alike; fit it on public examples, "
                "or take StandardScaler or PCA, which the federation fits"
            )
        sums = sums_of(step, width, 0)
        assert sums is not None
        width, federated = sums.outputs, True
        found.append(_Step(name, sums=sums, outputs=width))
    return tuple(found)


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
