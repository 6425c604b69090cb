"""Estimators of scikit-learn whose fit is a function of sums over examples.

A node sends means of its sufficient statistics. Their mean over nodes, weighted by examples, is
that of all examples together, so the model made of it is the pooled fit; where nodes count alike
whatever they have (under privacy), it is that of nodes of equal size.

    standard scaling       means of x and x^2
    principal components   means of x and x x'
    Gaussian naive Bayes   shares of the classes, and of each the means of x and x^2
    counting naive Bayes   shares of the classes, and of each the mean counts
    k-means                shares of the clusters, and of each the mean of x: one step of Lloyd's
                           algorithm a round, from the centres of the round before

Second moments are taken about `centre`, the mean as the round before had it: where a mean is far
larger than the spread, a second round recovers the digits that the first lost. `share` is 1 / (the
node's examples x the number of nodes); its weighted mean is 1 / (all examples) where every node
took part, and that is how smoothing and degrees of freedom know how many there were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.preprocessing import StandardScaler

from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
Means = Mapping[str, Array]

KNOWN, SHARE = "weight", "share"
"""1 as soon as a round has measured the statistics; and see above."""

FEWEST = 1e-12
"""The smallest share that is believed; noise may have made it negative."""


def is_known(means: Means) -> bool:
    """Whether the statistics have been measured."""
    return bool(means[KNOWN] > 0.5)


def number_of(means: Means) -> float:
    """How many examples there were on all nodes."""
    share = float(means[SHARE])
    return 1 / share if share > FEWEST else 1 / FEWEST


class Sums(Protocol):
    """How one kind of estimator is made of means of sufficient statistics."""

    @property
    def outputs(self) -> int:
        """Number of columns behind the estimator, where it transforms; else of its inputs."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each statistic, beside `weight` and `share`."""
        ...

    def first(self, seed: int) -> dict[str, Array]:
        """Statistics that are not zero before anything is known."""
        ...

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:
        """The statistics of a node's examples.

        Args:
            before: as they were sent; all zero but `first` before the first round.
            x: inputs, shape (examples, features).
            y: targets, shape (examples,).
        """
        ...

    def fitted(self, means: Means) -> Any:
        """The estimator; a neutral one where nothing is known yet."""
        ...


def sums_of(estimator: BaseEstimator, features: int, classes: int) -> Sums | None:
    """How this estimator is made of sums; None where it is of another kind.

    Raises:
        ConfigError: its shape depends on the data.
    """
    kind = type(estimator)
    if kind is StandardScaler:
        return Scaling(estimator, features)
    if kind is PCA:
        return Components(estimator, features)
    if kind is GaussianNB:
        return Gaussians(estimator, features, classes)
    if kind in (MultinomialNB, BernoulliNB, ComplementNB):
        return Counts(estimator, features, classes)
    if kind in (KMeans, MiniBatchKMeans):
        return Clusters(estimator, features)
    return None


def is_sums(estimator: Any) -> bool:
    """Whether `sums_of` knows this kind of estimator."""
    kinds = (StandardScaler, PCA, GaussianNB, MultinomialNB, BernoulliNB, ComplementNB)
    return type(estimator) in (*kinds, KMeans, MiniBatchKMeans)


def _centre(before: Means) -> Array:
    """The mean as it was known before; zero at first."""
    if not is_known(before):
        return np.zeros_like(before["centre"])
    first = before["first"]
    return before["centre"] + (first if first.ndim == 1 else first.sum(0))


@dataclass(frozen=True)
class Scaling:
    """`StandardScaler`."""

    estimator: Any
    features: int

    @property
    def outputs(self) -> int:
        return self.features

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("centre", "first", "second"), (self.features,))

    def first(self, seed: int) -> dict[str, Array]:  # noqa: ARG002
        return {}

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:  # noqa: ARG002
        centre = _centre(before)
        off = x - centre
        return {"centre": centre, "first": off.mean(0), "second": np.square(off).mean(0)}

    def fitted(self, means: Means) -> Any:
        scaler, width = clone(self.estimator), self.features
        mean = means["centre"] + means["first"]
        variance = np.maximum(means["second"] - np.square(means["first"]), 0.0)
        number = number_of(means)
        if not is_known(means):
            mean, variance, number = np.zeros(width), np.ones(width), 1.0
        # What scikit-learn takes for a column of one value, whose scale is 1 (Chan et al. 1983).
        eps = np.finfo(np.float64).eps
        constant = variance <= number * eps * variance + np.square(number * mean * eps)
        scale = np.where(constant, 1.0, np.sqrt(variance))
        scaler.n_features_in_ = width
        scaler.n_samples_seen_ = round(number)
        scaler.mean_ = mean if scaler.with_mean or scaler.with_std else None
        scaler.var_ = variance if scaler.with_std else None
        scaler.scale_ = scale if scaler.with_std else None
        return scaler


@dataclass(frozen=True)
class Components:
    """`PCA`."""

    estimator: Any
    features: int

    def __post_init__(self) -> None:
        wanted = self.estimator.n_components
        if wanted is not None and not isinstance(wanted, int | np.integer):
            raise ConfigError(
                f"PCA(n_components={wanted!r}) has as many components as the data say; give a "
                "whole number, which every node has before it sees any"
            )
        if wanted is not None and not 0 < wanted <= self.features:
            raise ConfigError(
                f"PCA(n_components={wanted}) of {self.features} inputs; give a number from 1 to "
                f"{self.features}"
            )

    @property
    def outputs(self) -> int:
        wanted = self.estimator.n_components
        return self.features if wanted is None else int(wanted)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.features
        triangle = width * (width + 1) // 2
        return {"centre": (width,), "first": (width,), "second": (triangle,)}

    def first(self, seed: int) -> dict[str, Array]:  # noqa: ARG002
        return {}

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:  # noqa: ARG002
        centre = _centre(before)
        off = x - centre
        product = off.T @ off / len(x)
        upper = product[np.triu_indices(self.features)]
        return {"centre": centre, "first": off.mean(0), "second": upper}

    def fitted(self, means: Means) -> Any:
        pca, width, count = clone(self.estimator), self.features, self.outputs
        number = max(number_of(means), 2.0) if is_known(means) else 2.0
        if is_known(means):
            product = np.zeros((width, width))
            product[np.triu_indices(width)] = means["second"]
            product = product + product.T - np.diag(product.diagonal())
            first = means["first"]
            values, vectors = np.linalg.eigh(
                (product - np.outer(first, first)) * (number / (number - 1))
            )
            values, vectors = np.maximum(values[::-1], 0.0), vectors.T[::-1]
            # Of the two directions, the one whose largest entry is positive, as in scikit-learn.
            largest = np.abs(vectors).argmax(1)
            vectors = vectors * np.sign(vectors[np.arange(width), largest])[:, None]
        else:
            values, vectors = np.ones(width), np.eye(width)
        total = values.sum() or 1.0
        least = min(number, width)
        pca.mean_ = means["centre"] + means["first"]
        pca.components_ = vectors[:count]
        pca.explained_variance_ = values[:count]
        pca.explained_variance_ratio_ = values[:count] / total
        pca.singular_values_ = np.sqrt(values[:count] * (number - 1))
        pca.noise_variance_ = float(values[count:].mean()) if count < least else 0.0
        pca.n_components_, pca.n_features_in_, pca.n_samples_ = count, width, round(number)
        return pca


@dataclass(frozen=True)
class Gaussians:
    """`GaussianNB`."""

    estimator: Any
    features: int
    classes: int

    @property
    def outputs(self) -> int:
        return self.features

    def shapes(self) -> dict[str, tuple[int, ...]]:
        each = (self.classes, self.features)
        shares = (self.classes,)
        return {"classes": shares, "centre": (self.features,), "first": each, "second": each}

    def first(self, seed: int) -> dict[str, Array]:  # noqa: ARG002
        return {}

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:
        centre, member = _centre(before), np.eye(self.classes)[y]
        off = x - centre
        return {
            "classes": member.mean(0),
            "centre": centre,
            "first": member.T @ off / len(x),
            "second": member.T @ np.square(off) / len(x),
        }

    def fitted(self, means: Means) -> Any:
        model = clone(self.estimator)
        known = is_known(means)
        shares = np.maximum(means["classes"], 0.0) if known else np.ones(self.classes)
        some = np.maximum(shares, FEWEST)[:, None]
        there = (shares > FEWEST)[:, None]
        first = np.where(there, means["first"] / some, 0.0)
        variance = np.where(there, means["second"] / some - np.square(first), 1.0)
        spread = means["second"].sum(0) - np.square(means["first"].sum(0))
        model.epsilon_ = model.var_smoothing * max(float(spread.max()), 0.0) if known else 1.0
        model.theta_ = means["centre"] + first
        model.var_ = np.maximum(variance, 0.0) + max(model.epsilon_, np.finfo(np.float64).tiny)
        priors = shares / max(shares.sum(), FEWEST) if model.priors is None else model.priors
        model.class_prior_ = np.maximum(priors, np.finfo(np.float64).tiny)
        model.class_count_ = shares * number_of(means) if known else shares
        model.classes_ = np.arange(self.classes)
        model.n_features_in_ = self.features
        return model


@dataclass(frozen=True)
class Counts:
    """`MultinomialNB`, `ComplementNB` and `BernoulliNB`."""

    estimator: Any
    features: int
    classes: int

    @property
    def outputs(self) -> int:
        return self.features

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"classes": (self.classes,), "first": (self.classes, self.features)}

    def first(self, seed: int) -> dict[str, Array]:  # noqa: ARG002
        return {}

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:  # noqa: ARG002
        if isinstance(self.estimator, BernoulliNB):
            limit = self.estimator.binarize
            x = x if limit is None else (x > limit).astype(np.float64)
        elif (x < 0).any():
            raise ConfigError(
                f"{type(self.estimator).__name__} counts, but the inputs go down to "
                f"{x.min():g}; give numbers of at least 0, or take GaussianNB"
            )
        member = np.eye(self.classes)[y]
        return {"classes": member.mean(0), "first": member.T @ x / len(x)}

    def fitted(self, means: Means) -> Any:
        model = clone(self.estimator)
        number = number_of(means) if is_known(means) else 1.0
        shares = np.maximum(means["classes"], 0.0)
        if not is_known(means):
            shares = np.ones(self.classes)
        # One row a class, its mean counts, that counts as many times as the class has examples.
        rows = np.maximum(means["first"], 0.0) / np.maximum(shares, FEWEST)[:, None]
        limit = getattr(model, "binarize", None)
        if limit is not None:
            model.set_params(binarize=None)
        labels = np.arange(self.classes)
        model.partial_fit(rows, labels, classes=labels, sample_weight=shares * number)
        if limit is not None:
            model.set_params(binarize=limit)
        return model


@dataclass(frozen=True)
class Clusters:
    """`KMeans`: its `init` is where it starts, or small random directions from the origin."""

    estimator: Any
    features: int

    @property
    def outputs(self) -> int:
        return int(self.estimator.n_clusters)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        count = int(self.estimator.n_clusters)
        each = (count, self.features)
        return {"clusters": (count,), "centre": each, "first": each}

    def first(self, seed: int) -> dict[str, Array]:
        shape = self.shapes()["centre"]
        known = getattr(self.estimator, "cluster_centers_", None)
        given = self.estimator.init if known is None else known
        if isinstance(given, str) or callable(given):
            # So near to the origin, what counts is a centred example's direction only: every
            # centre gets a share, whatever the scale of the inputs.
            rng = np.random.default_rng(seed)
            return {"centre": 1e-6 * rng.normal(size=shape)}
        centres = np.asarray(given, np.float64)
        if centres.shape != shape:
            raise ConfigError(
                f"the first centres have the shape {centres.shape}; {shape[0]} clusters of "
                f"{shape[1]} inputs need {shape}"
            )
        return {"centre": centres}

    def centres(self, means: Means) -> Array:
        """Means of the clusters; one that nobody is in stays where it was."""
        shares = means["clusters"][:, None]
        there = shares > FEWEST
        return np.where(there, means["first"] / np.where(there, shares, 1.0), means["centre"])

    def measured(self, before: Means, x: Array, y: Array) -> dict[str, Array]:  # noqa: ARG002
        centres = self.centres(before)
        member = np.eye(len(centres))[nearest(x, centres)]
        return {
            "clusters": member.mean(0),
            "centre": centres,
            "first": member.T @ x / len(x),
        }

    def fitted(self, means: Means) -> Any:
        centres = self.centres(means)
        # A fit of its own centres, a cluster each, has all that a fitted one has.
        apart = np.arange(len(centres), dtype=np.float64)[:, None] * np.ones(self.features)
        model = clone(self.estimator).set_params(init=apart, n_init=1, max_iter=1)
        model.fit(apart)
        model.set_params(**self.estimator.get_params())
        model.cluster_centers_ = np.ascontiguousarray(centres)
        for name in ("labels_", "inertia_"):
            model.__dict__.pop(name, None)
        return model


def nearest(x: Array, centres: Array) -> Array:
    """The place of the centre that is nearest to each row."""
    square = np.square(centres).sum(1)
    found: Array = (square - 2 * (x @ centres.T)).argmin(1)
    return found


WHY = {
    "tree": "a tree is made of splits, which have no mean; take SGDClassifier, MLPClassifier or "
    "GaussianNB",
    "ensemble": "it is made of trees or other models that have no mean; take SGDClassifier, "
    "MLPClassifier or GaussianNB",
    "neighbors": "it is the examples themselves, which stay on their nodes; take "
    "LogisticRegression, MLPClassifier or GaussianNB",
    "svm": "a kernel machine is made of examples, which stay on their nodes; take LinearSVC, or "
    "SGDClassifier(loss='hinge') behind RBFSampler fitted on any examples of the same width",
    "gaussian_process": "it is made of the examples, which stay on their nodes; take Ridge or "
    "MLPRegressor",
    "kernel_ridge": "it is made of the examples, which stay on their nodes; take Ridge or "
    "MLPRegressor",
    "preprocessing": "what it learns (extremes, ranks, categories) is no sum over examples; take "
    "StandardScaler, or fit it on public examples first",
    "impute": "it has to be the same on every node; fit it on public examples first",
    "feature_extraction": "its vocabulary has to be the same on every node; take "
    "HashingVectorizer in the data function, or fit it on public texts first",
    "feature_selection": "its choice has to be the same on every node; fit it on public examples "
    "first",
    "cluster": "its clusters are found by comparing examples with each other, which stay on their "
    "nodes; take KMeans",
    "decomposition": "what it learns is no sum over examples; take PCA",
    "mixture": "its steps are not offered by scikit-learn one by one; take KMeans, or GaussianNB",
    "manifold": "it places the examples, which stay on their nodes; take PCA",
    "discriminant_analysis": "scikit-learn fits it to all examples at once; take GaussianNB or "
    "LogisticRegression",
}
"""Why an estimator of a module of scikit-learn cannot be federated, and what to take."""


def refusal(estimator: Any) -> str:
    """Why an estimator cannot be federated, and what to take in its place."""
    _, _, rest = type(estimator).__module__.partition("sklearn.")
    reason = WHY.get(rest.split(".")[0].strip("_"))
    name = type(estimator).__name__
    if reason is None:
        return (
            f"{name} has no coefficients to average; use a linear model, an MLP, naive Bayes, "
            "KMeans or PCA of scikit-learn, or FunctionTrainer"
        )
    return f"{name} has no coefficients to average: {reason}"
